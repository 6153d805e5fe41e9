"""The task group ``uar``: the ten benchmarks of Table 1, on data from a folder or from the hub.

A folder of data has a file for each split, ``FOLDER/TASK/SPLIT.jsonl`` (or ``.json``,
``.parquet``), MMLU one for each subject, ``FOLDER/mmlu/SUBJECT/SPLIT.jsonl``. Columns are those of
the data sets that lm-eval's own definitions read; for LogiQA ``label`` (a … d), ``context``,
``question``, ``options``. ``FOLDER/TASK/note.yaml`` may say with a ``note`` how the data differ
from the original ones; results and tables then say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from uar_megatron.config import Section, nearest, parse_section
from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.experiment import read_yaml

GROUP = "uar"
NOTE = "note.yaml"
SUFFIXES = (".jsonl", ".json", ".parquet")
_HOW_TO_GET = (
    "scripts/prepare_benchmarks.py makes such a folder (LogiQA: from its authors' Test.txt)"
)

# lm-eval resolves it before it looks for the model, if this file is what `--tasks` names.
_IMPORTS_THE_MODEL = """metadata:
  version: 1
  model: !function uar_megatron.evaluation.lm.UARMegatronLM
"""


class Benchmark(Section):
    """A benchmark of Table 1."""

    title: str
    """Its heading there."""
    source: str
    """lm-eval's definition, below its folder of tasks; several with a ``*``."""
    shots: int
    """Examples in the prompt."""
    splits: list[str]
    """Evaluated on: the first that there is."""
    shots_from: list[str]
    """Examples are from: the first that there is, else from the split that is evaluated on."""
    hub: str | None
    """Where its data are on the HuggingFace hub."""
    parts: int = 1
    """Subjects."""


@dataclass(frozen=True)
class Task:
    """One benchmark as it will be evaluated.

    Attributes:
        name: lm-eval's, and ours.
        benchmark: what it is.
        shots: examples in the prompt.
        split: evaluated on; None for what lm-eval takes from the hub.
        shots_from: split of the examples, None if there are none.
        files: for each subject ("" for those without) the file of each split; empty for the hub.
        data_note: how the folder's data differ from the original ones.
    """

    name: str
    benchmark: Benchmark
    shots: int
    split: str | None = None
    shots_from: str | None = None
    files: Mapping[str, Mapping[str, Path]] | None = None
    data_note: str | None = None

    @property
    def note(self) -> str | None:
        """What differs from the benchmark as it is usually run."""
        notes = []
        if self.split is not None and self.split != self.benchmark.splits[0]:
            notes.append(f"evaluated on {self.split}, not on {self.benchmark.splits[0]}")
        if self.files is not None and len(self.files) < self.benchmark.parts:
            notes.append(f"{len(self.files)} of {self.benchmark.parts} subjects")
        if self.shots and self.shots_from is not None and self.shots_from == self.split:
            notes.append(f"examples from the {self.split} split itself")
        if self.data_note:
            notes.append(self.data_note)
        return "; ".join(notes) or None


def benchmarks() -> dict[str, Benchmark]:
    """The benchmarks by task name, in the order of Table 1."""
    plain = OmegaConf.to_container(read_yaml(Path(__file__).with_name("benchmarks.yaml")))
    assert isinstance(plain, dict)
    return {str(name): parse_section(Benchmark, of, str(name)) for name, of in plain.items()}


def choose(
    names: Sequence[str], data: Path | None = None, shots: Mapping[str, int] | None = None
) -> list[Task]:
    """Return the benchmarks that are asked for, with the files of their data.

    Args:
        names: tasks, or ``uar`` for all.
        data: folder of data; None to let lm-eval get them.
        shots: other numbers of examples, by task.

    Raises:
        ConfigError: there is no such benchmark.
        DataError: data are missing (the message lists all that are), or a note is not readable.
    """
    known, shots = benchmarks(), shots or {}
    wanted = list(dict.fromkeys(n for name in names for n in (known if name == GROUP else [name])))
    for name in (*wanted, *shots):
        if name not in known:
            raise ConfigError(
                "tasks",
                f"{name}",
                allowed=f"{GROUP}, {', '.join(known)}",
                remedy=nearest(name, known),
            )
    found, missing = [], []
    for name in wanted:
        benchmark = known[name]
        count = shots.get(name, benchmark.shots)
        if data is None:
            if benchmark.hub is None:
                missing.append(f"{name}: on no hub that lm-eval can read")
            found.append(Task(name, benchmark, count))
            continue
        task = _from_folder(name, benchmark, count, data)
        if task is None:
            missing.append(
                f"{name}: {data / name}/{'SUBJECT/' * (name == 'mmlu')}"
                f"{'|'.join(benchmark.splits)}{'|'.join(SUFFIXES)}"
            )
        else:
            found.append(task)
    if missing:
        raise DataError(
            "tasks: data are missing\n"
            + "".join(f"  {line}\n" for line in missing)
            + f"  remedy:  {_HOW_TO_GET}; name it with --data, or leave these tasks out"
        )
    return found


