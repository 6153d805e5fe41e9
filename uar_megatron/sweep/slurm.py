"""``uar sweep --slurm``: what is left of a sweep as one job array."""

from __future__ import annotations

import os
from pathlib import Path

from uar_megatron.errors import UARError
from uar_megatron.launching.slurm import (
    Batch,
    SlurmOptions,
    batch_script,
    refuse_submission,
    submit,
)
from uar_megatron.sweep.command import Check, prepare, save
from uar_megatron.sweep.grid import Point
from uar_megatron.sweep.state import RUN, take_lock


def submit_sweep(
    grid: Path, check: Check, options: SlurmOptions, *, at_a_time: int | None, dry_run: bool
) -> str:
    """Expand a sweep, check what is left of it, submit that; return what there is to say.

    Args:
        grid: the sweep file.
        check: called before anything is written, with one unfinished point of each row.
        options: of the job.
        at_a_time: points; None for as many as SLURM has room for.
        dry_run: return the script, with the command that would submit it, and write nothing.

    Raises:
        UARError: the sweep or one of its points cannot be used, or SLURM refuses.
    """
    sweep, left = prepare(grid, check)
    if not left:
        return f"all {len(sweep.points)} points are finished"
    batch = Batch(
        sweep.folder.name,
        sweep.folder,
        [point.experiment for point in left],
        is_array=True,
        at_a_time=at_a_time,
    )
    text = batch_script(batch, options)
    script = sweep.folder / "slurm.sbatch"
    if dry_run:
        return f"{text}\n# submitted with: sbatch {script}"
    refuse_submission(sweep.folder)
    for point in left:
        _refuse_running(point)
    save(sweep)
    job = submit(sweep.folder, text)
    return f"job array {job} submitted: {len(left)} of {len(sweep.points)} points, {script}"


def _refuse_running(point: Point) -> None:
    """Refuse a point that a sweep on this machine is at."""
    if not (point.folder / RUN).exists():
        return
    try:
        lock = take_lock(point.folder, RUN)
    except UARError:
        return  # no locks here, so no such sweep either
    if lock is None:
        raise UARError(
            f"point {point.name!r} is being trained on this machine\n"
            "  remedy:  wait for that sweep, or stop it with Ctrl-C"
        )
    os.close(lock)
