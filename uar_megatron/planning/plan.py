"""A whole plan: parameters, FLOPs, memory, traffic and time of a model on a number of GPUs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.flops import step_flops
from uar_megatron.planning import bounds
from uar_megatron.planning.activations import Rows
from uar_megatron.planning.job import RESERVED, Job
from uar_megatron.planning.memory import RankMemory
from uar_megatron.planning.parameters import active_parameters, model_parameters
from uar_megatron.planning.step_time import ASSUMPTIONS, StepTime, step_time
from uar_megatron.planning.traffic import Exchange, all_to_all_seconds, even_exchange


@dataclass(frozen=True)
class Traffic:
    """All-to-all of one MoE layer and micro-batch on one rank, rows in the mean of k."""

    exchange: Exchange
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class Plan:
    """The answer; bytes, seconds and FLOPs.

    Attributes:
        job: what was asked.
        k: experts per token by name: ``K_min``, ``expected``, ``K_max``; means over MoE layers.
        parameters: of the model.
        active: parameters that a token meets, by name of k.
        flops_per_token: forward and backward, by name of k.
        expected: memory of the fullest rank at the mean of k and the expected imbalance.
        worst: at the most rows and the worst imbalance.
        traffic: of the first MoE layer, at the expected k.
        time: of an optimizer step at the expected k.
        tokens_per_second: of the whole job.
        days: for the token budget, None without.
        assumptions: what the figures stand on.
        warnings: what does not fit, and what bounds it.
    """

    job: Job
    k: dict[str, float]
    parameters: float
    active: dict[str, float]
    flops_per_token: dict[str, float]
    expected: RankMemory
    worst: RankMemory
    traffic: Traffic
    time: StepTime
    tokens_per_second: float
    days: float | None
    assumptions: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything in plain numbers, with totals."""
        found = dataclasses.asdict(self)
        found["job"]["how"]["recompute"] = sorted(self.job.how.recompute)
        for name in ("expected", "worst"):
            memory: RankMemory = getattr(self, name)
            found[name]["state"]["total"] = memory.state.total
            found[name]["total"] = memory.total
        found["time"]["total"] = self.time.total
        layout = self.job.layout
        found["job"]["layout"] |= {
            "data": layout.data,
            "expert_data": layout.expert_data,
            "micro_batches": layout.micro_batches,
        }
        found["usable_memory"] = self.job.usable_memory
        found["fits"] = {
            name: found[name]["total"] <= self.job.usable_memory for name in ("expected", "worst")
        }
        return found


def plan(job: Job) -> Plan:
    """Return the plan of a job.

    Raises:
        ConfigError: an efficiency or a token budget that cannot be.
    """
    if not 0 < job.mfu <= 1:
        raise ConfigError("--mfu", f"{job.mfu:g} is not allowed", allowed="more than 0, up to 1")
    if job.tokens is not None and not 0 < job.tokens < math.inf:
        raise ConfigError(
            "--tokens", f"{job.tokens:g} is not allowed", allowed="more than 0, finite"
        )
    ks = {
        "K_min": [float(layer.k_min) for layer in job.layers],
        "expected": [layer.expected for layer in job.layers],
        "K_max": [float(layer.k_max) for layer in job.layers],
    }
    expected_rows = job.rows_of_layer(ks["expected"], [i.expected for i in job.imbalance])
    most = max(layer.most_rows_per_token for layer in job.layers)
    expected, worst = job.memory(expected_rows, most), job.worst_memory()
    exchanges = {
        layer: (_exchange(job, expected_rows[layer]), job.imbalance[i].expected)
        for i, layer in enumerate(job.moe_layers())
    }
    time = step_time(
        job.shape,
        job.how,
        job.layout,
        job.precision,
        job.hardware,
        job.mfu,
        job.overlap,
        expected_rows,
        exchanges,
    )
    if not math.isfinite(time.total):
        raise ConfigError("--mfu", "the step takes for ever", remedy="raise it, or the bandwidths")
    first, _ = exchanges[job.moe_layers()[0]]
    tokens_per_step = job.layout.global_batch * job.layout.seq_length
    seconds_per_day = 86400
    steps = None if job.tokens is None else job.tokens / tokens_per_step
    return Plan(
        job=job,
        k={name: sum(k) / len(k) for name, k in ks.items()},
        parameters=model_parameters(job.shape).total,
        active={name: active_parameters(job.shape, k) for name, k in ks.items()},
        flops_per_token={name: step_flops(job.shape, 1.0, k).total for name, k in ks.items()},
        expected=expected,
        worst=worst,
        traffic=Traffic(
            first,
            all_to_all_seconds(first.forward, first, job.hardware),
            all_to_all_seconds(first.backward, first, job.hardware),
        ),
        time=time,
        tokens_per_second=tokens_per_step / time.total,
        days=None if steps is None else steps * time.total / seconds_per_day,
        assumptions=_assumptions(job),
        warnings=bounds.warnings(job, expected, worst),
    )


def _exchange(job: Job, rows: Rows) -> Exchange:
    return even_exchange(
        rows.sent,
        job.layout,
        experts=job.shape.experts,
        width=job.shape.latent or job.shape.hidden,
        element=job.how.element,
        weight=job.how.logit,
    )


def _assumptions(job: Job) -> list[str]:
    hardware = job.hardware
    found = [
        f"matrix products reach {job.mfu:.0%} of {hardware.peak_flops / 1e12:.0f} TFLOP/s (--mfu)",
        f"links per GPU and direction: NVLink {hardware.nvlink / 1e9:.0f} GB/s, network "
        f"{hardware.network / 1e9:.0f} GB/s",
        f"{RESERVED:.0%} of {hardware.memory / 1e9:.0f} GB stay free for the CUDA context, NCCL "
        "and fragmentation",
        f"load of ranks: {job.imbalance[0].source}",
        "mean experts per token: uar.budget's, of a normal ẑ in mode free; moe_router_topk (or "
        "target_mean_k) where the policy leaves it to the data",
        "worst case: every token has its most experts and the fullest rank the 99th percentile of "
        "that load (of a run log its largest record); rows that all meet on one rank are more",
        *ASSUMPTIONS,
    ]
    if job.how.has_fused_norms:
        found.append("activations of Transformer Engine's layers: derived, not compared with a GPU")
    return found
