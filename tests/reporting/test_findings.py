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
    return find(run, Series(run), len(run.steps))


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


@pytest.mark.parametrize(("experts", "topk", "limit"), [(8, 2, 1.5), (8, 4, 0.5), (64, 2, 5.0)])
def test_a_collapse_of_the_load_is_found(experts: int, topk: int, limit: float) -> None:
    """Of 8A2 MaxVio is 3 when all tokens go to the same two experts."""
    run = Run()
    for record in planted.records(vacuum=None, exploding=None, moves=False, steps=60, observe=0):
        run.add(record)
    run.starts[0].num_experts, run.starts[0].topk = experts, topk
    for record in run.steps:
        for metrics in record.layers:
            metrics.max_vio = limit + (0.2 if metrics.layer in (3, 5) else -0.2)
    found = find(run, Series(run), len(run.steps))
    assert [(f.kind, f.layers) for f in found] == [("load", (3, 5))]
    assert f"MaxVio is {limit + 0.2:.1f}" in found[0].text


def test_the_last_quarter_is_one_of_steps() -> None:
    """Of records it would be half in a vacuum: a resume made the logging interval 100 steps."""
    run = Run()
    for record in planted.records(vacuum=None, exploding=None, moves=False, steps=40, observe=0):
        run.add(record)
    for place, record in enumerate(run.steps):
        record.step = place + 1 if place < 20 else 20 + 100 * (place - 19)
        if record.step <= 1520:
            record.layers[2].states = [0.0, 0.0, 0.0, 1.0]
    assert find(run, Series(run), len(run.steps)) == []


def test_counts_are_told() -> None:
    run = Run()
    for record in planted.records(vacuum=None, exploding=None, steps=30, observe=0):
        run.add(record)
    run.steps[3].skipped = 2
    run.steps[4].layers[1].nonfinite = 7
    kinds = {f.kind: f for f in find(run, Series(run), len(run.steps))}
    assert set(kinds) == {"skipped", "nonfinite"}
    assert "2 steps" in kinds["skipped"].text
    assert kinds["nonfinite"].layers == (3,)
    assert not any("logged" in f.text for f in kinds.values())
    # Of a sample they are not those of the run.
    for finding in find(run, Series(run), 300):
        assert " in 30 of the 300 logged steps" in finding.text
    assert find(Run(), Series(Run()), 0) == []
