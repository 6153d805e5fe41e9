"""Tables of a run log, the live view, and the panels."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pandas
import planted
import pytest
from records import start, step
from rich.console import Console
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import UARError
from uar_megatron.reporting import export, watch
from uar_megatron.reporting.export import export_run
from uar_megatron.reporting.panels import panels_of, save_workspace
from uar_megatron.reporting.schema import LayerValidation, Validation
from uar_megatron.reporting.view import load_views
from uar_megatron.reporting.watch import Tail, picture, spark, watch_run


def test_csv_has_every_number(tmp_path: Path) -> None:
    run = planted.write(tmp_path, planted.records(steps=30, observe=10))
    paths = export_run(run, "csv")
    assert [p.name for p in paths] == [
        "steps.csv", "layers.csv", "validations.csv", "validation_layers.csv", "observations.csv",
        "histograms.csv", "token_classes.csv",
    ]  # fmt: skip
    steps, layers, validations, routing, observations, histograms, classes = map(
        pandas.read_csv, paths
    )
    assert steps["step"].tolist() == list(range(1, 31))
    assert len(layers) == 30 * 6
    records = load_views([run])[0].run.steps
    assert layers["energy_mean"].tolist() == [m.energy_mean for s in records for m in s.layers]
    assert layers["load_7"].tolist() == [m.load[7] for s in records for m in s.layers]
    assert layers["state_vacuum"].tolist() == [m.states[3] for s in records for m in s.layers]
    assert len(validations) == 10
    seen = load_views([run])[0].run.observations
    assert observations["stability"].isna().tolist() == [
        m.stability is None for o in seen for m in o.layers
    ]
    assert observations["bias_7"].tolist() == [0.01] * 18
    assert classes["k_eff"].tolist() == [c.k_eff for o in seen for m in o.layers for c in m.classes]
    made = [m for v in load_views([run])[0].run.validations for m in v.layers["in_domain"]]
    assert routing["set"].tolist() == ["in_domain"] * 30
    assert routing["max_vio"].tolist() == [m.max_vio for m in made]
    assert routing["load_7"].tolist() == [0.125] * 30
    first = histograms[(histograms["step"] == 10) & (histograms["layer"] == 2)]
    table = np.zeros((24, 24), dtype=int)
    entropy = (first["entropy"] / np.log(planted.EXPERTS) * 24).astype(int)
    table[entropy, ((first["energy"] + 4) / 5 * 24).astype(int)] = first["tokens"]
    assert table.tolist() == seen[0].layers[0].histogram
    assert len(list((tmp_path / "export").iterdir())) == 7


def test_a_set_that_is_evaluated_twice_at_a_step_counts_once(tmp_path: Path) -> None:
    one = LayerValidation(layer=2, tokens=9, k_eff=2.0, load=[0.5, 0.5], max_vio=0.0)
    again = one.model_copy(update={"k_eff": 3.0})
    records = [
        Validation(step=4, losses={"a": 1.0}, layers={"a": [routing]}) for routing in (one, again)
    ]
    planted.write(tmp_path, [start(0), *records])
    _, routing = export_run(tmp_path, "csv")
    assert pandas.read_csv(routing)["k_eff"].tolist() == [3.0]


def test_the_command_tells_what_is_missing(tmp_path: Path) -> None:
    """On stderr: stdout has the files."""
    log = tmp_path / "run.jsonl"
    older = re.sub(r'"zscore_(mean|std)":[^,]+,', "", step(1).to_line())
    # The second looks whole until it is parsed, which every table does.
    log.write_text(older + step(2).to_line().replace('"lr":', '"lr",') + '{"schema":1,"ki\n')
    result = CliRunner().invoke(app, ["log", "export", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.split() == [
        str(tmp_path / "export" / name) for name in ("steps.csv", "layers.csv")
    ]
    assert "2 line(s) are not whole records (line 3)" in result.stderr
    assert "has no zscore_mean, zscore_std" in result.stderr
    log.write_text("")
    assert "The log is empty" in CliRunner().invoke(app, ["log", "export", str(log)]).stderr


def test_columns_that_come_late_are_kept(tmp_path: Path) -> None:
    later = step(2, loss=None)
    later.layers[0].balancing_loss = {"seq_aux_loss": 2.0}
    planted.write(tmp_path, [start(0), step(1), later])
    steps, layers = (pandas.read_csv(p) for p in export_run(tmp_path, "csv"))
    assert steps["loss"].isna().tolist() == [False, True]
    assert layers["seq_aux_loss"].isna().tolist() == [True, True, False, True]


def test_what_a_resume_took_back_is_not_exported(tmp_path: Path) -> None:
    first = [start(0), *(step(i, layers=0) for i in range(1, 7))]
    planted.write(tmp_path, [*first, start(3), step(4, layers=0)])
    paths = export_run(tmp_path, "csv", tmp_path / "out")
    assert [p.name for p in paths] == ["steps.csv"]
    assert pandas.read_csv(paths[0])["step"].tolist() == [1, 2, 3, 4]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planted.write(tmp_path, planted.records(steps=30, observe=10))
    monkeypatch.setattr(export, "_ROWS", 50)
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(UARError, match="pyarrow"):
            export_run(run, "parquet")
        pytest.skip("pyarrow is not installed: pip install 'uar-megatron[parquet]'")
    for parquet, text in zip(export_run(run, "parquet"), export_run(run, "csv"), strict=True):
        found, expected = pandas.read_parquet(parquet), pandas.read_csv(text)
        pandas.testing.assert_frame_equal(found, expected, check_dtype=False, check_exact=True)


def test_a_tail_follows_a_log(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    tail = Tail(log)
    assert not tail.poll()
    assert "waiting for" in shown(tail, log)
    log.write_text(start(0).to_line())
    assert tail.poll()
    assert "first logging interval" in shown(tail, log)
    with log.open("a") as file:
        file.write(step(1).to_line() + step(2, loss=2.5).to_line()[:100])
    assert tail.poll()
    assert not tail.poll()
    assert [s.step for s in tail.run.steps] == [1]
    with log.open("a") as file:
        file.write(step(2, loss=2.5).to_line()[100:] + "nonsense\n")
    assert tail.poll()
    assert "step 2" in shown(tail, log)
    assert [s.step for s in Tail(log).run.steps] == [1, 2]


def test_a_tail_holds_what_a_picture_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job that is watched for days; what is held does not depend on when it was begun."""
    monkeypatch.setattr(watch, "_HELD", 20)
    records = planted.records(steps=30, observe=10)
    log = tmp_path / "run.jsonl"
    tail = Tail(log)
    planted.write(tmp_path, records)
    assert tail.poll()
    late = Tail(log)
    for held in (tail.run, late.run):
        assert [bool(s.layers) for s in held.steps] == [False] * 19 + [True]
        assert [s.step for s in held.steps] == list(range(11, 31))
        assert held.observations == []
        assert [v.step for v in held.validations] == [30]
    assert shown(tail, log) == shown(late, log)


