"""From a sweep file to points: combinations, names, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jobs import TINY

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import load_experiment, save_resolved
from uar_megatron.sweep.grid import Sweep, expand, load_sweep, override, save_manifest
from uar_megatron.sweep.state import refuse_changed


def sweep(tmp_path: Path, **fields: object) -> Sweep:
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump(
            {"base": str(TINY), "dir": str(tmp_path / "runs"), **fields}, sort_keys=False
        )
    )
    return expand(path)


def test_points_times_grid_times_zip_times_seeds(tmp_path: Path) -> None:
    found = sweep(
        tmp_path,
        points={"Top-k": ["routing=topk"], "UAR": ["routing=uar_ae"]},
        grid={"uar.budget.alpha": [0.5, 1.0]},
        zip={"lr": [1e-3, 2e-3], "min_lr": [1e-4, 2e-4]},
        seeds=[1, 2],
    )
    assert len(found.points) == len({p.name for p in found.points}) == 16
    first, last = found.points[0], found.points[-1]
    assert first.name == "Top-k alpha=0.5 lr=0.001 min_lr=0.0001 seed=1"
    assert first.row == "Top-k alpha=0.5 lr=0.001 min_lr=0.0001"
    assert last.folder == tmp_path / "runs" / "UAR_alpha=1.0_lr=0.002_min_lr=0.0002_seed=2"
    assert (last.experiment.uar.policy, last.experiment.uar.budget.alpha) == ("uar", 1.0)
    expected = {"lr": 2e-3, "min_lr": 2e-4, "seed": 2, "save": f"{last.folder}/checkpoints"}
    assert expected.items() <= last.experiment.megatron.items()
    assert last.experiment.run.name == last.name
    assert last.steps == 20


def test_without_variants_the_experiment_is_the_row(tmp_path: Path) -> None:
    found = sweep(tmp_path, seeds=[7])
    assert [(p.row, p.name, p.seed) for p in found.points] == [("tiny", "tiny seed=7", 7)]
    assert [p.name for p in sweep(tmp_path, grid={"lr": [1e-3]}).points] == ["lr=0.001"]


def test_keys_that_end_alike_are_shown_whole(tmp_path: Path) -> None:
    grid = {"uar.clb.enabled": [True], "uar.bias.enabled": [False]}
    (point,) = sweep(tmp_path, grid=grid).points
    assert point.name == "uar.clb.enabled=true uar.bias.enabled=false"


def test_names_are_safe_for_file_systems(tmp_path: Path) -> None:
    points = {"AE + CLB / α": [], "../up": ["lr=1e-3"], "x" * 300: ["lr=2e-3"]}
    folders = [p.folder for p in sweep(tmp_path, points=points).points]
    assert [f.name for f in folders[:2]] == ["AE_+_CLB", "up"]
    assert len(folders[2].name) == 120
    assert all(f.parent == tmp_path / "runs" for f in folders)


@pytest.mark.parametrize(
    "value", ["[0]+[1]*2", "1", "90,5,5", "true", "a: b", 1e-5, None, [1, "x"], {"a": [None]}]
)
def test_values_reach_the_experiment_as_they_are(tmp_path: Path, value: object) -> None:
    text = override("some_key", value)
    own = ["run.dir=runs/x", "save=null", "load=null"]
    found = load_experiment(TINY, [text, *own] if not isinstance(value, dict) else own)
    if not isinstance(value, dict):
        assert found.megatron["some_key"] == value


BAD = {
    "unknown field": ({"seed": [1]}, ["sweep.seed", "did you mean 'seeds'"]),
    "bad key of ours": (
        {"points": {"A": ["uar.budget.alfa=1"]}, "seeds": [3]},
        ["point 'A seed=3'", "uar.budget.alfa", "did you mean 'alpha'"],
    ),
    "bad value": ({"grid": {"uar.uncertainty": ["heat"]}}, ["uncertainty=heat", "energy"]),
    "unknown group": ({"points": {"A": ["routing=nope"]}}, ["point 'A'", "uar_ae"]),
    "lists of two lengths": ({"zip": {"lr": [1, 2], "min_lr": [1]}}, ["sweep.zip", "'lr': 2"]),
    "empty list": ({"grid": {"lr": []}}, ["sweep.grid.lr", "empty"]),
    "seed in the grid": ({"grid": {"seed": [1, 2]}}, ["sweep.grid.seed", "seeds"]),
    "same seed twice": ({"seeds": [1, 1]}, ["point 'tiny seed=1'", "folder"]),
    "same folder": ({"points": {"a b": [], "A/b": ["lr=1"]}}, ["point 'A/b'", "folder of 'a b'"]),
    "same training": (
        {"points": {"A": ["lr=1e-3"], "B": ["lr=2e-3"]}, "grid": {"lr": [0.1]}},
        ["point 'B lr=0.1'", "configuration of 'A lr=0.1'", "later value"],
    ),
    "shared checkpoints": (
        {"points": {"A": ["save=x"], "B": ["save=x", "lr=1"]}},
        ["point 'B'", "save of 'A'", "${run.dir}"],
    ),
    "unknown baseline": (
        {"points": {"Top-k": []}, "baseline": "topk"},
        ["baseline", "'topk'", "did you mean 'Top-k'"],
    ),
    "not a list": ({"points": {"A": "lr=1"}}, ["sweep.points.A", "list"]),
}


@pytest.mark.parametrize("case", BAD)
def test_is_refused_with_a_message_that_helps(case: str, tmp_path: Path) -> None:
    fields, expected = BAD[case]
    with pytest.raises(ConfigError) as refused:
        sweep(tmp_path, **fields)
    for words in expected:
        assert words in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_started_sweep_is_read_from_its_folder(tmp_path: Path) -> None:
    points = {"Top-k": [], "AE + CLB": ["lr=1e-3"]}
    found = sweep(tmp_path, points=points, seeds=[1, 2], baseline="Top-k")
    for point in found.points:
        save_resolved(point.experiment, point.folder)
    save_manifest(found)
    assert load_sweep(tmp_path / "runs") == found
    with pytest.raises(UARError, match="not the folder of a sweep"):
        load_sweep(tmp_path)
    (tmp_path / "runs" / "sweep.json").write_text("[]")
    with pytest.raises(UARError, match="not a sweep's list of points"):
        load_sweep(tmp_path / "runs")


def test_a_run_is_not_continued_with_another_configuration(tmp_path: Path) -> None:
    (point,) = sweep(tmp_path, points={"A": ["lr=1e-3"]}).points
    save_resolved(point.experiment, point.folder)
    (changed,) = sweep(tmp_path, points={"A": ["lr=2e-3"]}).points
    refuse_changed(changed)  # nothing has been trained yet
    (point.folder / "run.jsonl").touch()
    refuse_changed(point)
    with pytest.raises(ConfigError, match=r"point 'A'.*lr was 0.001, is 0.002"):
        refuse_changed(changed)


def test_the_sweeps_that_come_with_the_package(repository: Path) -> None:
    files = sorted((repository / "configs" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        assert expand(file).baseline is not None
