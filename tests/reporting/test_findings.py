"""Planted troubles are found in the right layer; a calm run has none."""

from __future__ import annotations

import planted
import pytest

from uar_megatron.reporting.findings import Finding, find
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.series import Series


def findings(**options: object) -> list[Finding]:
    run = Run()
    for record in planted.records(observe=0, **options):
        run.add(record)
    return find(run, Series(run))


@pytest.mark.parametrize("layer", [2, 4, 7])
def test_the_vacuum_layer_is_found(layer: int) -> None:
    found = findings(vacuum=layer, exploding=None, steps=60)
    assert [(f.kind, f.layers) for f in found] == [("vacuum", (layer,))]
    assert f"layer {layer}, 70%" in found[0].text


@pytest.mark.parametrize("layer", [2, 3, 6])
def test_the_exploding_bias_is_found(layer: int) -> None:
    found = findings(vacuum=None, exploding=layer, steps=200)
    assert [(f.kind, f.layers) for f in found] == [("bias", (layer,))]


@pytest.mark.parametrize("seed", range(5))
def test_flat_noise_raises_no_alarm(seed: int) -> None:
    assert findings(vacuum=None, exploding=None, moves=False, steps=80, seed=seed) == []


def test_counts_are_told() -> None:
    run = Run()
    for record in planted.records(vacuum=None, exploding=None, steps=30, observe=0):
        run.add(record)
    run.steps[3].skipped = 2
    run.steps[4].layers[1].nonfinite = 7
    kinds = {f.kind: f for f in find(run, Series(run))}
    assert set(kinds) == {"skipped", "nonfinite"}
    assert "2 steps" in kinds["skipped"].text
    assert kinds["nonfinite"].layers == (3,)
    assert find(Run(), Series(Run())) == []
