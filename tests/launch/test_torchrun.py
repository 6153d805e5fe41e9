"""``launch/torchrun.sh`` starts workers again after one has died."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import TIMEOUT, TINY, environment, kill_job, losses, steps_so_far, train

from uar_megatron.launching.scripts import script_dir
from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OPTIONS = (
    *("uar.policy=slow_policy:SlowPolicy", "hidden_dropout=0.1", "train_iters=12"),
    *("save_interval=4", "eval_iters=0", "tensorboard_dir=null", "launch.nproc_per_node=2"),
)


def test_a_dead_worker_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, folder = tmp_path / "slow", tmp_path / "run"
    monkeypatch.setenv("UAR_TEST_SLOW", str(slow))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{os.environ.get('PYTHONPATH', '')}")
    straight = train(2, tmp_path / "straight", *OPTIONS)
    slow.touch()
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [
                *(str(script_dir() / "torchrun.sh"), "--nproc", "2", "--max-restarts", "1"),
                *(str(TINY), f"run.dir={folder}", *OPTIONS),
            ],
            env=environment() | {"PYTHON": sys.executable},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        while max(steps_so_far(folder / "run.jsonl"), default=0) < 6:
            assert job.poll() is None, (tmp_path / "log").read_text()[-5000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The last rank keeps the log.
        ranks = psutil.Process(job.pid).children()
        assert len(ranks) == 2
        ranks[0].kill()
        slow.unlink()
        assert job.wait(timeout=TIMEOUT) == 0, (tmp_path / "log").read_text()[-5000:]
    finally:
        kill_job(job)
    run = read_run(folder / "run.jsonl")
    assert [start.step for start in run.starts] == [0, 4]
    assert [step.step for step in run.steps] == list(range(1, 13))
    assert losses(folder) == straight
    assert run.end is not None
    assert run.end.reason == "finished"
