"""The command that prepares data: ``uar data`` and ``scripts/prepare_data.py``."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Never

import typer

from uar_megatron.errors import DataError, UARError


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Text files (.txt .md .rst ...), JSON lines (.jsonl .ndjson .json), each also as "
            ".gz or .zst; folders (searched recursively) and quoted glob patterns.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PREFIX",
            help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="KIND:PATH",
            help="hf:PATH (tokenizers JSON file or Hugging Face folder), tiktoken:PATH (Megatron's "
            "JSON form), sentencepiece:PATH, or bytes; gigatoken:PATH is hf:PATH, far faster.",
            show_default=False,
        ),
    ],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Tokenizing processes.", show_default="one per usable CPU"),
    ] = None,
    append_eod: Annotated[
        bool, typer.Option(help="End every document with the end-of-document id.")
    ] = True,
    json_field: Annotated[
        str, typer.Option(help="Field of each JSON line that holds the text.")
    ] = "text",
    separator: Annotated[
        str | None,
        typer.Option(
            help=r"Split each text file into documents at this string; \n and \t are understood.",
            show_default="a file is one document",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is already there.")
    ] = False,
    progress: Annotated[
        bool, typer.Option(help="Show a progress bar where stderr is a terminal.")
    ] = True,
) -> None:
    """Turn text into a Megatron dataset (.bin/.idx), and verify it by reading it back.

    Example: prepare_data.py 'corpus/*.jsonl.zst' -o data/train -t hf:tokenizer/ --workers 16
    """
    from uar_megatron.data.build import build_dataset

    if Path(f"{output}.idx").exists() and not overwrite:
        raise DataError(f"{output}.idx is already there\n  remedy:  pass --overwrite to replace it")
    if separator is not None:
        separator = separator.replace(r"\n", "\n").replace(r"\t", "\t")
    summary = build_dataset(
        inputs,
        output,
        tokenizer,
        workers=workers or len(os.sched_getaffinity(0)),
        append_eod=append_eod,
        json_field=json_field,
        separator=separator,
        progress=progress,
    )
    typer.echo(
        f"{summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens "
        f"({summary.dtype}, {summary.text_bytes / summary.tokens:.2f} bytes of text per token), "
        f"{summary.empty_documents:,} empty documents skipped, {summary.seconds:.1f} s; verified"
    )
    typer.echo("train with: " + " ".join(summary.megatron_args))
    if summary.note:
        typer.echo(f"note: {summary.note}", err=True)


def run_command(command: Callable[..., Any]) -> None:
    """Run a function as a command-line program; a user's error is a message and exit code 2.

    SIGTERM (a batch scheduler's way to say stop) unwinds like Ctrl-C, so temporary files go.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        typer.run(command)
    except UARError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _on_sigterm(signum: int, frame: object) -> Never:
    sys.exit(128 + signum)