def _from_folder(name: str, benchmark: Benchmark, shots: int, data: Path) -> Task | None:
    folders = {"": data / name}
    if "*" in benchmark.source:
        subjects = sorted((data / name).iterdir()) if (data / name).is_dir() else []
        folders = {folder.name: folder for folder in subjects if folder.is_dir()}
    files = {subject: _files(folder) for subject, folder in folders.items()}
    every = set.intersection(*(set(of) for of in files.values())) if files else set()
    split = next((s for s in benchmark.splits if s in every), None)
    if split is None:
        return None
    shots_from = next((s for s in benchmark.shots_from if s in every), split) if shots else None
    return Task(name, benchmark, shots, split, shots_from, files, _read_note(data / name / NOTE))


def _read_note(path: Path) -> str | None:
    if not path.exists():
        return None
    note = read_yaml(path).get("note")
    if not isinstance(note, str):
        raise DataError(f"tasks: {path} has no `note`\n  allowed: one line: note: TEXT")
    return note


def _files(folder: Path) -> dict[str, Path]:
    found = (p for suffix in SUFFIXES for p in sorted(folder.glob(f"*{suffix}")))
    return {path.stem: path.resolve() for path in found}


def write_tasks(tasks: Sequence[Task], folder: Path) -> list[str]:
    """Write lm-eval's definitions of these tasks, and of the group ``uar``, into a folder.

    Returns what ``lm_eval --tasks`` takes: the file of one task, and the names of the others.

    An overlay includes lm-eval's own definition by its path: what is written inline in a group
    would not inherit from it.
    """
    for task in tasks:
        sources = _sources(task)
        names = []
        for subject, source in sources.items():
            overlay = _overlay(task, subject, source)
            names.append(overlay["task"])
            _dump(overlay, folder / f"{overlay['task']}.yaml", _IMPORTS_THE_MODEL)
        if "*" in task.benchmark.source:
            acc = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
            group = {"group": task.name, "task": names, "aggregate_metric_list": acc}
            _dump(group, folder / f"{task.name}.group.yaml")
    _dump({"group": GROUP, "task": [task.name for task in tasks]}, folder / f"{GROUP}.group.yaml")
    files = [folder / f"{task.name}.yaml" for task in tasks]
    whole = [file for file in files if file.exists()][:1]
    return [
        *map(str, whole),
        *(task.name for task in tasks if not whole or task.name != whole[0].stem),
    ]


def _dump(content: Mapping[str, Any], path: Path, more: str = "") -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False) + more, encoding="utf-8")


def _sources(task: Task) -> dict[str, Path]:
    """lm-eval's own definitions by subject; "" where there is one."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    pattern = task.benchmark.source
    if "*" not in pattern:
        return {"": root / pattern}
    prefix = Path(pattern).stem.removesuffix("*")
    sources = {path.stem.removeprefix(prefix): path for path in sorted(root.glob(pattern))}
    if task.files is None:
        return sources
    unknown = sorted(set(task.files) - set(sources))
    if unknown:
        raise DataError(
            f"tasks: {task.name} has no subject {', '.join(unknown)}\n"
            f"  allowed: {', '.join(sources)}"
        )
    return {subject: sources[subject] for subject in task.files}


def _overlay(task: Task, subject: str, source: Path) -> dict[str, Any]:
    overlay: dict[str, Any] = {
        "include": str(source),
        "task": f"{task.name}_{subject}" if subject else task.name,
        "tag": None,
        "num_fewshot": task.shots,
    }
    if task.files is None:
        return overlay
    assert task.split is not None
    used = {task.split, task.shots_from} - {None}
    files = {split: str(task.files[subject][split]) for split in sorted(used)}  # type: ignore[type-var,index]
    kinds = {"parquet" if file.endswith(".parquet") else "json" for file in files.values()}
    if len(kinds) > 1:
        raise UARError(
            f"tasks: {task.name} has both JSON and parquet files: {', '.join(files.values())}\n"
            "  remedy:  keep one kind"
        )
    return overlay | {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": None,
        "test_split": task.split,
        "fewshot_split": task.shots_from,
    }
