"""What to say where a plan does not fit: which setting bounds the rows, and how low it must go."""

from __future__ import annotations

from uar_megatron.planning.hardware import GIB
from uar_megatron.planning.job import Job
from uar_megatron.planning.memory import RankMemory


def warnings(job: Job, expected: RankMemory, worst: RankMemory) -> list[str]:
    """Return a line for each thing that does not fit.

    Args:
        job: what is planned.
        expected: memory at the mean of k.
        worst: memory at the most rows.
    """
    room = job.usable_memory
    sizes = f"{{:.1f}} GiB of {room / GIB:.1f} GiB"
    if worst.total <= room:
        return []
    layer = max(job.layers, key=lambda one: one.most_rows_per_token)
    found = [
        f"does not fit where every token has its most experts: {sizes.format(worst.total / GIB)}; "
        f"bounded by {layer.bound}"
    ]
    if expected.total > room:
        found.append(f"does not fit at the mean of k either: {sizes.format(expected.total / GIB)}")
    fitting = most_rows_that_fit(job)
    if fitting <= 0:
        found.append(
            "does not fit with any number of experts per token: weights, gradients and optimizer "
            f"take {worst.state.total / GIB:.1f} GiB; raise expert, tensor or pipeline "
            "parallelism, set use_distributed_optimizer, or lower micro_batch_size"
        )
    else:
        found.append(_remedy(job, layer.bound, fitting))
    return found


def most_rows_that_fit(job: Job) -> float:
    """Rows per token up to which the worst case fits; 0 where nothing does."""
    low, high = 0.0, max(layer.most_rows_per_token for layer in job.layers)
    if job.worst_memory(low).total > job.usable_memory:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if job.worst_memory(middle).total <= job.usable_memory:
            low = middle
        else:
            high = middle
    return low


def _remedy(job: Job, bound: str, fitting: float) -> str:
    """Name the setting and the value up to which it fits."""
    fewest = max(layer.k_min for layer in job.layers)
    mean = max(layer.expected for layer in job.layers)
    topk = job.shape.topk
    if bound.startswith("moe_expert_capacity_factor"):
        setting = f"moe_expert_capacity_factor to {fitting / topk:.2f}"
    elif "target_mean_k" in bound:
        setting = f"uar.budget.target_mean_k to {fitting:.2f}"
    elif bound.startswith("uar.budget"):
        setting = f"uar.budget.max_rows_factor to {fitting / topk:.2f}"
        if int(fitting) >= max(fewest, mean):
            setting += f", or uar.budget.k_max to {int(fitting)}"
    elif "uar.budget.k_max" in bound:
        setting = f"uar.budget.k_max to {int(fitting)}"
    elif bound.startswith("uar.policy"):  # which has no bound of its own
        setting = f"moe_expert_capacity_factor to {fitting / topk:.2f}"
    else:
        setting = f"moe_router_topk to {int(fitting)}"
    return f"{fitting:.2f} rows per token fit: lower {setting}, or micro_batch_size"
