"""torchrun for many small jobs: its ranks are forked from a process that has imported everything.

A rank of a test lives for seconds, and five CPU seconds of them are imports of torch and Megatron.
Here they are paid once. Each job still has torch's own elastic agent, rendezvous, environment and
a process per rank; only the interpreter is shared, and with it the seed of Python's string hashes.
The tests of whole jobs (resume, stops, faults, real text) start the real ``torchrun``.

Reads a request per line from standard input: ``{"nproc", "command", "environment", "output"}``.
Answers with the process id of the job's agent at once, and with its exit code at its end.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
import uuid
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print may not go among the answers
    _import_everything()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_job(**json.loads(line)))
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _import_everything() -> None:
    from uar_megatron.mcore import cpu

    cpu.enable()
    for name in ("megatron.training", "uar_megatron.mcore.gpt", "uar_megatron.pretrain"):
        importlib.import_module(name)


def _job(nproc: int, command: list[str], environment: dict[str, str], output: str) -> int:
    """Be the agent of one job; return its exit code."""
    os.setsid()
    for name, descriptor in ((os.devnull, 0), (f"{output}.out", 1), (f"{output}.err", 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, _rank)(command)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _rank(command: list[str]) -> None:
    """Run ``[-m module | script] argument …`` as Python's command line would."""
    module, sys.argv = command[0] == "-m", command
    if module:
        sys.argv = command[1:]
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:  # the agent waits for a value
        if stop.code:
            raise


if __name__ == "__main__":
    main()
