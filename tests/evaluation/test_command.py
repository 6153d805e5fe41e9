"""``uar eval``: what is refused, what is kept, what its cache answers, what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_data import write_benchmarks
from evaluated_run import forgotten_afterwards

from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.evaluation import command
from uar_megatron.evaluation.command import EvalOptions, evaluate, run_tasks, show
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.perplexity import names_of
from uar_megatron.evaluation.tasks import choose

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("model_parallel")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def test_a_whole_evaluation_and_its_cache(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "cache"))
    with forgotten_afterwards():
        options = EvalOptions(
            checkpoint=run,
            tasks=("piqa",),
            data=data,
            limit=2,
            cache=tmp_path / "answers",
            output=tmp_path / "results.json",
            data_paths=(str(run.parent / "data"),),
        )
        found = evaluate(options)
        assert found is not None
        results, path = found
        assert json.loads(path.read_text()) == results
        assert results["run"] == "tiny"
        assert results["layout"]["ranks"] == 1
        assert "piqa (0-shot): acc" in show(results)
        assert "perplexity" in show(results)
        # What is in the cache is not asked again.
        monkeypatch.setattr(CheckpointModel, "score", None)
        options = dataclasses.replace(options, data_paths=())
        elsewhere = evaluate(dataclasses.replace(options, output=tmp_path / "cached.json"))
        again = evaluate(options)
        assert elsewhere is not None
        assert again is not None
        metrics = [r["tasks"]["piqa"]["metrics"] for r in (results, elsewhere[0])]
        assert metrics[0] == metrics[1]
        assert again[0]["tasks"] == results["tasks"]
        usage = elsewhere[0]["tasks"]["piqa"]["usage"]
        assert usage == {"tokens": 0, "requests": 4, "usage_of": 0}
        assert "k_eff unknown (over 0 of 4 requests" in show(elsewhere[0])
        assert again[0]["perplexity"] == results["perplexity"]  # those that were there are kept
        # Another routing has answers of its own.
        other = {"overrides": ("uar.budget.mode=mean",), "output": tmp_path / "other.json"}
        with pytest.raises(TypeError, match="not callable"):
            evaluate(EvalOptions(**{**vars(options), **other}))
        monkeypatch.setattr(CheckpointModel, "__init__", lambda *args: pytest.fail("loaded"))
        for changes in ({"limit": 3}, {"overrides": ("uar.budget.mode=mean",)}):
            with pytest.raises(ConfigError, match="of another evaluation"):
                evaluate(EvalOptions(**{**vars(options), **changes}))
        assert json.loads(path.read_text()) == again[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tasks": ()}, "neither tasks nor data"),
        ({"tasks": ("sciqq",)}, "did you mean 'sciq'"),
        ({"tasks": ("logiqa",), "data": None}, "logiqa: on no hub"),
        ({"data": Path("nothing")}, "piqa: nothing/piqa/validation.jsonl"),
        ({"shots": ("mmlu",)}, "TASK=NUMBER"),
        ({"shots": ("mmlu=²",)}, "TASK=NUMBER"),
        ({"cache": Path(__file__, "answers")}, "cache: cannot write to"),
        ({"shots": ("mmul=1",)}, "did you mean 'mmlu'"),
        ({"checkpoint": Path("nothing")}, "is no folder"),
        ({"data_paths": ("nothing",)}, "nothing.bin does not exist"),
        (
            {"data_paths": ("x",), "overrides": ("reset_position_ids=true",)},
            "reset_position_ids: t",
        ),
    ],
)
def test_refusals_before_the_model_is_loaded(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, why: str
) -> None:
    monkeypatch.setattr(CheckpointModel, "__init__", lambda *args: pytest.fail("loaded"))
    options = {"checkpoint": run, "tasks": ("piqa",), "data": data, "output": tmp_path / "r.json"}
    with pytest.raises(UARError, match=why):
        evaluate(EvalOptions(**{**options, **changes}))


class StandIn(contextlib.nullcontext[None]):
    """For a model."""

    rank = 0
    args = SimpleNamespace(padded_vocab_size=300)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def describe(self) -> dict[str, Any]:
        return {}


def test_what_is_done_is_kept(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of another vocabulary are refused before the tasks; results are saved one by one."""
    monkeypatch.setattr(command, "CheckpointModel", StandIn)
    monkeypatch.setattr(command, "run_tasks", lambda *args: {"piqa": {"shots": 0, "note": None}})
    prefix, output = str(run.parent / "data"), tmp_path / "r.json"
    asked: list[Any] = []

    def check(path: str, vocab_size: int | None = None) -> None:
        asked.append(vocab_size)
        if vocab_size is not None:
            raise DataError("another vocabulary")

    options = EvalOptions(run, tasks=("piqa",), data=data, data_paths=(prefix,), output=output)
    with monkeypatch.context() as patch:
        patch.setattr(command, "check_dataset", check)
        with pytest.raises(DataError, match="another vocabulary"):
            evaluate(options)
    assert asked == [None, 300]
    assert not output.exists()

    def measure(model: Any, path: str, *rest: Any) -> dict[str, Any]:
        return {"data": path} if "/a/" in path else pytest.fail("broken")

    monkeypatch.setattr(command, "check_dataset", lambda *args: None)
    monkeypatch.setattr(command, "perplexity", measure)
    paths = ("x/a/valid", "x/b/valid")
    with pytest.raises(pytest.fail.Exception, match="broken"):
        evaluate(dataclasses.replace(options, data_paths=paths))
    saved = json.loads(output.read_text())
    assert list(saved["tasks"]) == ["piqa"]
    assert list(saved["perplexity"]) == ["x/a/valid"]  # of two with one name
    options = dataclasses.replace(options, data_paths=("x",), output=tmp_path / "tasks.json")
    with pytest.raises(pytest.fail.Exception, match="broken"):
        evaluate(options)
    assert list(json.loads((tmp_path / "tasks.json").read_text())["tasks"]) == ["piqa"]


