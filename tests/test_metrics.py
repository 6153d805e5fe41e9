"""The run log's numbers against a count written out in Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from uar_megatron.config import StatesConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.metrics import LayerMetrics, describe, describe_evaluation, state_thresholds


def batch(tokens: int, seed: int) -> tuple[Uncertainty, RoutingDecision, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.randn(tokens, generator=generator) - 2
    entropy = 2 * torch.rand(tokens, generator=generator)
    routing_map = torch.rand(tokens, 4, generator=generator) < 0.5
    decision = RoutingDecision(routing_map.float(), routing_map, routing_map.sum(dim=1))
    zscores = torch.randn(tokens, generator=generator)
    finite = torch.isfinite(energy)
    one = torch.ones(())
    measured = Uncertainty(energy, entropy, energy, zscores, finite, one, one)
    return measured, decision, torch.rand(tokens)


def reader_of(max_k: int) -> LayerMetrics:
    metrics = LayerMetrics(4, max_k, (1.0, -2.0), "cpu")
    metrics.has_reader = True
    return metrics


def test_equals_a_count_by_hand() -> None:
    metrics = reader_of(4)
    steps = []
    for step in range(3):
        parts = [batch(n, 10 * step + n) for n in (0, 5, 7)]
        for uncertainty, decision, omega in parts:
            metrics.add(uncertainty, decision, omega, None)
            metrics.add_loss("aux_loss", torch.tensor(2.0 + step), share=0.5)
            metrics.add_rows(int(decision.k_T.sum()))
        metrics.end_step()
        steps.append(parts)
    record = describe(metrics.flat(6), 4, 6, 3)
    flat = [p for parts in steps for p in parts]
    energy = torch.cat([p[0].energy_T for p in flat]).double()
    entropy = torch.cat([p[0].entropy_T for p in flat]).double()
    k = torch.cat([p[1].k_T for p in flat])
    assert record["tokens"] == 36
    assert record["energy_mean"] == pytest.approx(energy.mean().item())
    assert record["energy_std"] == pytest.approx(energy.std(unbiased=False).item())
    assert record["entropy_std"] == pytest.approx(entropy.std(unbiased=False).item())
    z = torch.cat([p[0].zscore_T for p in flat]).double()
    assert record["zscore_mean"] == pytest.approx(z.mean().item())
    assert record["zscore_std"] == pytest.approx(z.std(unbiased=False).item())
    assert record["k_eff"] == pytest.approx(k.double().mean().item())
    assert record["k_histogram"] == pytest.approx(
        [(k == i).double().mean().item() for i in range(7)]
    )
    slots = torch.cat([p[1].routing_map_TE for p in flat])
    shares = (slots.sum(dim=0) / slots.sum()).tolist()
    assert record["load"] == pytest.approx(shares)
    assert record["utilisation_entropy"] == pytest.approx(-sum(x * math.log(x) for x in shares))
    assert record["omega_mean"] == pytest.approx(torch.cat([p[2] for p in flat]).mean().item())
    high_h, high_f = entropy > 1.0, energy > -2.0
    expected = [~high_h & ~high_f, high_h & ~high_f, ~high_h & high_f, high_h & high_f]
    assert record["states"] == pytest.approx([e.double().mean().item() for e in expected])
    assert record["rows"] * 3 == k.sum()
    assert record["balancing_loss"] == {"aux_loss": pytest.approx(2 * (2.0 + 3.0 + 4.0) / 3)}
    violations = []
    for parts in steps:
        load = sum(p[1].routing_map_TE.sum(dim=0) for p in parts).double()
        violations.append((load.max() / load.mean() - 1).item())
    assert record["max_vio"] == pytest.approx(sum(violations) / 3)
    assert sum(record["load"]) == pytest.approx(1.0)
    metrics.clear()
    assert torch.count_nonzero(metrics.flat(4)) == 0


def test_nonfinite_tokens_are_counted_apart() -> None:
    metrics = reader_of(4)
    uncertainty, decision, _ = batch(6, 0)
    uncertainty.energy_T[2] = math.nan
    uncertainty.finite_T[2] = False
    valid = torch.tensor([True] * 5 + [False])
    metrics.add(uncertainty, decision, None, valid)
    metrics.end_step()
    record = describe(metrics.flat(4), 4, 4, 1)
    assert (record["tokens"], record["nonfinite"]) == (4, 1)
    assert math.isfinite(record["energy_mean"])
    assert record["omega_mean"] == 1.0
    assert record["balancing_loss"] == {}


@pytest.mark.parametrize("nonfinite", [0, 6])
def test_without_a_token_there_is_no_mean(nonfinite: int) -> None:
    """A calm and balanced layer has an energy and a MaxVio of 0; one of NaN must not look so."""
    metrics = reader_of(4)
    if nonfinite:
        uncertainty, decision, _ = batch(nonfinite, 0)
        gone = dataclasses.replace(uncertainty, finite_T=torch.zeros(nonfinite, dtype=torch.bool))
        metrics.add(gone, decision, None, None)
    metrics.end_step()
    record = describe(metrics.flat(4), 4, 4, 1)
    assert (record["tokens"], record["nonfinite"]) == (0, nonfinite)
    means = ("energy_mean", "energy_std", "entropy_mean", "zscore_mean", "omega_mean", "k_eff")
    assert all(math.isnan(record[name]) for name in (*means, "max_vio"))
    assert record["load"] == [0.0] * 4
    evaluated = describe_evaluation(torch.zeros(5, dtype=torch.float64))
    assert math.isnan(evaluated["k_eff"])
    assert math.isnan(evaluated["max_vio"])


def test_default_thresholds() -> None:
    assert state_thresholds(StatesConfig(), 8, 2.0) == (0.5 * math.log(8), -2.0 * math.log(8))
    assert state_thresholds(StatesConfig(entropy=1.0, energy=-3.0), 8, 1.0) == (1.0, -3.0)


def test_without_a_reader_nothing_is_kept() -> None:
    metrics = LayerMetrics(4, 4, (1.0, -2.0), "cpu")
    uncertainty, decision, _ = batch(6, 0)
    for _ in range(3):
        metrics.add(uncertainty, decision, None, None)
        metrics.end_step()
    assert len(metrics.flat(4)) == LayerMetrics.width(4, 4, 0)
    assert torch.count_nonzero(metrics.flat(4)) == 0


def test_a_step_that_is_repeated_counts_once() -> None:
    metrics = reader_of(4)
    uncertainty, decision, _ = batch(6, 0)
    metrics.add(uncertainty, decision, None, None)
    metrics.end_step()
    expected = metrics.flat(4)
    snapshot = metrics.snapshot()
    metrics.add(uncertainty, decision, None, None)
    metrics.end_step()
    metrics.restore(snapshot)
    assert torch.equal(metrics.flat(4), expected)
