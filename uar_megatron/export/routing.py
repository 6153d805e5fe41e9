"""How each layer routes, in the numbers that an exported router needs."""

from __future__ import annotations

from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.export.source import Source
from uar_megatron.mcore.depth import moe_layers
from uar_megatron.mcore.policies import layer_policies
from uar_megatron.policies.base import RoutingPolicy
from uar_megatron.policies.relu import ReLUPolicy
from uar_megatron.policies.scores import weights_rule
from uar_megatron.policies.sinkhorn_selective import SelectiveSinkhornPolicy
from uar_megatron.policies.top_p import TopPPolicy
from uar_megatron.policies.topk import TopKPolicy
from uar_megatron.policies.uar import UARPolicy

Spec = dict[str, Any]


def router_specs(source: Source) -> list[Spec | None]:
    """Return for each layer how it routes at the checkpoint's step, None where it is dense.

    Raises:
        ConfigError: the policy cannot be exported.
    """
    args = source.args
    specs: list[Spec | None] = [None] * args.num_layers
    policies = layer_policies(source.uar, args)
    for number, policy in zip(moe_layers(args), policies, strict=True):
        specs[number - 1] = _spec(source, policy, f"decoder.layers.{number - 1}.mlp.router.")
    return specs


def _spec(source: Source, policy: RoutingPolicy, router: str) -> Spec:
    saved_step = source.tensors.get(f"{router}uar_step")
    step = 0 if saved_step is None else int(saved_step)
    budget = policy.settings.budget
    width = policy.max_k
    if isinstance(policy, TopKPolicy | SelectiveSinkhornPolicy):
        spec = _constant(width)
    elif isinstance(policy, UARPolicy):
        spec = _budget(source, policy, router, step)
        width = spec["k_max"] if spec["k_min"] == spec["k_max"] else width
    elif isinstance(policy, TopPPolicy):
        spec = {"rule": "top_p", "p": source.uar.top_p.p}
        spec |= {"k_min": budget.k_min, "k_max": policy.max_k}
    elif isinstance(policy, ReLUPolicy):
        spec = {"rule": "relu", "k_min": 0, "k_max": width}
    else:
        reason = "its experts follow from the tokens that come later, which generation has not"
        if source.uar.policy != "seq_topk":
            reason = "the modelling file does not know it"
        raise ConfigError(
            "uar.policy",
            f"{source.uar.policy} cannot be exported: {reason}",
            allowed="topk, uar, top_p, relu, sinkhorn_selective",
        )
    return {**spec, "width": width, "weights": weights_rule(policy.settings, width)}


def _budget(source: Source, policy: UARPolicy, router: str, step: int) -> Spec:
    """Eq. 5 as it stands at ``step``: expansion may not have set in, and β may have moved."""
    state, budget = policy.budget, policy.settings.budget
    moved = source.tensors.get(f"{router}uar_policy.beta")
    if state.beta is not None and moved is not None:
        state.beta.copy_(moved)
    if state.progress(step) == 0.0:
        return _constant(policy.settings.topk)
    if policy.fixed_k is not None:
        return _constant(policy.fixed_k)
    alpha, beta = state.line(step)
    bounds = {"alpha": alpha, "k_min": budget.k_min, "k_max": budget.k_max}
    if budget.mode == "exact":
        target = state.topk + state.progress(step) * (budget.target_mean_k - state.topk)
        return {"rule": "exact", **bounds, "mean_k": target, "segment": budget.segment}
    return {"rule": "line", **bounds, "beta": float(beta), "rounding": budget.rounding}


def _constant(k: int) -> Spec:
    line = {"rule": "line", "alpha": 0.0, "beta": float(k), "rounding": "floor"}
    return {**line, "k_min": k, "k_max": k}


def constant_k(spec: Spec) -> int | None:
    """The k that every token gets, None if tokens can differ."""
    return int(spec["k_min"]) if spec["k_min"] == spec["k_max"] else None


def shared_routing(source: Source) -> dict[str, Any]:
    """Return what all routers of the model have in common."""
    args, uar = source.args, source.uar
    biases = [t for name, t in source.tensors.items() if name.endswith(_BIASES)]
    by_logits = args.moe_router_score_function == "softmax" and not args.moe_router_pre_softmax
    return {
        "score_function": args.moe_router_score_function,
        "selects_by_logits": by_logits,
        "topk": args.moe_router_topk,
        "scaling": args.moe_router_topk_scaling_factor or 1.0,
        "num_groups": args.moe_router_num_groups,
        "group_topk": args.moe_router_group_topk,
        "uncertainty": uar.uncertainty,
        "temperature": uar.temperature,
        "dtype": {"fp32": "float32", "fp64": "float64"}.get(args.moe_router_dtype),
        "bias_dtype": str(biases[0].dtype).removeprefix("torch.") if biases else None,
    }


_BIASES = ("mlp.router.expert_bias", "mlp.router.uar_bias.value")


def notes(source: Source) -> list[str]:
    """What the exported model does not do as training did, in sentences."""
    uar = source.uar
    found = []
    if uar.policy == "uar" and uar.budget.mode == "exact":
        found.append(
            "budget.mode: exact shares out the experts of a sequence among its tokens of one call; "
            "in text that is generated token by token, each token gets the mean number"
        )
    if uar.policy == "uar" and uar.budget.max_rows_factor is not None:
        found.append(
            "budget.max_rows_factor is left out: it bounds memory in training, and tokens whose "
            "experts it took away keep them here"
        )
    return found
