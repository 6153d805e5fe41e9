"""Experiments: YAML files that are composed, overridden from the command line, and resolved.

A file may begin with ``defaults``: a list of ``group: name`` (the file ``group/name.yaml`` of the
configuration folder) or names of other experiments. Later entries win over earlier ones, the file
over its defaults, the command line over all. Everything that is not a section of ours (``uar``,
``run``, ``launch``) is a Megatron argument by its own name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from uar_megatron.config import Section, UARConfig, nearest, parse_section
from uar_megatron.errors import ConfigError

SECTIONS = ("uar", "run", "launch")
RUN_LOG, CONFIG = "run.jsonl", "config.yaml"
"""A run's log and its resolved configuration, in the run's folder."""


class RunConfig(Section):
    """Where a run leaves its log, figures and checkpoints."""

    name: str = "run"
    """Name in logs and figures."""
    dir: str = "runs/run"
    """Folder of the run: run log, resolved configuration, by default also checkpoints."""


class LaunchConfig(Section):
    """The processes of the job."""

    nproc_per_node: Annotated[int, Field(ge=1)] = 1
    """Ranks on each node: the number of GPUs, or of CPU processes."""
    nnodes: Annotated[int, Field(ge=1)] = 1
    """Nodes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` runs Megatron on the CPU with gloo; refused where CUDA works."""


@dataclass(frozen=True)
class Experiment:
    """A composed and resolved configuration.

    Attributes:
        uar: the UAR section.
        run: the run section.
        launch: the launch section.
        megatron: Megatron arguments by name.
    """

    uar: UARConfig
    run: RunConfig
    launch: LaunchConfig
    megatron: dict[str, Any]

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included; loading it again gives the same experiment."""
        sections = {name: getattr(self, name).model_dump() for name in SECTIONS}
        return {**sections, **self.megatron}

    def to_yaml(self) -> str:
        """Return :attr:`resolved` as YAML, a value a line: ``slurm.sbatch`` reads one of them."""
        return yaml.dump(
            self.resolved, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf
        )


class _Dumper(yaml.SafeDumper):
    """Quotes text that OmegaConf takes for a number and PyYAML does not, such as ``1e-3``."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represent a string."""
        try:
            float(text)
        except ValueError:
            return self.represent_str(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _Dumper.represent_text)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Compose, override, resolve and validate an experiment.

    Args:
        path: the experiment's YAML file.
        overrides: ``key=value`` with dotted keys, or ``group=name`` to exchange a group.

    Raises:
        ConfigError: a file is missing or broken, a key unknown, a value not allowed.
    """
    path = Path(path)
    groups, values = _split_overrides(overrides, _roots(path))
    composed = _compose(path, _roots(path), groups, set())
    try:
        merged = OmegaConf.merge(composed, OmegaConf.from_dotlist(values))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(str(path), _first_line(error)) from error
    assert isinstance(plain, dict)
    megatron = {str(k): v for k, v in plain.items() if k not in SECTIONS}
    for key, value in megatron.items():
        if isinstance(value, dict):
            raise ConfigError(
                key,
                "no such section",
                allowed=", ".join(SECTIONS),
                remedy=nearest(key, SECTIONS) or "Megatron arguments go to the top level",
            )
    return Experiment(
        uar=parse_section(UARConfig, plain.get("uar"), "uar"),
        run=parse_section(RunConfig, plain.get("run"), "run"),
        launch=parse_section(LaunchConfig, plain.get("launch"), "launch"),
        megatron=megatron,
    )


def values_of_group(path: Path, override: str) -> dict[str, Any] | None:
    """Return what ``group=name`` brings to an experiment, unresolved; None for any other override.

    Args:
        path: the experiment's file, for where groups are.
        override: from the command line.

    Raises:
        ConfigError: the group has no such file.
    """
    roots = _roots(path)
    groups, _ = _split_overrides([override], roots)
    for group, name in groups.items():
        file = _find(f"{group}/{name}.yaml", roots, path)
        plain = OmegaConf.to_container(_compose(file, roots, {}, set()))
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}
    return None


def load_uar_section(path: str | Path) -> UARConfig:
    """Read the UAR section for a Megatron script of your own.

    Args:
        path: a YAML file with a ``uar`` key, or with the section's fields at its root.
    """
    plain = OmegaConf.to_container(read_yaml(Path(path)), resolve=True)
    assert isinstance(plain, dict)
    return parse_section(UARConfig, plain.get("uar", plain), "uar")


def save_resolved(experiment: Experiment, folder: Path) -> None:
    """Write ``config.yaml`` into ``folder``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".config.yaml.{os.getpid()}"
    temporary.write_text(experiment.to_yaml(), encoding="utf-8")
    temporary.replace(folder / CONFIG)


def changes_of_run(
    experiment: Experiment, folder: Path, also_ignored: Sequence[str] = ()
) -> list[str]:
    """How an experiment differs from the run that a folder holds.

    Args:
        experiment: that is to be trained there.
        folder: of the run; without a run log it holds none.
        also_ignored: dotted keys that may differ, beside how long one process trains.

    Returns:
        A sentence for each key that differs.

    Raises:
        ConfigError: the folder's configuration cannot be read.
    """
    if not ((folder / CONFIG).exists() and (folder / RUN_LOG).exists()):
        return []
    before, now = _flat(load_experiment(folder / CONFIG).resolved), _flat(experiment.resolved)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted((before.keys() | now.keys()) - {"exit_duration_in_mins", *also_ignored})
        if before.get(key) != now.get(key)
    ]


def check_writable(field: str, folder: str | Path) -> None:
    """Make a folder and write a byte into it, so that a long run cannot end unsaved.

    Args:
        field: what names the folder.
        folder: it.

    Raises:
        ConfigError: it cannot be written to.
    """
    probe = Path(folder) / f".write_test.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            field,
            f"cannot write to {folder}: {error.strerror}",
            allowed="a folder this user can create and write to",
            remedy="choose another folder, or make this one writable",
        ) from error


def builtin_config_dir() -> Path:
    """The configurations that come with the package: inside a wheel, else the repository's."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _roots(path: Path) -> list[Path]:
    """Where groups are looked for: beside the file, in its parents' configs/, in the package."""
    folder = path.resolve().parent
    candidates = [folder, *(p / "configs" for p in (folder, *folder.parents)), builtin_config_dir()]
    return [c for c in dict.fromkeys(candidates) if c.is_dir()]


def _split_overrides(
    overrides: Sequence[str], roots: Sequence[Path]
) -> tuple[dict[str, str], list[str]]:
    groups: dict[str, str] = {}
    values = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                override, "not an override", allowed="key=value, e.g. lr=1e-3 or uar.policy=uar"
            )
        if "." not in key and key not in SECTIONS and any((root / key).is_dir() for root in roots):
            groups[key] = value
        else:
            values.append(override)
    return groups, values


def _compose(
    path: Path,
    roots: Sequence[Path],
    groups: dict[str, str],
    used: set[str],
    parents: tuple[Path, ...] = (),
) -> DictConfig:
    """Merge a file over its defaults.

    Args:
        path: the file.
        roots: folders of groups.
        groups: choices from the command line. They exchange groups of experiments, not those that
            a group's own file builds upon.
        used: collects the groups that were exchanged or could be; the others are added.
        parents: files that are being composed, to notice circles.
    """
    if path.resolve() in parents:
        chain = " -> ".join(p.name for p in (*parents, path))
        raise ConfigError("defaults", f"configurations include each other: {chain}")
    below = (*parents, path.resolve())
    config = read_yaml(path)
    parts = []
    for entry in config.pop("defaults", None) or []:
        if isinstance(entry, str):
            file = _find(f"{entry.removesuffix('.yaml')}.yaml", roots, path)
            parts.append(_compose(file, roots, groups, used, below))
            continue
        if not isinstance(entry, DictConfig) or len(entry) != 1:
            raise ConfigError(
                "defaults", f"{entry!r} in {path}", allowed="- group: name, or - experiment"
            )
        group = str(next(iter(entry)))
        used.add(group)
        file = _find(f"{group}/{groups.get(group, entry[group])}.yaml", roots, path)
        parts.append(_compose(file, roots, {}, set(), below))
    if not parents:
        for group in (group for group in groups if group not in used):  # later wins
            file = _find(f"{group}/{groups[group]}.yaml", roots, path)
            parts.append(_compose(file, roots, {}, set(), below))
    merged = OmegaConf.merge(*parts, config)
    assert isinstance(merged, DictConfig)
    return merged


def _find(name: str, roots: Sequence[Path], wanted_by: Path) -> Path:
    for root in roots:
        if (root / name).is_file():
            return root / name
    folder = Path(name).parent
    known = sorted({p.stem for root in roots for p in (root / folder).glob("*.yaml")})
    raise ConfigError(
        str(folder) if str(folder) != "." else "defaults",
        f"{wanted_by.name} asks for {name}, which is in none of {', '.join(map(str, roots))}",
        allowed=", ".join(known) or None,
        remedy=nearest(Path(name).stem, known),
    )


def read_yaml(path: Path) -> DictConfig:
    """Read a file whose root is a mapping; nothing is composed or resolved.

    Raises:
        ConfigError: it is missing, or not such a file.
    """
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            str(path),
            "no such configuration file",
            allowed=", ".join(known) or None,
            remedy=nearest(path.name, known),
        )
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            str(path), f"not valid YAML{place}: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(str(path), "a configuration is a mapping of keys to values")
    return config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