def shown(tail: Tail, log: Path, *options: float) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(picture(tail.run, log, *options))
    return console.export_text()


def test_a_run_that_another_takes_the_place_of(tmp_path: Path) -> None:
    log = planted.write(tmp_path, [start(0), step(1), step(2)]) / "run.jsonl"
    tail = Tail(log)
    log.write_text(start(0).to_line())
    assert tail.poll()
    assert tail.run.steps == []


def test_silence_and_many_layers(tmp_path: Path) -> None:
    log = planted.write(tmp_path, [start(0), step(1, layers=40)]) / "run.jsonl"
    assert "no record for 5 min" in shown(Tail(log), log, 300.0)
    text = shown(Tail(log), log, 30.0, 5)
    assert "no record" not in text
    rows = [row.split()[1] for row in text.splitlines() if "█" in row and "loss" not in row]
    assert rows == ["2", "12", "22", "31", "41"]


def test_one_picture(tmp_path: Path) -> None:
    run = planted.write(tmp_path, planted.records(steps=30, observe=0, name="[bold]x"))
    console = Console(width=160, record=True, file=io.StringIO())
    watch_run(run, 1.0, once=True, console=console)
    text = console.export_text()
    for words in ("[bold]x", "step 30 of 30", "stopped: finished", "loss", "MaxVio", "in_domain"):
        assert words in text
    # A run that has ended is not waited for.
    watch_run(run, 100.0, once=False, console=console)


def test_a_log_without_times_of_a_step(tmp_path: Path) -> None:
    run = planted.write(tmp_path, planted.records(steps=8, layers=2, observe=0)[:-1])
    log = run / "run.jsonl"
    log.write_text(re.sub(r'"(seconds_per_step|tokens_per_second)":[^,]+,', "", log.read_text()))
    text = shown(Tail(log), log, 300.0)
    assert "step 8 of 8 (100%, – of training left)" in text
    assert "no record for 5 min" in text
    assert "– tok/s" in text


def test_sparks() -> None:
    assert spark([0.0, 1.0]) == "▁█  1"
    assert spark([2.0] * 3).startswith("▁▁▁")
    assert spark([float("nan")]) == "not finite"
    assert len(spark([float(i) for i in range(1000)])) < 70


def test_panels_name_what_is_logged(tmp_path: Path) -> None:
    run = planted.write(tmp_path, planted.records(steps=30, observe=0))
    sections = panels_of(load_views([run])[0])
    assert "Observed signals" not in sections
    observed = planted.write(tmp_path / "observed", planted.records(steps=30, observe=10))
    plots = panels_of(load_views([observed])[0])["Observed signals"]
    assert "Stability of routing between probes" in [p["title"] for p in plots]
    assert "uar/energy_mean/layer_7" in sections["Thermodynamics"][0]["metrics"]
    assert "uar/vacuum/layer_2" in [m for p in sections["Routing states"] for m in p["metrics"]]


def test_a_workspace_has_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planted.write(tmp_path, planted.records(steps=30, observe=10))
    sections = panels_of(load_views([run])[0])
    energies = sections["Thermodynamics"][0]["metrics"]
    assert energies == [f"uar/energy_mean/layer_{n}" for n in range(2, 8)]
    if importlib.util.find_spec("wandb_workspaces") is None:
        with pytest.raises(UARError, match="wandb-workspaces"):
            save_workspace(sections, "p", None)
        pytest.skip("wandb-workspaces is not installed: pip install 'uar-megatron[workspaces]'")
    from wandb_workspaces.workspaces import Workspace

    saved = []
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(Workspace, "url", "the address")
    assert save_workspace(sections, "p", None) == "the address"
    assert [s.name for s in saved[0].sections] == list(sections)
    assert saved[0].sections[1].panels[0].y == energies
