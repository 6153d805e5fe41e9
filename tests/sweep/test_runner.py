"""Sweeps reach their end, whatever happens to their points and to themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jobs import TIMEOUT, TINY, environment

from uar_megatron.errors import UARError
from uar_megatron.sweep import runner
from uar_megatron.sweep.command import make_table, run_sweep
from uar_megatron.sweep.grid import Sweep, load_sweep
from uar_megatron.sweep.measure import compare, measure
from uar_megatron.sweep.state import CARE, RUN, State, processes_of, read_state, take_lock

HERE = Path(__file__).parent

FIFTY = """
base: {tiny}
dir: {folder}
grid: {{uar.budget.alpha: [0.0, 0.5, 1.0, 1.5, 2.0]}}
zip: {{lr: [1.0e-3, 2.0e-3], min_lr: [1.0e-4, 2.0e-4]}}
seeds: [1, 2, 3, 4, 5]
baseline: alpha=0.0 lr=0.001 min_lr=0.0001
"""


def fake_sweep(grid: Path, jobs: int, log: Path) -> subprocess.Popen[bytes]:
    path = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, str(HERE / "fake_sweep.py"), str(grid), str(jobs)],
            env=environment() | {"PYTHONPATH": path},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def wait_until_finished(sweep: Sweep, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while sum(read_state(p).finished for p in sweep.points) < count:
        assert time.monotonic() < deadline, "the sweep does not get on"
        time.sleep(0.2)


def alive(sweep: Sweep) -> list[int]:
    return [process.pid for point in sweep.points for process in processes_of(point.folder)]


@pytest.mark.slow
def test_fifty_points_with_failures_each_once_in_the_table(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(FIFTY.format(tiny=TINY, folder=tmp_path / "runs"))
    sweep = load_sweep(grid)
    log = tmp_path / "log"
    for finished in (8, 20):
        job = fake_sweep(grid, 4, log)
        wait_until_finished(sweep, finished)
        job.kill()
        job.wait()
    # Two at once: each point is still trained by one process at a time.
    jobs = [fake_sweep(grid, 3, log) for _ in range(2)]
    assert [job.wait(timeout=TIMEOUT) for job in jobs] == [0, 0], log.read_text()[-5000:]

    points = measure(sweep)
    assert len(points) == 50
    assert len(set(zip(points["row"], points["seed"], strict=True))) == 50
    assert (points["reason"] == "").all()
    results = compare(load_sweep(tmp_path / "runs"))
    assert len(results.frame) == 10
    assert (results.frame["finished"] == 5).all()
    assert not results.unfinished
    assert make_table(grid).count("| 5 |") == 10
    assert not list((tmp_path / "runs").glob("*/overlap"))
    for point in sweep.points:
        run = read_state(point).run
        assert run is not None
        assert [s.step for s in run.steps] == list(range(1, 21))
    tried = [(p.folder / "attempts").stat().st_size for p in sweep.points]
    assert sum(tried) > 60, "failures were injected"
    assert not alive(sweep)


@pytest.mark.slow
def test_sigterm_stops_the_points_and_says_how_to_go_on(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {TINY}\ndir: {tmp_path / 'runs'}\ngrid: {{train_iters: [100000]}}\n")
    sweep = load_sweep(grid)
    job = fake_sweep(grid, 1, tmp_path / "log")
    deadline = time.monotonic() + TIMEOUT
    while read_state(sweep.points[0]).step < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=TIMEOUT) == 128 + signal.SIGTERM
    assert not alive(sweep)
    said = (tmp_path / "log").read_text()
    assert "start the sweep again to go on" in said
    assert "stopped at step" in said


def run(tmp_path: Path, script: str, **options: Any) -> tuple[int, list[State]]:
    """Sweep two seeds with a script that gets the point's folder; return exit code and states."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {TINY}\ndir: {tmp_path / 'runs'}\nseeds: [1, 2]\n")
    code = run_sweep(
        grid,
        check=lambda experiments: None,
        command=lambda config: (sys.executable, "-c", script, str(config.parent)),
        **options,
    )
    return code, [read_state(point) for point in load_sweep(grid).points]


