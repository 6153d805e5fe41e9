"""Evaluations of several runs in the layout of Table 1."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import ConfigError, DataError
from uar_megatron.evaluation.results import add_tasks, kept_results, load_results, save_results
from uar_megatron.evaluation.table1 import make_table1
from uar_megatron.evaluation.tasks import benchmarks

COLUMNS = [
    "FLOPs",
    "SciQ",
    "PIQA",
    "WG",
    "ARC-E",
    "ARC-C",
    "Hella.",
    "LogiQA",
    "BoolQ",
    "Lam.",
    "MMLU",
    "Avg.",
    "k_eff",
]


def results(run: str, acc: float, **changes: Any) -> dict[str, Any]:
    """Of all ten tasks, with the accuracy rising from task to task."""
    tasks = {
        name: {
            "metrics": {"acc": acc + i / 100, "acc_stderr": 0.01},
            "shots": of.shots,
            "note": None,
            "group": None,
            "usage": {
                "tokens": 100 * (i + 1),
                "k_eff": 2.0 + i / 10,
                "flops_per_token": 7.0 - i / 2,
                "flops_ratio": 1.0 + i / 100,
            },
        }
        for i, (name, of) in enumerate(benchmarks().items())
    }
    perplexity = {"valid": {"tokens": 10, "perplexity": 20.0 + acc, "max_vio": acc / 2}}
    head = {"kind": "uar evaluation", "version": 1, "run": run, "limit": None}
    return {**head, "tasks": tasks, "perplexity": perplexity, **changes}


def written(folder: Path, *of: dict[str, Any]) -> list[Path]:
    paths = [folder / f"{i}.json" for i in range(len(of))]
    for path, content in zip(paths, of, strict=True):
        save_results(content, path)
    return paths


def test_columns_and_means(tmp_path: Path) -> None:
    paths = written(tmp_path, results("topk", 0.2), results("uar", 0.3), results("uar", 0.5))
    frame = pd.read_csv(StringIO(make_table1(paths, "csv")), index_col="run")
    shown = [c for c in frame.columns if not c.endswith(" se")]
    assert shown == ["seeds", *COLUMNS, "Perplexity valid", "MaxVio global valid"]
    assert frame.loc["topk", "seeds"] == 1
    assert frame.loc["topk", "SciQ"] == pytest.approx(20.0)
    assert frame.loc["topk", "MMLU"] == pytest.approx(29.0)
    assert frame.loc["topk", "Avg."] == pytest.approx(24.5)
    assert pd.isna(frame.loc["topk", "Avg. se"])
    assert frame.loc["uar", "SciQ"] == pytest.approx(40.0)
    assert frame.loc["uar", "SciQ se"] == pytest.approx(10.0)  # sd 0.1414 of two, over √2
    assert frame.loc["uar", "Perplexity valid"] == pytest.approx(20.4)
    assert frame.loc["uar", "MaxVio global valid"] == pytest.approx(0.2)
    weights = [100 * (i + 1) for i in range(10)]
    k_eff = sum(w * (2 + i / 10) for i, w in enumerate(weights)) / sum(weights)
    assert frame.loc["topk", "k_eff"] == pytest.approx(k_eff)
    flops = sum(w * (7 - i / 2) for i, w in enumerate(weights))
    top_k = sum(w * (7 - i / 2) / (1 + i / 100) for i, w in enumerate(weights))
    assert frame.loc["topk", "FLOPs"] == pytest.approx(flops / top_k)


def test_text_and_notes(tmp_path: Path) -> None:
    partly = results("part", 0.25, limit=7)
    del partly["tasks"]["mmlu"]
    partly["tasks"]["sciq"]["note"] = "evaluated on validation, not on test"
    partly["tasks"]["boolq"]["shots"] = 2
    partly["tasks"]["piqa"]["usage"] = {"tokens": 0, "requests": 9, "usage_of": 0}
    paths = written(tmp_path, results("topk", 0.2), results("topk", 0.4), partly)
    text = make_table1(paths)
    lines = text.splitlines()
    assert lines[0].startswith("|  | seeds | FLOPs | SciQ | PIQA |")
    assert lines[2].startswith("| topk | 2 | 1.052 ± 0.000 | 30.0 ± 10.0 |")
    # A mean over nine tasks could not be compared with one over ten.
    assert "| 33.0 | – | – | 2.5" in lines[3]
    for entry in partly["tasks"].values():
        entry["usage"] = {"tokens": 0, "requests": 9, "usage_of": 0}
    assert "| part | 1 | – |" in make_table1(written(tmp_path / "cached", partly))
    for note in (
        "- only the first 7 documents (part)",
        "- sciq: evaluated on validation, not on test (part)",
        "- boolq: 2-shot (part)",
        "- piqa: FLOPs and k_eff over 0 of 9 requests, the others cached (part)",
    ):
        assert note in lines
    latex = make_table1(paths, "latex")
    assert latex.startswith(r"\begin{tabular}{l" + "r" * 16 + "}")
    assert "\ntopk & 2 & " in latex


def test_the_command_takes_files_and_runs(tmp_path: Path) -> None:
    (path,) = written(tmp_path, results("file", 0.2))
    save_results(results("old", 0.1), tmp_path / "run" / "evaluation" / "iter_0000001.json")
    save_results(results("new", 0.1), tmp_path / "run" / "evaluation" / "iter_0000002.json")
    done = CliRunner().invoke(app, ["table", str(path), str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert [line.split("|")[1].strip() for line in done.output.splitlines()[2:4]] == ["file", "new"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"checkpoint": "a/iter_20"}, "of the same training"),
        ({"checkpoint": "a/iter_10", "iteration": 10}, "of the same training"),
        ({"checkpoint": "b/iter_10", "iteration": 10}, "after 10 steps, not 20"),
        ({"checkpoint": "b/iter_20", "policy": "topk"}, "with another routing"),
    ],
)
def test_what_are_no_seeds_of_one_run(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    usual = {"policy": "uar", "iteration": 20}
    first = results("run", 0.2, checkpoint="a/iter_20", **usual)
    paths = written(tmp_path, first, results("run", 0.2, **usual | changes))
    with pytest.raises(DataError, match=why):
        make_table1(paths)
    seed = results("run", 0.2, checkpoint="b/iter_20", **usual)
    assert "| run | 2 |" in make_table1(written(tmp_path, first, seed))


def test_results_are_added_to_those_of_the_same_evaluation(tmp_path: Path) -> None:
    head = {"identity": "a", "run": "uar", "limit": None}
    (path,) = written(tmp_path, results("uar", 0.2, identity="a"))
    wanted = {"mmlu": {"shots": 5, "note": None}}
    kept = kept_results(path, head, wanted)
    assert len(kept["tasks"]) == 10
    assert list(kept["perplexity"]) == ["valid"]
    assert kept_results(tmp_path / "none.json", head, wanted) == {"tasks": {}, "perplexity": {}}
    for changes, tasks, why in (
        ({"limit": 2}, {}, r"another limit\)"),
        ({"identity": "b"}, {}, r"another checkpoint or configuration\)"),
        ({}, {"mmlu": {"shots": 0, "note": None}}, "another shots of mmlu"),
    ):
        with pytest.raises(ConfigError, match=f"{why}[^$]*--output"):
            kept_results(path, {**head, **changes}, tasks)


def test_a_cached_evaluation_keeps_the_usage_there_is() -> None:
    def tasks(acc: float, **usage: int) -> dict[str, Any]:
        return {"sciq": {"metrics": {"acc": acc}, "usage": usage}}

    whole, part, more = tasks(0.1, tokens=9), tasks(0.2, usage_of=3), tasks(0.3, usage_of=4)
    assert add_tasks(whole, part) == tasks(0.2, tokens=9)
    assert add_tasks(more, part) == tasks(0.2, usage_of=4)
    assert add_tasks(part, more) == more
    assert add_tasks(part, whole) == whole
    assert add_tasks({"piqa": {}}, part) == {"piqa": {}, **part}


def test_bad_results(tmp_path: Path) -> None:
    for content, why in (
        ("{", "cannot be read"),
        ("[]", "no file that `uar eval` has written"),
        (json.dumps({"kind": "uar evaluation", "version": 99}), "allowed: 1"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=why):
            make_table1([tmp_path / "bad.json"])
    with pytest.raises(DataError, match="has no evaluation"):
        load_results(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_results(tmp_path / "none.json")
