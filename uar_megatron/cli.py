"""The ``uar`` command."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uar_megatron.data.cli import prepare
from uar_megatron.data.pipeline.cli import app as corpus_app
from uar_megatron.errors import UARError
from uar_megatron.evaluation.cli import evaluate, lm_eval, write_tasks
from uar_megatron.evaluation.generate_command import generate_command
from uar_megatron.export.cli import export_command, import_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Uncertainty-aware routing for Megatron-Core.",
)
app.command(name="data")(prepare)
app.add_typer(corpus_app, name="corpus")
app.command(name="export")(export_command)
app.command(name="import")(import_command)
app.command(name="generate")(generate_command)
app.command(name="eval")(evaluate)
app.command(name="tasks")(write_tasks)
app.command(
    name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(lm_eval)


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

    The number of processes is ``launch.nproc_per_node``. For several nodes see ``uar launch``.
    """
    from uar_megatron.experiment import load_experiment
    from uar_megatron.pretrain import check_outputs, describe, validate

    experiment = load_experiment(config, overrides or [])
    if dry_run:
        print(describe(experiment))
        return
    nodes = experiment.launch.nnodes
    if nodes != 1:
        raise UARError(
            f"launch.nnodes: {nodes} nodes, but `uar train` starts one\n"
            f"  remedy:  uar launch {config} --nodes {nodes}, with --slurm where there is SLURM"
        )
    validate(experiment, experiment.launch.nproc_per_node)
    check_outputs(experiment)
    # One thread per rank unless told otherwise: torchrun would set it too, but with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # On SIGTERM ranks save a checkpoint; torchrun would kill them after 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(experiment.launch.nproc_per_node)),
        *("-m", "uar_megatron.pretrain", "--config", str(config), *(overrides or [])),
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


# Options of the commands that submit jobs.
Slurm = Annotated[bool, typer.Option("--slurm", help="submit to SLURM")]
Time = Annotated[str | None, typer.Option(help="SLURM: limit of one start of the job")]
Partition = Annotated[str | None, typer.Option(help="SLURM: partition")]
Account = Annotated[str | None, typer.Option(help="SLURM: account")]
Container = Annotated[str | None, typer.Option(help="SLURM: image for pyxis/enroot")]
Mounts = Annotated[str | None, typer.Option(help="SLURM: SRC:DST,… for the container")]
MaxAttempts = Annotated[
    int, typer.Option(min=1, help="SLURM: starts in a row without a new checkpoint")
]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="SLURM: any option of sbatch; may be given several times")
]


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="experiment YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides for the experiment")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print script or command and stop")
    ] = False,
    rendezvous: Annotated[
        str | None, typer.Option(help="HOST:PORT on one of the nodes: be one of them, now")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="torchrun: restarts after a rank has died")
    ] = 3,
    slurm: Slurm = False,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    container: Container = None,
    mounts: Mounts = None,
    max_attempts: MaxAttempts = 3,
    sbatch: Sbatch = None,
) -> None:
    """Train on several nodes: checks the configuration, then submits it or starts torchrun.

    Without --slurm: on one node torchrun starts at once. For several the command for each of them
    is printed; it starts there with --rendezvous.
    """
    from uar_megatron.launching import command
    from uar_megatron.launching.slurm import SlurmOptions
    from uar_megatron.precheck import check_experiments

    if slurm:
        options = SlurmOptions(
            time, partition, account, container, mounts, max_attempts, sbatch or ()
        )
        check = functools.partial(check_experiments, is_elsewhere=True)
        print(command.launch_slurm(config, overrides or [], nodes, check, options, dry_run=dry_run))
        return
    is_here = nodes == 1 or rendezvous is not None
    check = functools.partial(check_experiments, is_elsewhere=dry_run or not is_here)
    words = command.torchrun_command(
        config, overrides or [], nodes, check, rendezvous, max_restarts
    )
    if is_here and not dry_run:
        command.start(words)
    print(command.shown(words))
    if nodes > 1:
        print(f"# the same on each of the {nodes} nodes; HOST is one of them")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or run logs")],
    output: Annotated[
        Path | None, typer.Option(help="the page; figures and summary go next to it")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="manifest.json of the corpus, for the unigram comparison")
    ] = None,
) -> None:
    """Write page, figures and summary of one or several runs, from their logs alone.

    One run: RUN/report.html, summary.json, summary.md, figures/. Several: comparison.html and so
    on, in the first one's folder.
    """
    from uar_megatron.reporting.report import write_report

    written = write_report(runs, output, manifest)
    print(written.text)
    for line in written.lines:
        print(line)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="folder of a run, or its log")],
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print what is there and stop")] = False,
) -> None:
    """Show a running job in the terminal until it ends or Ctrl-C."""
    from uar_megatron.reporting.watch import watch_run

    watch_run(run, interval, once)


log_app = typer.Typer(no_args_is_help=True, help="Take a run log elsewhere.")
app.add_typer(log_app, name="log")


@log_app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a run, or its log")],
    form: Annotated[
        Literal["csv", "parquet"], typer.Option("--format", help="of the files")
    ] = "csv",
    output: Annotated[Path | None, typer.Option(help="folder; RUN/export if not given")] = None,
) -> None:
    """Write tables of steps, layers, validations, observations and histograms, all there are."""
    from uar_megatron.reporting.export import export_run

    for path in export_run(run, form, output):
        print(path)


