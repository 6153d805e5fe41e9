"""What ``uar sweep`` and ``uar table`` do."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import Experiment, save_resolved
from uar_megatron.launching.slurm import refuse_queued
from uar_megatron.sweep.grid import Point, Sweep, expand, load_sweep, save_manifest
from uar_megatron.sweep.progress import Progress
from uar_megatron.sweep.runner import TRAIN_LOG, Command, Runner, log_tail, train_command
from uar_megatron.sweep.state import read_state, refuse_changed

Check = Callable[[Mapping[str, Experiment]], None]
"""Refuses experiments, by name, that cannot be trained."""


def run_sweep(
    grid: Path,
    check: Check,
    *,
    jobs: int = 1,
    retries: int = 2,
    timeout: float | None = None,
    command: Command = train_command,
) -> int:
    """Expand a sweep, check what is left of it, run it; return the exit code.

    Args:
        grid: the sweep file.
        check: called before the first point starts, with one unfinished point of each row.
        jobs: points at a time.
        retries: attempts of a point after its first.
        timeout: seconds for one attempt; None for no limit.
        command: trains a point, given its configuration file.

    Raises:
        UARError: the sweep or one of its points cannot be used.
    """
    sweep, _ = prepare(grid, check)
    refuse_queued(sweep.folder)
    save(sweep)
    runner = Runner(sweep.points, jobs=jobs, retries=retries, timeout=timeout, command=command)
    runner.run(Progress(Console()))
    return _report(runner)


def prepare(grid: Path, check: Check) -> tuple[Sweep, list[Point]]:
    """Expand a sweep and check it; return it and the points that are not finished.

    Raises:
        UARError: the sweep or one of its points cannot be used.
    """
    sweep = expand(grid)
    for point in sweep.points:
        refuse_changed(point)
    left = [point for point in sweep.points if not read_state(point).finished]
    rows: dict[str, Point] = {}
    for point in left:
        rows.setdefault(point.row, point)
    check({f"point {p.name!r}": p.experiment for p in rows.values()})
    return sweep, left


def save(sweep: Sweep) -> None:
    """Write the configuration of every point, and the list of points.

    Raises:
        ConfigError: the sweep's folder cannot be written to.
    """
    try:
        for point in sweep.points:
            save_resolved(point.experiment, point.folder)
        save_manifest(sweep)
    except OSError as error:
        raise ConfigError(
            "sweep.dir",
            f"cannot write to {sweep.folder}: {error.strerror}",
            remedy="choose another dir, or make the folder writable",
        ) from error


def make_table(
    source: Path,
    form: str = "markdown",
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    bench: Path | None = None,
    layout: str | None = None,
) -> str:
    """Return the table of a sweep.

    Args:
        source: the sweep file, or the folder of a sweep.
        form: ``markdown``, ``csv`` or ``latex``.
        baseline: instead of the sweep's own.
        metrics: what to show; None for all.
        bench: JSON file of step times over the baseline's, by row, with standard errors.
        layout: a table of the paper, ``table2`` or ``table3``, whose rows and columns to show the
            sweep in, beside the paper's numbers; it has baselines and metrics of its own.

    Raises:
        UARError: there is no such sweep, row or metric; or pandas is not installed.
    """
    try:
        from uar_megatron.sweep import layout as layouts
        from uar_megatron.sweep import measure, render
    except ModuleNotFoundError as error:
        raise UARError(
            f"tables need {error.name}\n  remedy:  pip install 'uar-megatron[plots]'"
        ) from error
    if layout is not None:
        if baseline or metrics or bench:
            raise ConfigError(
                "--layout",
                "given together with --baseline, --metric or --bench",
                remedy="a layout has its own; leave the others out",
            )
        found = layouts.lay_beside(load_sweep(source), layout)
        if form == "csv":
            print("\n".join(layouts.notes(found)), file=sys.stderr)
            return layouts.numbers(found).to_csv(index=False).rstrip("\n")
        cells = layouts.cells(found)
        return render.latex(cells) if form == "latex" else render.markdown(cells)
    results = measure.compare(load_sweep(source), metrics or tuple(measure.METRICS), baseline)
    if bench is not None:
        results = measure.add_ratios(results, bench)
    if form == "csv":
        # A CSV file has no place for notes.
        print("\n".join(render.notes(results)), file=sys.stderr)
        return render.csv(results)
    cells = render.lay_out(results)
    return render.latex(cells) if form == "latex" else render.markdown(cells)


def _report(runner: Runner) -> int:
    """Say what failed and why; return the exit code."""
    failed = [job for job in runner.jobs if job.state == "failed"]
    for job in failed:
        log = job.point.folder / TRAIN_LOG
        print(f"\n{job.point.name} failed {job.trouble}\n  {log} ends with:", file=sys.stderr)
        print(textwrap.indent(log_tail(log), "    "), file=sys.stderr)
    if runner.stopped_by is not None:
        print("stopped; start the sweep again to go on", file=sys.stderr)
        return 128 + runner.stopped_by
    if failed:
        names = ", ".join(job.point.name for job in failed)
        print(f"\n{len(failed)} of {len(runner.jobs)} points failed: {names}", file=sys.stderr)
    return 1 if failed else 0
