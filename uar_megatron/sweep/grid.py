"""The points of a sweep: from a YAML file of overrides to validated, resolved experiments."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from yaml import YAMLError

from uar_megatron.config import Section, nearest, parse_section
from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import Experiment, load_experiment, read_yaml

MANIFEST = "sweep.json"
"""Names the points of a sweep, in the sweep's folder."""
_LONGEST_NAME = 120


class SweepConfig(Section):
    """A sweep file: every point × every combination of ``grid`` × every place of ``zip`` × seeds.

    Keys and values are those of the command line of ``uar train``.
    """

    base: str
    """The experiment, relative to the sweep file."""
    dir: str
    """Folder of the sweep; each point has one below it."""
    points: dict[str, list[str]] = Field(default={})
    """Overrides by name: the rows of the table."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values by key, every combination."""
    zip: dict[str, list[Any]] = Field(default={})
    """Values by key, lists of one length that go together."""
    seeds: list[int] = Field(default=[])
    """Empty: the experiment's own seed."""
    baseline: str | None = None
    """What the others are compared with: a row, or a name in ``points`` (at equal settings)."""


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        variant: its name in ``points``; empty where there are none.
        setting: its values in ``grid`` and ``zip``, e.g. ``alpha=0.5``.
        seed: None where the sweep names no seeds.
        folder: of its run.
        experiment: its configuration.
    """

    variant: str
    setting: str
    seed: int | None
    folder: Path
    experiment: Experiment

    @property
    def row(self) -> str:
        """The point without its seed."""
        return _join(self.variant, self.setting)

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return _join(self.row, "" if self.seed is None else f"seed={self.seed}")

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole training; None where it is measured in samples."""
        return self.experiment.megatron.get("train_iters")


@dataclass(frozen=True)
class Sweep:
    """A folder, its points in order, and the name of the baseline."""

    folder: Path
    points: tuple[Point, ...]
    baseline: str | None


def expand(path: Path) -> Sweep:
    """Compose every point of a sweep file.

    Raises:
        ConfigError: the file or a point cannot be used; the message names the point.
    """
    plain = OmegaConf.to_container(read_yaml(path), resolve=False)
    config = parse_section(SweepConfig, plain, "sweep")
    folder = Path(config.dir)
    points = [
        _point(path.parent / config.base, folder, variant, setting, seed, overrides)
        for variant, setting, seed, overrides in _combinations(config, Path(config.base).stem)
    ]
    _check_distinct(points)
    sweep = Sweep(folder, tuple(points), config.baseline)
    if config.baseline is not None:
        check_baseline(sweep, config.baseline)
    return sweep


