"""The ``uar`` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uar_megatron.data.cli import prepare
from uar_megatron.errors import UARError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Uncertainty-aware routing for Megatron-Core.",
)
app.command(name="data")(prepare)


@app.callback()
def _root() -> None:
    """Keep sub-commands even while there are few."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="experiment YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides: lr=1e-3 uar.budget.alpha=0.5 …")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved configuration and stop")
    ] = False,
) -> None:
    """Train on this machine: checks the configuration, then starts torchrun.

    The number of processes is ``launch.nproc_per_node``. For several nodes start torchrun yourself
    with ``-m uar_megatron.pretrain --config FILE``.
    """
    from uar_megatron.experiment import load_experiment
    from uar_megatron.pretrain import check_outputs, describe, validate

    experiment = load_experiment(config, overrides or [])
    if dry_run:
        print(describe(experiment))
        return
    if experiment.launch.nnodes != 1:
        raise UARError(
            f"launch.nnodes: {experiment.launch.nnodes} nodes, but `uar train` starts one\n"
            "  remedy:  run torchrun on every node with -m uar_megatron.pretrain --config …"
        )
    validate(experiment, experiment.launch.nproc_per_node)
    check_outputs(experiment)
    # One thread per rank unless told otherwise: torchrun would set it too, but with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(experiment.launch.nproc_per_node)),
        *("-m", "uar_megatron.pretrain", "--config", str(config), *(overrides or [])),
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run: has run.jsonl")],
    manifest: Annotated[
        Path | None, typer.Option(help="manifest.json of the corpus, for the unigram comparison")
    ] = None,
) -> None:
    """Write the figures and the summary of a run into its folder, from its log alone."""
    from uar_megatron.reporting.plots import write_figures
    from uar_megatron.reporting.runlog import RUN_LOG, read_run
    from uar_megatron.reporting.summary import write_summary

    run = read_run(run_dir / RUN_LOG)
    print(write_summary(run, run_dir, manifest))
    for path in write_figures(run, run_dir / "figures"):
        print(path)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="experiment YAML file to check")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides for the experiment")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say whether training can start here and what is missing; exit code 1 if it cannot start."""
    from uar_megatron.doctor import can_train, examine, report

    checks = examine(config, overrides or [])
    if as_json:
        print(json.dumps(report(checks), indent=1))
    else:
        table = Table("", "check", "found", "remedy")
        marks = {"ok": "[green]✓", "off": "[yellow]–", "error": "[red]✗"}
        for check in checks:
            table.add_row(
                marks[check.status], escape(check.name), escape(check.detail), escape(check.remedy)
            )
        Console().print(table)
    if not can_train(checks):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's error is one message and exit code 2, never a traceback."""
    try:
        app()
    except UARError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
