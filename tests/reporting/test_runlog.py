"""The run log survives kills, full disks, resumes and strange lines."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
from records import start, step, validation

from uar_megatron.errors import UARError
from uar_megatron.reporting.runlog import Run, RunLogWriter, read_run
from uar_megatron.reporting.sinks import console_line, scalars
from uar_megatron.reporting.summary import summarise


def write(path: Path, *records: object) -> Path:
    writer = RunLogWriter(path)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_round_trip_with_nan(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "run.jsonl", start(0), step(1, loss=math.nan), step(2, loss=None))
    run = read_run(path)
    assert [s.step for s in run.steps] == [1, 2]
    assert math.isnan(run.steps[0].loss)
    assert run.steps[1].loss is None
    assert run.steps[0].layers[1].k_histogram == step(1).layers[1].k_histogram
    assert '"loss":"NaN"' in path.read_text()


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = (start(0), *(step(i, loss=float(i)) for i in range(1, 7)), validation(6, a=1.0))
    path = write(tmp_path / "run.jsonl", *first)
    write(path, start(4), *(step(i, loss=10.0 * i) for i in range(5, 8)), validation(6, a=2.0))
    run = read_run(path)
    assert [(s.step, s.loss) for s in run.steps] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0),
    ]  # fmt: skip
    assert [(v.step, v.losses) for v in run.validations] == [(6, {"a": 2.0})]
    assert run.resumed_at == [4]


def test_validation_and_test_sets_of_one_step_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", start(0), validation(5, a=1.0), validation(5, b=2.0))
    assert [v.losses for v in read_run(path).validations] == [{"a": 1.0, "b": 2.0}]


def test_a_line_cut_by_a_kill_is_ended_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", start(0), step(1))
    path.write_text(path.read_text() + step(2).to_line()[:40])
    write(path, start(1), step(2))
    with pytest.warns(UserWarning, match="line 3 is not a whole record"):
        run = read_run(path)
    assert [s.step for s in run.steps] == [1, 2]


def test_every_line_is_whole_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    child = os.fork()
    if child == 0:
        writer = RunLogWriter(path)
        writer.write(start(0))
        number = 0
        while True:
            number += 1
            writer.write(step(number))
    while not path.exists() or path.stat().st_size < 200_000:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run = read_run(path)
    assert [s.step for s in run.steps] == list(range(1, len(run.steps) + 1))


def test_full_disk_does_not_stop_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    writer = RunLogWriter(Path("/dev/full"))
    writer.write(step(1))
    writer.write(step(2))
    assert capsys.readouterr().err.count("cannot write") == 1


@pytest.mark.parametrize("content", [None, "", "nonsense\n"])
@pytest.mark.filterwarnings("ignore:.*not a whole record")
def test_nothing_to_read(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UARError, match=r"run\.jsonl"):
        read_run(path)


def test_a_newer_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"schema":2,"kind":"chapter"}\n')
    with pytest.raises(UARError, match="schema 2"):
        read_run(path)


def test_fields_of_a_newer_minor_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(step(1).to_line().replace('"step":1', '"mood":"good","step":1'))
    assert read_run(path).steps[0].step == 1


def test_logs_from_before_flops_were_counted_can_be_read(tmp_path: Path) -> None:
    new = ("tokens_per_step", "flops", "flops_ratio", "throughput")
    record = step(1).model_dump(by_alias=True, exclude={*new})
    for layer in record["layers"]:
        del layer["flops"], layer["flops_ratio"]
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (old,) = read_run(path).steps
    assert [getattr(old, name) for name in new] == [None] * 4
    assert (old.layers[0].flops, old.layers[0].flops_ratio) == (None, None)
    assert console_line(old).endswith("0.1k tok/s")
    assert not any("flops" in name for name in scalars(old))
    assert summarise(Run(steps=[old]))["flops_ratio_late"] is None


def test_parts_of_a_run_are_cut_by_step() -> None:
    """Twenty steps one by one, and after a resume every hundredth up to 2020."""
    run = Run(steps=[step(i) for i in [*range(1, 21), *range(120, 2021, 100)]])
    run.steps[20].interval = 100
    assert [s.step for s in run.steps[run.part(0.75, 1.0)]] == [1520, 1620, 1720, 1820, 1920, 2020]
    assert run.steps[run.part(0.0, 0.1)][-1].step == 120
    assert run.part(1.0, 1.0) == slice(39, 40)
    even = Run(steps=[step(i) for i in range(10, 401, 10)])
    for record in even.steps:
        record.interval = 10
    assert even.begin == 0
    assert (even.part(0.75, 1.0), even.part(0.0, 0.1)) == (slice(30, 40), slice(0, 4))
    # A log may begin inside a run, and a part has one record at least.
    late = Run(steps=[step(i) for i in range(1001, 1005)])
    assert (late.part(0.75, 1.0), late.part(0.0, 0.1)) == (slice(3, 4), slice(0, 1))
    assert Run().part(0.0, 1.0) == slice(0, 0)