def test_a_point_that_fails_for_good_is_named_with_its_last_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; sys.exit('no luck' if sys.argv[1].endswith('1') else 2)"
    code, states = run(tmp_path, script, retries=1)
    assert code == 1
    assert not any(state.finished for state in states)
    said = capfd.readouterr()
    assert "tiny seed=1 failed at step 0: exit code 1, run log: not started" in said.err
    assert "no luck" in said.err
    assert "2 of 2 points failed: tiny seed=1, tiny seed=2" in said.err
    log = (tmp_path / "runs" / "tiny_seed=1" / "train.log").read_text()
    assert log.splitlines().count("no luck") == 2
    refused = (tmp_path / "runs" / "tiny_seed=2" / "train.log").read_text()
    assert refused.count("== uar sweep") == 1, "a configuration that is refused is not tried again"


def test_an_attempt_that_takes_too_long_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PATIENCE_SECONDS", 0.5)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code, _ = run(tmp_path, script, retries=0, timeout=1.0, jobs=2)
    assert code == 1
    assert "took longer than 1 s" in capfd.readouterr().err


def test_what_a_process_leaves_behind_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PATIENCE_SECONDS", 0.5)
    script = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True)"
    )
    code, _ = run(tmp_path, script, retries=0, jobs=2)
    assert code == 1
    assert not alive(load_sweep(tmp_path / "runs"))


def test_a_point_that_a_dead_sweep_left_running_is_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny_seed=1"
    folder.mkdir(parents=True)
    lock = take_lock(folder, RUN)
    assert lock is not None
    finish = (
        "import sys; from pathlib import Path;"
        "from records import start, step; from uar_megatron.reporting.runlog import RunLogWriter;"
        "from uar_megatron.reporting.schema import End;"
        "log = RunLogWriter(Path(sys.argv[1]) / 'run.jsonl'); log.write(start(0));"
        "log.write(End(step=20, reason='finished'))"
    )
    # Until the sweep has been at the point, which it says with a lock of its own.
    wait = (
        "import sys, time; from pathlib import Path\n"
        f"while not (Path(sys.argv[1]) / {CARE!r}).exists(): time.sleep(0.1)\n"
        "time.sleep(2)\n"
    )
    monkey = {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    child = subprocess.Popen(
        [sys.executable, "-c", wait + finish, str(folder)], stdin=lock, env=environment() | monkey
    )
    os.close(lock)
    script = f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); {finish}"
    code, states = run(tmp_path, script)
    child.wait()
    assert code == 0
    assert all(state.finished for state in states)
    assert "tiny seed=1: still runs" in capfd.readouterr().out
    assert not (folder / "train.log").exists()


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / CARE).mkdir()
    with pytest.raises(UARError, match=rf"{CARE}: Is a directory\n  remedy:  sweep in a folder"):
        take_lock(tmp_path, CARE)


@pytest.mark.slow
def test_two_real_points(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"base: {TINY}\ndir: {tmp_path / 'runs'}\nbaseline: Top-k\n"
        "points:\n"
        "  Top-k: [routing=topk, train_iters=4]\n"
        "  UAR: [routing=uar_ae, train_iters=4]\n"
    )
    uar = [sys.executable, "-m", "uar_megatron.cli"]
    subprocess.run([*uar, "sweep", str(grid)], env=environment(), check=True)
    points = load_sweep(grid).points
    table = make_table(grid)
    assert all(f"| {point.row} | 1 |" in table for point in points)
    assert "Unfinished" not in table
    # A finished point is left alone; one whose last record was lost is taken to its end again.
    log = points[1].folder / "run.jsonl"
    *lines, end = log.read_text().splitlines(keepends=True)
    assert '"finished"' in end
    log.write_text("".join(lines))
    assert "- UAR: step 4 of 4: killed" in make_table(grid)
    subprocess.run([*uar, "sweep", str(grid)], env=environment(), check=True)
    assert make_table(grid) == table
    assert (points[0].folder / "train.log").read_text().count("== uar sweep") == 1
    assert (points[1].folder / "train.log").read_text().count("== uar sweep") == 2


@pytest.mark.slow
def test_every_point_is_checked_before_the_first_starts(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {TINY}\ndir: {tmp_path / 'runs'}\ngrid: {{num_layer: [2, 3]}}\n")
    result = subprocess.run(
        [sys.executable, "-m", "uar_megatron.cli", "sweep", str(grid)],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "point 'num_layer=2': num_layer: neither a Megatron argument" in result.stderr
    assert "did you mean 'num_layers'" in result.stderr
    assert not (tmp_path / "runs").exists()
