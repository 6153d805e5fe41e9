"""The page in Chromium: no errors, no requests, accessible, fits the screen, usable, as approved.

Needs a Chromium, node, and what ``tests/browser/setup.sh`` installs; skipped, with the reason,
where one is missing. What is approved are the plots without their text, small: fonts and the flow
of text differ between machines, curves and colours must not. ``UAR_APPROVE=1`` approves what the
page looks like now: look at the screenshots first, they are in pytest's temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from PIL import Image

from uar_megatron.reporting.html import render
from uar_megatron.reporting.schema import Observation, Record, Step
from uar_megatron.reporting.view import load_views

BROWSER = Path(__file__).parents[1] / "browser"
APPROVED = Path(__file__).parent / "approved"
TILE = (72, 36)
"""Pixels that a plot is compared in."""
TILES_PER_ROW = 6
CLOSE = 6.0
"""Mean difference of a plot's pixels, of 255; another colour of one curve makes more."""


def browser() -> str:
    found = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))),
        None,
    )
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    if shutil.which("node") is None:
        pytest.skip("no node (20 or newer), which drives Chromium")
    if not (BROWSER / "node_modules" / "axe-core").is_dir():
        pytest.skip("axe-core and puppeteer-core are not installed: run tests/browser/setup.sh")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pages", ["one", "two", "unlike", "empty"])
def test_page_in_a_browser(pages: str, tmp_path: Path) -> None:
    chromium = browser()
    if pages == "empty":
        (tmp_path / "run.jsonl").touch()
        folders = [tmp_path]
    elif pages == "unlike":
        brief = planted.records(steps=100, layers=4, vacuum=None, exploding=None, name="brief")
        folders = [
            planted.write(tmp_path / "a", drifting()), planted.write(tmp_path / "b", brief)
        ]  # fmt: skip
    else:
        folders = [planted.write(tmp_path / "a", planted.records())]
    if pages == "two":
        evil = planted.records(name="</script><script>alert(1)</script>", vacuum=None,
                               exploding=None, observe=0, seed=1, begin=0.3, end=0.7)  # fmt: skip
        folders.append(planted.write(tmp_path / "b", evil))
    page = tmp_path / "report.html"
    page.write_text(render(load_views(folders)), encoding="utf-8")
    command = ["node", str(BROWSER / "look.mjs"), chromium, str(page), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen) == {"390-light", "390-dark", "1600-light", "1600-dark"}
    for name, view in seen.items():
        assert view["errors"] == [], name
        assert view["requests"] == [], name
        assert view["violations"] == [], name
        layout = view["layout"]
        assert layout["bad"] == [], name
        assert layout["widths"][0] <= layout["widths"][1], name
        assert (max(layout["paper"]) < 60) == name.endswith("dark")
        if pages == "empty":
            continue
        assert set(layout["columns"]) == ({1} if name.startswith("390") else {3})
        check_use(view["said"])
        if pages == "unlike":
            check_unlike(view["said"])
            continue
        compare(tmp_path / f"{name}-plots.png", layout["plots"], APPROVED / f"{pages}-{name}.png")


def drifting() -> list[Record]:
    """A run whose tokens move from state I to II with the steps, and which has no stability."""
    found = planted.records()
    for record in found:
        for m in record.layers if isinstance(record, Step) else []:
            m.states = [1 - record.step / 400, record.step / 400, 0.0, 0.0]
        for m in record.layers if isinstance(record, Observation) else []:
            m.stability = None
    return found


def check_use(said: dict[str, Any]) -> None:
    """Values are read, and steps and layers picked, by keyboard and pointer."""
    assert said["last"].startswith("step 400")
    assert said["first"].startswith("step 1:")
    assert said["picked_by_key"] == ["", "1"]
    assert said["hovered"].startswith("step 20")
    assert "layer 3: -" in said["hovered"]
    layer, step = said["picked_by_click"]
    assert (layer, abs(int(step) - 200) <= 3) == ("3", True)
    assert said["read_at_picked"].startswith(f"step {step}:")
    assert said["picker_top"] == 0
    # Validation is at every 80th step: none before it, between two the step is named.
    assert "in_domain –" in said["cards_at_first"]["Loss"]["readout"]
    assert re.search(r"in_domain \d\S* \(step (160|240)\)", said["read_at_picked"])


def check_unlike(said: dict[str, Any]) -> None:
    """A run of 400 steps and six layers beside one of 100 steps and four layers."""
    assert re.search(r"planted: training \d.* · brief: training – · ", said["last"])
    for at, seen in (("first", 50), ("picked", 200)):
        plane = said[f"cards_at_{at}"]["H–F plane with the four states"]
        assert f" at step {seen}, " in plane["label"]
        found = re.match(
            rf"step {seen}, [^:,]*(?:, shares of step (\d+))?: .* · II ambiguity (\S+) %",
            plane["readout"],
        )
        assert found
        step = int(found[1] or seen)
        assert abs(step - seen) <= 1
        assert plane["head"] == f"layer (step {step})"
        assert abs(float(found[2]) - step / 4) < 0.1
    cards = said["cards_at_last_layer"]
    for name in ("Free energy F, mean", "Norm of the router"):
        assert cards[name]["legend"] == "planted", name
    stability = cards["Stability of routing between probes"]
    assert stability == {"readout": "not in the log", "legend": "", "head": "step"}


def compare(screenshot: Path, plots: list[dict[str, Any]], approved: Path) -> None:
    """Every plot by itself, so that what stands between them may be of any height."""
    with Image.open(screenshot) as image:
        found = [
            image.convert("RGB").resize(TILE, Image.Resampling.BOX, plot["box"]) for plot in plots
        ]
    rows = -(-len(found) // TILES_PER_ROW)
    size = (TILE[0] * TILES_PER_ROW, TILE[1] * rows)
    places = [
        (TILE[0] * (i % TILES_PER_ROW), TILE[1] * (i // TILES_PER_ROW)) for i in range(len(found))
    ]
    if os.environ.get("UAR_APPROVE"):
        sheet = Image.new("RGB", size)
        for tile, place in zip(found, places, strict=True):
            sheet.paste(tile, place)
        APPROVED.mkdir(exist_ok=True)
        sheet.save(approved, optimize=True)
    with Image.open(approved) as image:
        sheet = image.convert("RGB")
    assert sheet.size == size, f"{screenshot}: {len(found)} plots"
    for tile, (x, y), plot in zip(found, places, plots, strict=True):
        expected = np.asarray(sheet.crop((x, y, x + TILE[0], y + TILE[1])), dtype=float)
        difference = np.abs(np.asarray(tile, dtype=float) - expected).mean()
        assert difference < CLOSE, f"{screenshot}: {plot['name']} differs by {difference:.1f}"
