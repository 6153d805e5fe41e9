"""``uar corpus``: build a corpus of many shards, on one node or on many, and check it."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Build a corpus of many sources and shards; resumable, on one node or on many.",
)

_Recipe = Annotated[Path, typer.Argument(help="recipe YAML file", show_default=False)]
_Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted overrides: root=/data seed=1 …")
]
_Out = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="of the corpus; every node sees it",
        show_default=False,
    ),
]  # fmt: skip
_Workers = Annotated[
    int | None, typer.Option(min=1, help="processes", show_default="one per usable CPU")
]
_Progress = Annotated[bool, typer.Option(help="show a bar where stderr is a terminal")]


@app.command()
def build(
    recipe: _Recipe,
    output: _Out,
    overrides: _Overrides = None,
    workers: _Workers = None,
    progress: _Progress = True,
) -> None:
    """Tokenize and merge on this node. Given again after a kill, it goes on."""
    from uar_megatron.data.pipeline.manifest import build_corpus
    from uar_megatron.data.pipeline.plan import open_plan

    plan = open_plan(_recipe(recipe, overrides), output)
    _report(build_corpus(plan, output, _usable(workers), progress), output)


@app.command()
def tokenize(
    recipe: _Recipe,
    output: _Out,
    overrides: _Overrides = None,
    node: Annotated[int, typer.Option(min=0, help="this one, e.g. $SLURM_NODEID")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="how many, e.g. $SLURM_NNODES")] = 1,
    workers: _Workers = None,
    progress: _Progress = True,
) -> None:
    """Tokenize this node's share of the shards; those that are finished are skipped.

    Start it once for every --node from 0 to --nodes - 1, in any order or together.
    """
    from uar_megatron.data.pipeline.plan import open_plan
    from uar_megatron.data.pipeline.share import tokenize_share

    plan = open_plan(_recipe(recipe, overrides), output)
    done = tokenize_share(plan, output, node, nodes, _usable(workers), progress)
    typer.echo(f"{output}: node {node} of {nodes}: {done} shards tokenized now")


@app.command()
def merge(
    recipe: _Recipe,
    output: _Out,
    overrides: _Overrides = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARD", help="do without it; may be given several times"),
    ] = None,
    keep_parts: Annotated[
        bool, typer.Option("--keep-parts", help="do not remove the nodes' work")
    ] = False,
    workers: _Workers = None,
) -> None:
    """Join what the nodes tokenized: datasets, manifest.json, blend.json and data.yaml."""
    from uar_megatron.data.pipeline.manifest import merge_corpus
    from uar_megatron.data.pipeline.plan import follow_plan

    plan = follow_plan(_recipe(recipe, overrides), output)
    manifest = merge_corpus(plan, output, leave_out or [], keep_parts, _usable(workers))
    _report(manifest, output)


@app.command()
def verify(
    recipe: _Recipe,
    output: _Out,
    overrides: _Overrides = None,
) -> None:
    """Compare a corpus with its checksums and recipe, and read it as Megatron does."""
    from uar_megatron.data.pipeline.manifest import verify_corpus
    from uar_megatron.data.pipeline.plan import follow_plan

    follow_plan(_recipe(recipe, overrides), output)
    _report(verify_corpus(output), output)
    typer.echo(f"{output}: verified")


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    from uar_megatron.data.pipeline.recipe import load_recipe

    # A process is a core's worth of work; threads of the library below it would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_recipe(path, overrides or [])


def _usable(workers: int | None) -> int:
    return workers or len(os.sched_getaffinity(0))


def _report(manifest: dict[str, Any], output: Path) -> None:
    for name, source in manifest["sources"].items():
        for split, volumes in source["datasets"].items():
            documents, tokens = (sum(v[key] for v in volumes) for key in ("documents", "tokens"))
            share = f", {100 * source['share']:.2f} % of the blend" if split == "train" else ""
            if volumes:
                typer.echo(f"{name} {split}: {documents:,} documents, {tokens:,} tokens{share}")
    typer.echo(f"{output}: complete; train with its blend.json or data.yaml")
    for warning in manifest["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if manifest["left_out"]:
        typer.echo(f"warning: left out: {', '.join(manifest['left_out'])}", err=True)
    if manifest["tokenizer"]["note"]:
        typer.echo(f"note: {manifest['tokenizer']['note']}", err=True)
