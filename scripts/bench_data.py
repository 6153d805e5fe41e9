"""Tokenizing throughput per core: `uar corpus` beside Megatron-LM's own preprocess_data.py.

Both read the same JSON lines with the same tokenizer and must write the same tokens. Counted is
processor time of the whole process tree with one worker, as the difference between a large and a
small input, so that starting up does not count. Megatron's tool is not in its wheel: take
tools/preprocess_data.py of Megatron-LM at the installed version.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from uar_megatron.data.cli import run_command
from uar_megatron.data.files import sha256_of
from uar_megatron.data.readers import DocumentReader
from uar_megatron.errors import DataError

MEGATRON = "preprocess_data.py"


@dataclass(frozen=True)
class Sample:
    """Text as a file of JSON lines, and its size in bytes of UTF-8."""

    path: Path
    text_bytes: int


def main(
    text: Annotated[list[str], typer.Argument(help="text or JSON lines, as for `uar data`")],
    tokenizer: Annotated[Path, typer.Option(help="folder of a Hugging Face tokenizer")],
    tool: Annotated[Path, typer.Option(help="Megatron-LM's tools/preprocess_data.py")],
    megabytes: Annotated[float, typer.Option(help="of text in the large input")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="the least time of so many counts")] = 3,
) -> None:
    """Measure tokenizing per core against Megatron-LM's own tool, side by side."""
    kinds = [MEGATRON, "hf", *(["gigatoken"] if find_spec("gigatoken") else [])]
    with tempfile.TemporaryDirectory() as folder:
        large = write_sample(text, Path(folder) / "large.jsonl", megabytes * 1e6)
        small = write_sample(text, Path(folder) / "small.jsonl", megabytes * 1e6 / 8)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds):
            for kind in kinds:
                out = Path(folder) / f"{number}_{kind}"
                whole = measure(kind, large, tokenizer, tool, out / "large")
                seconds[kind].append(whole - measure(kind, small, tokenizer, tool, out / "small"))
        digests = {k: sha256_of(output_of(k, Path(folder) / f"0_{k}" / "large")) for k in kinds}
    if len(set(digests.values())) != 1:
        raise DataError(f"they do not write the same tokens: {digests}")
    counted = (large.text_bytes - small.text_bytes) / 1e6
    report({kind: counted / min(times) for kind, times in seconds.items()})
    typer.echo(f"the same tokens from {large.text_bytes:,} bytes of text: {digests[MEGATRON]}")


def write_sample(inputs: list[str], path: Path, size: float) -> Sample:
    """Write the first documents, about ``size`` bytes of text; begin again where they end."""
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            before = written
            for document in DocumentReader(inputs):
                if document.strip():
                    stream.write(json.dumps({"text": document}) + "\n")
                    written += len(document.encode("utf-8"))
                if written >= size:
                    break
            if written == before:
                raise DataError("the text is empty")
    return Sample(path, written)


def measure(kind: str, sample: Sample, tokenizer: Path, tool: Path, out: Path) -> float:
    """Processor seconds of a process and all below it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == MEGATRON:
        command = [str(tool), "--input", str(sample.path), "--output-prefix", str(out)]
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
        command += ["--append-eod", "--workers", "1", "--log-interval", "1000000"]
    else:
        source = {"name": "text", "paths": [str(sample.path)]}
        recipe = {"tokenizer": f"{kind}:{tokenizer}", "sources": [source]}
        path = out.with_suffix(".yaml")
        path.write_text(json.dumps(recipe))  # JSON is YAML
        command = ["-m", "uar_megatron.cli", "corpus", "build", str(path), "-o", str(out)]
        command += ["--workers", "1"]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            raise DataError(f"{kind} failed:\n{printed.read().decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def output_of(kind: str, out: Path) -> Path:
    """The token file that a command wrote."""
    return Path(f"{out}_text_document.bin") if kind == MEGATRON else out / "text.bin"


def report(speeds: dict[str, float]) -> None:
    """Print megabytes per processor second, and how many times Megatron's."""
    table = Table("", "MB/s per core", "× Megatron's tool")
    for kind, speed in speeds.items():
        table.add_row(kind, f"{speed:.2f}", f"{speed / speeds[MEGATRON]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
