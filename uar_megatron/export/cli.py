"""``uar export`` and ``uar import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="folder of a run, of its checkpoints, or one iter_… folder")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to make")],
    architecture: Annotated[
        str, typer.Option(help="uar: with its own modelling files; or a stock one: mixtral, …")
    ] = "uar",
    freeze_k: Annotated[
        int | None, typer.Option(help="stock architectures: give every token this many experts")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder or file of the tokenizer, if it has moved")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="resolved configuration, if none lies beside it")
    ] = None,
) -> None:
    """Write a checkpoint as a HuggingFace model, which routes as it was trained to.

    Load it with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).
    """
    from uar_megatron.errors import ConfigError
    from uar_megatron.evaluation.quiet import quiet_libraries
    from uar_megatron.export.source import read_checkpoint
    from uar_megatron.export.stock import export_stock
    from uar_megatron.export.write import export_model

    quiet_libraries()
    source = read_checkpoint(checkpoint, config)
    if architecture == "uar":
        if freeze_k is not None:
            raise ConfigError(
                "freeze_k",
                f"{freeze_k} with the architecture uar, which can give tokens their own k",
                remedy="remove --freeze-k, or name a stock --architecture",
            )
        found = export_model(source, output, tokenizer)
    else:
        found = export_stock(source, output, architecture, freeze_k, tokenizer)
    for sentence in found:
        print(f"note: {sentence}")
    print(output)


def import_command(
    folder: Annotated[Path, typer.Argument(help="what `uar export` wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of checkpoints to make")],
) -> None:
    """Write an exported model as a Megatron checkpoint, to be loaded with load=FOLDER."""
    from uar_megatron.evaluation.quiet import quiet_libraries
    from uar_megatron.export.back import import_model

    quiet_libraries()
    import_model(folder, output)
    print(output)
