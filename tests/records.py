"""Records of a made-up run."""

from __future__ import annotations

import math

from uar_megatron.reporting.schema import LayerMetrics, Start, Step, Validation


def start(at: int) -> Start:
    return Start(
        time=0.0, run="made up", step=at, world_size=2, tokens_per_step=64, num_experts=4, topk=2,
        versions={}, config={},
    )  # fmt: skip


def layer(number: int, at: int) -> LayerMetrics:
    return LayerMetrics(
        layer=number, tokens=64, energy_mean=-2 - 0.1 * number, energy_std=0.3,
        entropy_mean=1.2 + math.exp(-at / 20), entropy_std=0.2,
        zscore_mean=0.1, zscore_std=1.0, k_eff=2 + 0.1 * math.sin(at + number),
        k_histogram=[0.0, 0.3, 0.5, 0.2, 0.0], states=[0.1, 0.6, 0.1, 0.2], omega_mean=0.5,
        theta=-1.0, load=[0.1, 0.2, 0.3, 0.4], max_vio=0.6,
        balancing_loss={"aux_loss": 1.0}, bias_mean=0.0, bias_max_abs=0.1, rows=128.0, nonfinite=0,
        flops=2e9, flops_ratio=1.01,
    )  # fmt: skip


def step(at: int, loss: float | None = 3.0, layers: int = 2) -> Step:
    return Step(
        step=at, interval=1, loss=loss, lr=1e-3, grad_norm=1.0, skipped=0, seconds_per_step=0.5,
        tokens_per_second=128.0, tokens_per_step=64.0, flops=6e12, flops_ratio=1.0234,
        throughput=12.345, k_eff=2.0 if layers else None,
        layers=[layer(n + 2, at) for n in range(layers)],
    )  # fmt: skip


def validation(at: int, **losses: float) -> Validation:
    return Validation(step=at, losses=losses)
