"""Stands in for a training: a real run log, checkpoints, and every way to break off.

``fake_trainer.py CONFIG``. What goes wrong in which attempt depends on the point's name alone.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from records import start, step, validation

from uar_megatron.reporting.runlog import RunLogWriter
from uar_megatron.reporting.schema import End

FAILURES = ("crash", "kill", "torn line", "hang", "orphan", "no end", "late kill")
SAVE_INTERVAL = 3


def main(config: Path) -> None:
    folder = config.parent
    settings = yaml.safe_load(config.read_text())
    attempts = _count(folder / "attempts")
    chance = random.Random(settings["run"]["name"] + str(attempts))
    failure = chance.choice(FAILURES) if chance.random() < 0.4 and attempts <= 2 else ""
    if failure == "orphan" and len(sys.argv) == 2:
        # As torchrun, its ranks in sessions of their own, killed alone.
        subprocess.Popen([sys.executable, *sys.argv, "rank"], start_new_session=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    # Held until this process is gone: nobody else may train the point meanwhile.
    mine = (folder / "exclusive").open("w")
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (folder / "overlap").touch()
    train(folder, settings["train_iters"], failure, chance)


def train(folder: Path, steps: int, failure: str, chance: random.Random) -> None:
    log = RunLogWriter(folder / "run.jsonl")
    checkpoint = folder / "checkpoint"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    log.write(start(first))
    breaks_at = chance.randint(first + 1, max(steps, first + 1))
    for at in range(first + 1, steps + 1):
        time.sleep(0.02)
        if at == breaks_at:
            break_off(failure, folder)
        log.write(step(at))
        if at % SAVE_INTERVAL == 0:
            checkpoint.write_text(str(at))
    checkpoint.write_text(str(steps))
    log.write(validation(steps, held_out=3.0))
    if failure == "late kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure != "no end":
        log.write(End(step=steps, reason="finished"))


def break_off(failure: str, folder: Path) -> None:
    if failure == "crash":
        sys.exit(1)
    if failure == "hang":
        time.sleep(1000)
    if failure == "torn line":
        with (folder / "run.jsonl").open("a") as log:
            log.write('{"schema":1,"kind":"st')
    if failure in ("torn line", "kill"):
        os.kill(os.getpid(), signal.SIGKILL)


def _count(file: Path) -> int:
    with file.open("a") as attempts:
        attempts.write("x")
        attempts.flush()
        return attempts.tell()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
