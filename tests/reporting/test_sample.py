"""Logs of any size, and broken ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import planted
import pytest
from records import start, step, validation

from uar_megatron.errors import UARError
from uar_megatron.reporting import sample
from uar_megatron.reporting.runlog import NoRecordError, read_run
from uar_megatron.reporting.sample import read_sample
from uar_megatron.reporting.schema import LayerValidation, Validation
from uar_megatron.reporting.series import Series


def test_a_small_log_is_read_like_read_run(tmp_path: Path) -> None:
    first = [start(0), *(step(i) for i in range(1, 9)), validation(4, a=1.0)]
    again = [start(4), *(step(i, loss=9.0) for i in range(5, 7)), validation(6, a=2.0)]
    planted.write(tmp_path, [*first, *again])
    log = tmp_path / "run.jsonl"
    found = read_sample(log)
    expected = read_run(log)
    assert found.run.steps == expected.steps
    assert found.run.validations == expected.validations
    assert found.run.resumed_at == [4]
    assert found.logged == 6
    assert found.notes == []


def test_a_large_log_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.write(tmp_path, planted.records(steps=300, observe=10))
    monkeypatch.setattr(sample, "SAMPLE_STEPS", 11)
    found = read_sample(tmp_path / "run.jsonl")
    steps = [s.step for s in found.run.steps]
    assert len(steps) == 11
    assert (steps[0], steps[-1]) == (1, 300)
    assert len(found.run.observations) == 11
    assert len(found.run.validations) == 5
    assert found.logged == 300
    assert "11 evenly spaced of 300 logged steps" in found.notes[0]
    monkeypatch.setattr(sample, "SAMPLE_STEPS", 1000)
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 60_000)
    assert 2 <= len(read_sample(tmp_path / "run.jsonl").run.steps) < 30


def validated(at: int, *sets: str) -> Validation:
    routing = LayerValidation(layer=2, tokens=9, k_eff=2.0, load=[0.25] * 4, max_vio=0.0)
    losses = dict.fromkeys(sets, at / 10)
    return Validation(step=at, losses=losses, layers={name: [routing] for name in sets})


def test_the_routing_of_validations_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses are kept; what layers did is larger."""
    again = [start(80), *(validated(at, "a") for at in range(90, 301)), validated(300, "test")]
    log = planted.write(tmp_path, [start(0), *(validated(at, "a") for at in range(1, 101)), *again])
    log /= "run.jsonl"
    assert read_sample(log).run.validations == read_run(log).validations
    monkeypatch.setattr(sample, "SAMPLE_STEPS", 11)
    found = read_sample(log).run.validations
    assert [v.losses for v in found] == [v.losses for v in read_run(log).validations]
    assert len(found) == 80 + 211
    assert sum(bool(v.layers) for v in found) == 11
    assert found[-1].layers.keys() == {"test"}


def test_broken_lines_are_named(tmp_path: Path) -> None:
    planted.write(tmp_path, [start(0), step(1), step(2)])
    log = tmp_path / "run.jsonl"
    text = log.read_text()
    log.write_text(text + step(3).to_line()[:200] + "\nnonsense\n" + step(4).to_line())
    found = read_sample(log)
    assert [s.step for s in found.run.steps] == [1, 2, 4]
    assert "2 line(s) are not whole records (line 4, 5)" in found.notes[0]
    # It begins and ends like one.
    log.write_text(text + step(3).to_line().replace('"lr":', '"lr",'))
    found = read_sample(log)
    assert [s.step for s in found.run.steps] == [1, 2]
    assert "1 line(s) are not whole records and left out" in found.notes[0]
    log.write_text(text + step(3).to_line()[:200])
    assert [s.step for s in read_sample(log).run.steps] == [1, 2]


def test_an_empty_log_and_none(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    with pytest.raises(NoRecordError, match="no run log"):
        read_sample(log)
    log.touch()
    assert "empty" in read_sample(log).notes[0]
    planted.write(tmp_path, [start(0)])
    assert "log_interval" in read_sample(log).notes[0]


def test_fields_that_an_older_version_did_not_write(tmp_path: Path) -> None:
    lines = []
    for i in range(1, 4):
        data = json.loads(step(i).to_line())
        data["schema"] = 0
        del data["tokens_per_second"]
        for layer in data["layers"]:
            del layer["zscore_mean"], layer["states"]
        lines.append(json.dumps(data))
    old = json.loads(start(0).to_line())
    del old["tokens_per_step"]
    (tmp_path / "run.jsonl").write_text("\n".join([json.dumps(old), *lines]) + "\n")
    found = read_sample(tmp_path / "run.jsonl")
    assert [s.step for s in found.run.steps] == [1, 2, 3]
    assert math.isnan(found.run.steps[0].tokens_per_second)
    assert Series(found.run).of_layer("energy_mean")[0, 0] == step(1).layers[0].energy_mean
    assert "states, tokens_per_second, tokens_per_step, zscore_mean" in found.notes[0]


def test_a_newer_schema_is_read_or_refused(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    text = step(1).to_line().replace('"schema":1', '"schema":99')
    log.write_text(text)
    assert [s.step for s in read_sample(log).run.steps] == [1]
    log.write_text(text.replace('"lr":0.001', '"lr":"by layer"'))
    with pytest.raises(UARError, match="line 1 is of schema 99"):
        read_sample(log)


def write_large(log: Path, steps: int, layers: int) -> None:
    """A log with every step of a deep model."""
    model = step(1).layers[0]
    table = [model.model_copy(update={"layer": n + 2}) for n in range(layers)]
    text = step(1).model_copy(update={"layers": table}).to_line()
    head, tail = text.split('"step":1,', 1)
    with log.open("w", encoding="utf-8") as file:
        file.write(start(0).to_line())
        for at in range(1, steps + 1):
            file.write(f'{head}"step":{at},{tail}')


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_48_layers(tmp_path: Path) -> None:
    """The page in less than 1 GB."""
    log = tmp_path / "run.jsonl"
    write_large(log, 100_000, 48)
    code = (
        "import sys; from pathlib import Path; from uar_megatron.reporting.html import render;"
        "from uar_megatron.reporting.view import load_views;"
        "Path(sys.argv[2]).write_text(render(load_views([Path(sys.argv[1])])));"
        # Not ru_maxrss: that of a child begins with what its parent has used.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    page = tmp_path / "report.html"
    command = [sys.executable, "-c", code, str(log), str(page)]
    used_kb = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    log.unlink()
    assert "evenly spaced of 100000 logged steps" in page.read_text()
    assert page.stat().st_size < 4_000_000
    assert used_kb < 1_000_000
