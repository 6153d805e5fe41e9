"""The page: its structure, what it escapes, what it says where something is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import planted
import pytest
from records import start, step, validation
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import UARError
from uar_megatron.reporting import figures
from uar_megatron.reporting.html import differences, missing_signals, render
from uar_megatron.reporting.report import write_report
from uar_megatron.reporting.runlog import NoRecordError
from uar_megatron.reporting.view import load_views

EVIL = '</script><script>alert("x")</script><b>&'
VOID = {"meta", "link", "input", "br", "img"}


class Outline(HTMLParser):
    """Checks nesting; collects text outside scripts, ids, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.data = ""
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[n] for n in ("src", "href") if n in values]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag if values.get("id") != "data" else "data")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().replace("data", "script") == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.data += data
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_figures.py`` draws them all."""
    few = {name: figures.FIGURES[name] for name in ("overview", "expert_counts")}
    monkeypatch.setattr(figures, "FIGURES", few)


def page(*folders: Path) -> tuple[Outline, dict[str, object]]:
    text = render(load_views(folders))
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert all(a.startswith(("#", "data:")) for a in outline.addresses)
    # The namespace of SVG is a name, nothing is fetched from it.
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in text
    assert "@import" not in text
    return outline, json.loads(outline.data)


def test_one_run(tmp_path: Path) -> None:
    run = planted.write(tmp_path / "run", planted.records())
    outline, data = page(run)
    for words in (
        "planted",
        "Symmetry breaking",
        "Cognitive vacuum",
        "bias runs away",
        "in_domain",
    ):
        assert words in outline.text
    assert data["runs"][0]["layers"] == [2, 3, 4, 5, 6, 7]
    assert len(data["runs"][0]["steps"]) <= 240
    assert data["runs"][0]["phases"][1][0] == "Symmetry breaking"
    assert "Not in the log" not in outline.text
    assert render(load_views([run])) == render(load_views([run]))


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    one = planted.write(tmp_path / "one", planted.records(steps=40, name=EVIL))
    other = planted.write(
        tmp_path / "other", planted.records(steps=40, name="b", config={"note": EVIL})
    )
    outline, data = page(one, other)
    assert EVIL in outline.text
    assert data["runs"][0]["label"] == EVIL
    assert outline.scripts == 2


def test_several_runs_are_compared(tmp_path: Path) -> None:
    one = planted.write(
        tmp_path / "one", planted.records(steps=40, observe=20, config={"lr": 2e-3})
    )
    other = planted.write(tmp_path / "other", planted.records(steps=40, observe=0))
    views = load_views([one, other])
    assert [v.label for v in views] == ["planted (1: one)", "planted (2: other)"]
    assert differences(views) == [("lr", ["0.002", "0.001"])]
    texts = missing_signals(views)
    assert all(text.startswith("planted (2: other)") for text in texts)
    assert ["uar.observe.interval" in text for text in texts] == [True, False]
    assert ["uar.observe.probe_interval" in text for text in texts] == [False, True]
    outline, data = page(one, other)
    assert "2 runs compared" in outline.text
    assert len(data["runs"]) == 2


def test_the_command_that_trains_again(tmp_path: Path) -> None:
    config = {
        "run": {"name": "x", "dir": "runs/x"}, "save": "runs/x/checkpoints", "data": "runs/xy/data",
    }  # fmt: skip
    run = planted.write(tmp_path / "a b", planted.records(steps=4, observe=0, config=config))
    outline, _ = page(run)
    expected = "run.dir=runs/x-again save=runs/x-again/checkpoints"
    assert f"uar train '{run}/config.yaml' {expected}\n" in outline.text + "\n"
    outline, _ = page(planted.write(tmp_path / "watched", planted.records(steps=4, observe=0)))
    assert "started by a script" in outline.text


def test_nan_none_and_missing_parts(tmp_path: Path) -> None:
    odd = step(3, loss=math.nan)
    odd.layers[0].energy_mean = math.inf
    run = planted.write(
        tmp_path, [start(0), step(1, layers=0, loss=None), step(2), odd, validation(3, a=math.nan)]
    )
    outline, data = page(run)
    assert data["runs"][0]["loss"] == [None, 3, None]
    assert data["runs"][0]["metrics"]["energy_mean"][2][0] is None
    assert "not yet distinguishable: only 3 logged steps" in outline.text


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("content", ["", "start", "truncated", "older"])
def test_logs_that_are_hardly_there(content: str, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    whole = start(0).to_line() + step(1).to_line()
    old = re.sub(r'"zscore_(mean|std)":[^,]+,', "", whole).replace('"schema":1', '"schema":0')
    log.write_text(
        {"": "", "start": start(0).to_line(), "truncated": whole[:-300], "older": old}[content]
    )
    outline, _ = page(tmp_path)
    words = {
        "": "The log is empty", "start": "first logging interval", "truncated": "not whole records",
        "older": "has no zscore_mean, zscore_std",
    }[content]  # fmt: skip
    assert words in outline.text
    written = write_report([tmp_path])
    assert (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["notes"]
    assert any(line.startswith("not drawn") for line in written.lines)


@pytest.mark.usefixtures("few_figures")
def test_the_command(tmp_path: Path) -> None:
    one = planted.write(tmp_path / "one", planted.records(steps=30, observe=10))
    other = planted.write(tmp_path / "other", planted.records(steps=30, observe=10, seed=1))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"unigram": {"valid_in_domain": {"perplexity": 100.0}}}))
    result = CliRunner().invoke(app, ["report", str(one), "--manifest", str(manifest)])
    assert result.exit_code == 0
    assert "| in_domain | 2.4270 | 11.32 | 100.0 | 8.83 |" in result.stdout
    assert (one / "figures" / "overview.png").is_file()
    result = CliRunner().invoke(app, ["report", str(one), str(other / "run.jsonl")])
    assert result.exit_code == 0
    assert len(json.loads((one / "comparison.json").read_text())) == 2
    assert (one / "comparison_figures" / "expert_counts.svg").is_file()
    assert not (other / "report.html").exists()
    with pytest.raises(NoRecordError):
        write_report([tmp_path / "none"])
    with pytest.raises(UARError, match="manifest"):
        write_report([one], manifest=tmp_path / "none.json")
