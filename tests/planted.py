"""A made-up run with known truth: phases, a vacuum layer, a bias that runs away."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from records import start

from uar_megatron.reporting.schema import (
    Edges,
    End,
    LayerMetrics,
    LayerObservation,
    LayerValidation,
    Observation,
    Record,
    Step,
    TokenClass,
    Validation,
)

EXPERTS = 8
STATES = {False: [0.55, 0.25, 0.05, 0.15], True: [0.1, 0.15, 0.05, 0.7]}


def records(
    steps: int = 400,
    layers: int = 6,
    begin: float = 0.2,
    end: float = 0.55,
    vacuum: int | None = 5,
    exploding: int | None = 3,
    moves: bool = True,
    observe: int = 50,
    name: str = "planted",
    seed: int = 0,
    config: dict[str, object] | None = None,
) -> list[Record]:
    """Records of a run whose phases begin at ``begin`` and ``end`` of it."""
    draw = np.random.default_rng(seed)
    first = start(0)
    first.run, first.num_experts = name, EXPERTS
    first.config = {"uar": {"policy": "uar"}, "lr": 1e-3, "train_iters": steps} | (config or {})
    first.versions = {"python": "3.12.1", "torch": "2.14.1"}
    found: list[Record] = [first]
    for at in range(1, steps + 1):
        way = at / steps
        climb = np.interp(way, [begin, (begin + end) / 2, end], [0.0, 1.4, 0.9]) if moves else 0.0
        metrics = []
        for i in range(layers):
            number = i + 2
            noise = draw.normal(size=4)
            load = np.full(EXPERTS, 1 / EXPERTS) + 0.02 * np.sin(np.arange(EXPERTS) * (1 + i))
            bias = 0.05
            if exploding == number:
                bias = 0.02 + 2.0 * way**2
            metrics.append(
                LayerMetrics(
                    layer=number, tokens=4096,
                    energy_mean=-2.6 + 0.08 * i + climb * (1 + 0.1 * i) + 0.03 * noise[0],
                    energy_std=0.3 + 0.02 * abs(noise[1]),
                    entropy_mean=0.6 + 1.3 * math.exp(-4 * way) + 0.05 * abs(i - 2)
                    + 0.02 * noise[2],
                    entropy_std=0.2 + 0.3 * math.exp(-(((way - begin) / 0.1) ** 2)),
                    zscore_mean=0.05 * noise[3], zscore_std=1.0,
                    k_eff=2 + 0.4 * climb / 1.4 + 0.05 * i + 0.02 * noise[1],
                    k_histogram=[0.0, 0.3, 0.5, 0.2, 0.0], states=STATES[vacuum == number],
                    omega_mean=0.5, theta=-1.0, load=(load / load.sum()).tolist(),
                    max_vio=0.2 + 0.8 * math.exp(-6 * way) + 0.05 * i,
                    balancing_loss={"aux_loss": 1.0 + 0.5 * math.exp(-5 * way) + 0.02 * i},
                    bias_mean=0.0 if exploding != number else -0.5 * way, bias_max_abs=bias,
                    rows=8192.0, nonfinite=0, flops_ratio=1.02,
                )
            )  # fmt: skip
        found.append(
            Step(
                step=at, interval=1, loss=2.2 + 5.5 * math.exp(-5 * way) + 0.03 * draw.normal(),
                lr=1e-3, grad_norm=1.0, skipped=0, seconds_per_step=0.5, tokens_per_second=8192.0,
                flops_ratio=1.02, throughput=0.01,
                k_eff=float(np.mean([m.k_eff for m in metrics])), layers=metrics,
            )
        )  # fmt: skip
        if observe and at % observe == 0:
            found.append(_observation(at, way, metrics, draw))
        if at % max(1, steps // 5) == 0:
            found.append(_validation(at, way, layers))
    found.append(End(step=steps, reason="finished"))
    return found


def _observation(
    at: int, way: float, metrics: list[LayerMetrics], draw: np.random.Generator
) -> Observation:
    bins = 24
    seen = []
    for m in metrics:
        entropy = draw.normal(m.entropy_mean, 0.3, 3000)
        energy = draw.normal(m.energy_mean, 0.4, 3000)
        counts, _, _ = np.histogram2d(
            entropy, energy, bins=bins, range=[[0, math.log(EXPERTS)], [-4.0, 1.0]]
        )
        seen.append(
            LayerObservation(
                layer=m.layer, tokens=3000, histogram=counts.astype(int).tolist(),
                logit_sum_mean=3 * way - 0.2 * m.layer, logit_sum_std=1.0,
                classes=[
                    TokenClass(
                        name=f"decile_{d}", tokens=300, energy_mean=m.energy_mean - 0.03 * d,
                        entropy_mean=m.entropy_mean - 0.02 * d, k_eff=2.5 - 0.05 * d,
                    )
                    for d in range(1, 11)
                ],
                router_norm=1 + way, router_row_norms=[1.0] * EXPERTS, bias=[0.01] * EXPERTS,
                weight_similarity=0.5 - 0.4 * way, output_similarity=0.6 - 0.3 * way,
                stability=None if way < 0.2 else 0.5 + 0.4 * way,
                cache_hit_rates={"2": 0.4 + 0.2 * way, "4": 0.7 + 0.1 * way},
            )
        )  # fmt: skip
    edges = Edges(low=0, high=math.log(EXPERTS), bins=bins), Edges(low=-4.0, high=1.0, bins=bins)
    return Observation(
        step=at, entropy_bins=edges[0], energy_bins=edges[1], segment=64, layers=seen
    )


def _validation(at: int, way: float, layers: int) -> Validation:
    load = [1 / EXPERTS] * EXPERTS
    return Validation(
        step=at,
        losses={
            "in_domain": 2.4 + 4 * math.exp(-5 * way),
            "out_of_domain": 3.4 + 3 * math.exp(-5 * way),
        },
        layers={
            "in_domain": [
                LayerValidation(layer=n + 2, tokens=4096, k_eff=2.1, load=load, max_vio=0.1 * n)
                for n in range(layers)
            ]
        },
    )  # fmt: skip


def write(folder: Path, found: list[Record]) -> Path:
    """Write records as a run's log; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.jsonl").write_text("".join(r.to_line() for r in found), encoding="utf-8")
    return folder
