"""Start torchrun jobs from tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from uar_megatron.reporting.runlog import NoRecordError, read_run

TESTS = Path(__file__).parent
TINY = TESTS / "tiny.yaml"
TIMEOUT = 900
"""Seconds, on a machine that is busy with other things, after which a process hangs."""
UNSAVED = ("save=null", "load=null", "tensorboard_dir=null")
"""For trainings whose run log is all that is looked at. Megatron has the results of writing a
checkpoint collected by a process per rank, which imports torch for that: 4 s of processor time."""


def torchrun(nproc: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on ``nproc`` gloo ranks and return what it printed."""
    return subprocess.run(
        torchrun_command(nproc, *command),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def warm_torchrun(nproc: int, *command: str) -> subprocess.CompletedProcess[str]:
    """As :func:`torchrun`, without the start of the interpreters: see ``warm_torchrun.py``."""
    server = _warm_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"nproc": nproc, "command": command, "environment": environment()}
        server.stdin.write(json.dumps(request | {"output": f"{folder}/job"}) + "\n")
        server.stdin.flush()
        agent = int(server.stdout.readline())
        timer = threading.Timer(TIMEOUT, kill_tree, [agent])
        timer.start()
        code = int(server.stdout.readline())
        timer.cancel()
        printed = [Path(folder, f"job.{stream}").read_text() for stream in ("out", "err")]
    return subprocess.CompletedProcess(command, code, *printed)


@functools.cache
def _warm_server() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "warm_torchrun.py")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def torchrun_command(nproc: int, *command: str) -> list[str]:
    """The argument list of a single-node torchrun."""
    runner = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return [*runner, "--nproc_per_node", str(nproc), *command]


def environment() -> dict[str, str]:
    """This process's environment without what would make a child think it is a rank."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}


def kill_job(job: subprocess.Popen[Any]) -> None:
    """Kill torchrun and all that it has started: every rank leads a session of its own."""
    processes = kill_tree(job.pid)
    job.wait()
    psutil.wait_procs(processes)


def kill_tree(pid: int) -> list[psutil.Process]:
    """Send SIGKILL to a process and to all that it has started; return them."""
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


def train(nproc: int, run_dir: Path, *overrides: str) -> dict[int, float]:
    """Train the tiny model with our entry; return the loss of each step from its run log."""
    job = warm_torchrun(nproc, *train_arguments(nproc, run_dir, *overrides))
    assert job.returncode == 0, job.stderr[-6000:]
    return losses(run_dir)


def train_arguments(nproc: int, run_dir: Path, *overrides: str) -> list[str]:
    """Arguments after torchrun's own for the tiny model."""
    keys = (f"run.dir={run_dir}", f"launch.nproc_per_node={nproc}", *overrides)
    return ["-m", "uar_megatron.pretrain", "--config", str(TINY), *keys]


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step in a run log."""
    return {step.step: step.loss for step in read_run(run_dir / "run.jsonl").steps}


def steps_so_far(log: Path) -> list[int]:
    """The steps in the log of a run that has perhaps not written its first record yet."""
    try:
        return [step.step for step in read_run(log).steps]
    except NoRecordError:
        return []


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def train_stock(nproc: int, run_dir: Path, overrides: Sequence[str]) -> dict[int, float]:
    """Train the tiny model with the installed Megatron's routers; return the loss of each step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    output = run_dir / "losses.json"
    job = warm_torchrun(
        nproc,
        str(TESTS / "stock_pretrain.py"),
        str(TINY),
        str(output),
        *(f"run.dir={run_dir}", f"launch.nproc_per_node={nproc}", *overrides),
    )
    assert job.returncode == 0, job.stderr[-6000:]
    return {int(step): loss for step, loss in json.loads(output.read_text()).items()}
