"""What ``uar launch`` does."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import (
    CONFIG,
    Experiment,
    changes_of_run,
    check_writable,
    load_experiment,
    save_resolved,
)
from uar_megatron.launching.scripts import script_dir
from uar_megatron.launching.slurm import (
    Batch,
    SlurmOptions,
    batch_script,
    refuse_queued,
    refuse_submission,
    submit,
)

Check = Callable[[Mapping[str, Experiment]], None]
"""Refuses experiments, by name, that cannot be trained."""


def launch_slurm(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    check: Check,
    options: SlurmOptions,
    *,
    dry_run: bool,
) -> str:
    """Check an experiment, submit it, and say so; or return the script alone.

    Raises:
        UARError: the experiment or an option cannot be used, its folder holds another run, or
            SLURM refuses.
    """
    experiment = load_experiment(config, [*overrides, f"launch.nnodes={nodes}"])
    folder = Path(experiment.run.dir)
    _refuse_another_run(experiment)
    text = batch_script(Batch(experiment.run.name, folder, [experiment]), options)
    check({str(config): experiment})
    if dry_run:
        return text
    refuse_submission(folder)  # its job may be reading config.yaml
    check_writable("run.dir", folder)
    save_resolved(experiment, folder)
    job = submit(folder, text)
    return f"job {job} submitted: {folder / 'slurm.sbatch'}"


def torchrun_command(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    check: Check,
    rendezvous: str | None,
    max_restarts: int,
) -> list[str]:
    """Check an experiment; return the command that starts it on this node.

    Raises:
        UARError: the experiment cannot be used, its folder holds another run, or SLURM is about to
            train it.
    """
    overrides = [*overrides, f"launch.nnodes={nodes}"]
    experiment = load_experiment(config, overrides)
    _refuse_another_run(experiment)
    check({str(config): experiment})
    refuse_queued(Path(experiment.run.dir))
    command = [str(script_dir() / "torchrun.sh")]
    if nodes > 1:
        command += ["--nodes", str(nodes), "--rendezvous", rendezvous or "HOST:29500"]
        command += ["--id", experiment.run.name]
    command += ["--nproc", str(experiment.launch.nproc_per_node)]
    return [*command, "--max-restarts", str(max_restarts), str(config), *overrides]


def start(command: Sequence[str]) -> None:
    """Become the training of this node, with this interpreter.

    Raises:
        UARError: there is no bash.
    """
    sys.stdout.flush()
    os.environ["PYTHON"] = sys.executable
    try:
        os.execvp("bash", ["bash", *command])
    except OSError as error:
        raise UARError(f"bash: {error.strerror}; it runs {command[0]}") from error


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    return f"PYTHON={shlex.quote(sys.executable)} bash {shlex.join(command)}"


def _refuse_another_run(experiment: Experiment) -> None:
    """Refuse to go on with a run under another configuration; on other nodes is no other run."""
    folder = Path(experiment.run.dir)
    changed = changes_of_run(experiment, folder, ["launch.nnodes", "launch.nproc_per_node"])
    if changed:
        raise ConfigError(
            "run.dir",
            f"{folder} holds a run with another configuration: {'; '.join(changed)}",
            remedy="give this one another folder (run.dir=…, or run.name=… where the folder "
            f"follows it); to change that run on purpose, edit {folder / CONFIG} first",
        )