def test_data_that_cannot_be_read_and_faults_of_the_model(
    model: CheckpointModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_benchmarks(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = EvalOptions(Path("x"), data=tmp_path, limit=1)

    def run_piqa() -> None:
        run_tasks(model, choose(["piqa"], tmp_path), [], options)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointModel, "score", fail)
        with pytest.raises(RuntimeError):
            run_piqa()
        patch.setattr("datasets.load_dataset", fail)
        with pytest.raises(DataError, match=r"cannot use the data in .*: RuntimeError\n"):
            run_piqa()


PIQA = b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n'
ARC = (
    b'{"id": "%d", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, '
    b'"answerKey": "%c"}\n'
)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("piqa/validation", b"", "StopIteration"),
        ("piqa/validation", PIQA.replace(b"sol2", b"sol3"), "ValueError"),
        ("piqa/validation", PIQA + b'{"goal": "a", "so', "JSON"),
        ("piqa/validation", PIQA.replace(b"b", b"\xff\xfe"), "UnicodeDecodeError"),
        ("hellaswag/validation", b'{"ctx_a": "a", "ctx_b": "b", "label": "0"}\n', "KeyError"),
        ("arc_easy/test", ARC % (1, b"A") + ARC % (2, b"E"), "ValueError: 'E'"),
    ],
    ids=["empty", "no field", "truncated", "no UTF-8", "no column", "a later document"],
)
def test_bad_data(
    model: CheckpointModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: bytes,
    why: str,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"{file}.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    tasks = choose([path.parent.name], tmp_path, {"hellaswag": 0})
    with pytest.raises(DataError, match=f"{tasks[0].name}: lm-eval cannot use the data in .*{why}"):
        run_tasks(model, tasks, [], EvalOptions(Path("x"), data=tmp_path))


@pytest.mark.parametrize(
    ("name", "shots", "why"),
    [
        ("boolq", 4, "boolq: .*boolq/validation.jsonl has 4 examples for 4 shots\n  allowed: 5 or"),
        ("hellaswag", 10, "remedy:  --shots hellaswag=3"),
        ("mmlu", 3, "mmlu_virology: .*virology/dev.jsonl has 2 examples .*\n.*\n.*mmlu=2"),
    ],
)
def test_too_few_examples(
    model: CheckpointModel,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shots: int,
    why: str,
) -> None:
    """One more is needed where they are of the split that is evaluated."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "cache"))
    options = EvalOptions(Path("x"), data=data, limit=1)
    with pytest.raises(DataError, match=why) as error:
        run_tasks(model, choose([name], data, {name: shots}), [], options)
    allowed = int(str(error.value).rpartition("=")[2].split(",")[0])
    found = run_tasks(model, choose([name], data, {name: allowed}), [], options)
    assert found[name]["shots"] == allowed


def test_metrics_of_several_filters() -> None:
    metrics = {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2,
               "exact_match_stderr,strict-match": 0.01, "acc,none": 0.3, "acc_stderr,none": 0.02,
               "alias": "x", "sample_len": 7}  # fmt: skip
    named = command.named_metrics(metrics)
    assert named == {
        "exact_match,strict-match": 0.1,
        "exact_match,flexible-extract": 0.2,
        "exact_match_stderr,strict-match": 0.01,
        "acc": 0.3,
        "acc_stderr": 0.02,
    }
    task = {"group": None, "metrics": named, "shots": 5}
    head = {"run": "r", "iteration": 1, "policy": "uar", "perplexity": {}}
    shown = show({**head, "tasks": {"gsm8k": task}})
    assert "exact_match,strict-match 0.1000, exact_match,flexible-extract 0.2000, acc" in shown
    assert "stderr" not in shown


def test_names_of_data_sets() -> None:
    assert names_of(["a/x", "a/y"], {}) == {"x": "a/x", "y": "a/y"}
    assert names_of(["a/x", "b/x"], {}) == {"a/x": "a/x", "b/x": "b/x"}
    assert names_of(["b/x"], {"x": {"data": "a/x"}}) == {"b/x": "b/x"}
    assert names_of(["a/x"], {"x": {"data": "a/x"}}) == {"x": "a/x"}