def load_sweep(path: Path) -> Sweep:
    """Read a sweep from its file, or from its folder once it has been started.

    Raises:
        UARError: neither is there.
    """
    if not path.is_dir():
        return expand(path)
    manifest = path / MANIFEST
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        described = [(p["variant"], p["setting"], p["seed"], p["folder"]) for p in stored["points"]]
        baseline = stored["baseline"]
    except FileNotFoundError as error:
        raise UARError(
            f"{path}: not the folder of a sweep, there is no {MANIFEST}\n"
            "  remedy:  name the sweep's YAML file, or start it with `uar sweep`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UARError(f"{manifest}: not a sweep's list of points ({error})") from error
    points = [
        Point(variant, setting, seed, path / name, load_experiment(path / name / "config.yaml"))
        for variant, setting, seed, name in described
    ]
    return Sweep(path, tuple(points), baseline)


def save_manifest(sweep: Sweep) -> None:
    """Write what :func:`load_sweep` reads from the folder, whole or not at all."""
    points = [
        {"variant": p.variant, "setting": p.setting, "seed": p.seed, "folder": p.folder.name}
        for p in sweep.points
    ]
    text = json.dumps({"baseline": sweep.baseline, "points": points}, indent=1, ensure_ascii=False)
    temporary = sweep.folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(sweep.folder / MANIFEST)


def check_baseline(sweep: Sweep, baseline: str) -> None:
    """Refuse a baseline that no row can be compared with."""
    known = list(dict.fromkeys([p.row for p in sweep.points] + [p.variant for p in sweep.points]))
    if baseline not in known:
        raise ConfigError(
            "baseline",
            f"no row is called {baseline!r}",
            allowed=", ".join(filter(None, known)),
            remedy=nearest(baseline, known),
        )


def override(key: str, value: Any) -> str:
    """Return ``key=value`` such that the command line reads exactly this value."""
    if isinstance(value, str):
        try:
            if OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"])) == {"x": value}:
                return f"{key}={value}"
        except (OmegaConfBaseException, YAMLError):
            pass  # a string such as [0]+[1]*2, which only looks like YAML
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _combinations(
    config: SweepConfig, default: str
) -> Iterator[tuple[str, str, int | None, list[str]]]:
    """Variant, setting, seed and overrides of every point, in the order of the file."""
    axes = [[[(key, value)] for value in values] for key, values in config.grid.items()]
    if config.zip:
        lengths = {key: len(values) for key, values in config.zip.items()}
        if len(set(lengths.values())) != 1:
            raise ConfigError("sweep.zip", f"lists of different lengths: {lengths}")
        axes.append([list(zip(config.zip, row, strict=True)) for row in _rows(config.zip)])
    for key in ("grid", "zip"):
        for name, values in getattr(config, key).items():
            if not values:
                raise ConfigError(f"sweep.{key}.{name}", "an empty list leaves no point")
            if name == "seed":
                raise ConfigError(f"sweep.{key}.seed", "seeds have a list of their own: seeds")
    labels = _labels([*config.grid, *config.zip])
    variants = config.points or {"" if axes else default: []}
    seeds: Sequence[int | None] = config.seeds or [None]
    for (variant, overrides), *chosen in itertools.product(variants.items(), *axes):
        pairs = [pair for part in chosen for pair in part]
        setting = " ".join(f"{labels[key]}={_shown(value)}" for key, value in pairs)
        for seed in seeds:
            seeded = [] if seed is None else [f"seed={seed}"]
            yield (
                variant,
                setting,
                seed,
                [*overrides, *(override(k, v) for k, v in pairs), *seeded],
            )


def _rows(columns: dict[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*columns.values(), strict=True)


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, the whole key where that is not unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return {k: part if last.count(part) == 1 else k for k, part in zip(keys, last, strict=True)}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _point(
    base: Path, sweep: Path, variant: str, setting: str, seed: int | None, overrides: list[str]
) -> Point:
    name = _join(variant, setting, "" if seed is None else f"seed={seed}")
    folder = sweep / _folder_name(name)
    own = [override("run.name", name), override("run.dir", str(folder))]
    try:
        experiment = load_experiment(base, [*overrides, *own])
    except ConfigError as error:
        raise ConfigError(f"point {name!r}", str(error)) from error
    return Point(variant, setting, seed, folder, experiment)


def _folder_name(name: str) -> str:
    """Letters, digits and ``.=+-_``; a long name is cut and ends with its hash."""
    safe = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).lstrip("._-").rstrip("_") or "point"
    if len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_distinct(points: Sequence[Point]) -> None:
    """Refuse points that would share a folder or a checkpoint, or are the same training."""
    if not points:
        raise ConfigError("sweep", "there is no point")
    _refuse_twins([(p, p.folder.name.casefold()) for p in points], "folder", "rename one of them")
    saves = [(p, p.experiment.megatron.get("save")) for p in points]
    _refuse_twins(
        [(p, str(save)) for p, save in saves if save is not None],
        "save",
        "save below ${run.dir} in the experiment",
    )
    _refuse_twins(
        [(p, _identity(p)) for p in points],
        "configuration",
        "of a key that is set twice the later value counts: points, grid, zip, seeds",
    )


def _identity(point: Point) -> str:
    """The configuration without the names of the run."""
    resolved = {k: v for k, v in point.experiment.resolved.items() if k != "run"}
    return json.dumps(resolved, ensure_ascii=False, default=str).replace(str(point.folder), "")


def _refuse_twins(marks: Sequence[tuple[Point, str]], what: str, remedy: str) -> None:
    seen: dict[str, Point] = {}
    for point, mark in marks:
        if mark in seen:
            raise ConfigError(
                f"point {point.name!r}", f"has the {what} of {seen[mark].name!r}", remedy=remedy
            )
        seen[mark] = point