@log_app.command()
def panels(
    run: Annotated[Path, typer.Argument(help="folder of a run, or its log")],
    project: Annotated[str | None, typer.Option(help="wandb project; saves a workspace")] = None,
    entity: Annotated[str | None, typer.Option(help="wandb entity")] = None,
) -> None:
    """Print the report's panels as wandb metrics; with --project, save them as a workspace."""
    from uar_megatron.reporting.panels import panels_of, save_workspace
    from uar_megatron.reporting.view import load_views

    found = panels_of(load_views([run])[0])
    if project is None:
        print(json.dumps(found, indent=1))
    else:
        print(save_workspace(found, project, entity))


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="sweep YAML file")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="points at a time; 1, with --slurm no limit")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="attempts of a point after its first")] = 2,
    timeout: Annotated[
        float | None, typer.Option(help="minutes after which an attempt is stopped and retried")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="with --slurm: print the script and stop")
    ] = False,
    slurm: Slurm = False,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    container: Container = None,
    mounts: Mounts = None,
    max_attempts: MaxAttempts = 3,
    sbatch: Sbatch = None,
) -> None:
    """Run every point of a sweep on this machine; started again, do what is left.

    Exit code 1 if a point failed for good. With --slurm the points that are left become one job
    array, which requeues itself and gives up as --max-attempts says.
    """
    from uar_megatron.precheck import check_experiments
    from uar_megatron.sweep.command import run_sweep

    if slurm:
        from uar_megatron.launching.slurm import SlurmOptions
        from uar_megatron.sweep.slurm import submit_sweep

        options = SlurmOptions(
            time, partition, account, container, mounts, max_attempts, sbatch or ()
        )
        check = functools.partial(check_experiments, is_elsewhere=True)
        print(submit_sweep(grid, check, options, at_a_time=jobs, dry_run=dry_run))
        return
    if dry_run:
        raise UARError("--dry-run: prints the script of --slurm, which is not asked for")
    seconds = None if timeout is None else timeout * 60
    code = run_sweep(grid, check_experiments, jobs=jobs or 1, retries=retries, timeout=seconds)
    raise typer.Exit(code)


@app.command()
def table(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="sweep YAML file, or the folder of a sweep; or evaluations: files that `uar eval` "
            "has written, or runs that have them"
        ),
    ],
    form: Annotated[
        Literal["markdown", "csv", "latex"], typer.Option("--format", help="of the output")
    ] = "markdown",
    baseline: Annotated[
        str | None, typer.Option(help="row to compare with, instead of the sweep's own")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="show only this; may be given several times")
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="JSON file {row: [step time over the baseline's, standard error]}"),
    ] = None,
    layout: Annotated[
        Literal["table1", "table2", "table3"] | None,
        typer.Option(help="the paper's rows and columns, its numbers beside the sweep's"),
    ] = None,
) -> None:
    """Compare the points of a sweep: mean ± standard error over seeds, paired differences.

    Of evaluations: the layout of the paper's Table 1, a row for each run name.
    """
    from uar_megatron.evaluation.results import is_results
    from uar_megatron.sweep.command import make_table

    if layout == "table1" or (layout is None and all(map(is_results, sources))):
        from uar_megatron.evaluation.table1 import make_table1

        if baseline or metric or bench:
            raise UARError("table: --baseline, --metric and --bench are for sweeps")
        print(make_table1(sources, form))
        return
    if len(sources) > 1:
        raise UARError("table: one sweep at a time, or evaluations alone")
    print(make_table(sources[0], form, baseline, metric, bench, layout))


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


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="experiment YAML file")],
    gpus: Annotated[int, typer.Option(help="GPUs of the job")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides for the experiment")
    ] = None,
    gpu: Annotated[str, typer.Option(help="kind of GPU: h800, h100, a100 …")] = "h800",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node")] = 8,
    mfu: Annotated[
        float, typer.Option(help="part of the peak that matrix products reach (assumed)")
    ] = 0.35,
    nvlink_gbs: Annotated[
        float | None, typer.Option(help="GB/s per GPU and direction within a node")
    ] = None,
    network_gbs: Annotated[
        float | None, typer.Option(help="GB/s per GPU and direction between nodes")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(help="run log (or its folder) whose expert loads are replayed")
    ] = None,
    dirichlet: Annotated[
        float | None, typer.Option(help="concentration of Dirichlet expert loads; even without")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="token budget; that of train_iters without")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say what a training will need: memory, traffic and time, without a GPU."""
    from uar_megatron.experiment import load_experiment
    from uar_megatron.planner import job_of
    from uar_megatron.planning.hardware import hardware
    from uar_megatron.planning.plan import plan as make_plan
    from uar_megatron.planning.tables import print_plan

    kind = hardware(gpu, nvlink_gbs, network_gbs)
    job = job_of(
        load_experiment(config, overrides or []),
        gpus,
        kind,
        gpus_per_node=gpus_per_node,
        mfu=mfu,
        tokens=tokens,
        load=load,
        concentration=dirichlet,
    )
    found = make_plan(job)
    if as_json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        print_plan(found, Console())


def main() -> None:
    """Run the command; a user's error is one message and exit code 2, never a traceback."""
    # As for the ranks, which are started by `python -m`: a policy may lie in the current folder.
    sys.path.insert(0, "")
    try:
        app()
    except UARError as error:
        if "WORLD_SIZE" in os.environ:  # one rank of `uar eval --nproc`
            from uar_megatron.pretrain import fail

            fail(error)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
