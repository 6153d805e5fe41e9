"""Refuse at start-up what cannot work together: Megatron's options, the UAR section, the layout."""

from __future__ import annotations

from typing import Any

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.flex_dispatcher import check_flex
from uar_megatron.mcore.kernels import uses_kernels
from uar_megatron.mcore.options import OPTIONS, loss_types
from uar_megatron.mcore.policies import layer_policies, num_experts
from uar_megatron.policies import RoutingPolicy


def is_off(uar: UARConfig, args: Any) -> bool:
    """Whether every step is stock Megatron's."""
    has_stock_policies = all(policy.is_off for policy in layer_policies(uar, args))
    return has_stock_policies and not uar.clb.enabled and not uar.bias.enabled


def varies(uar: UARConfig, args: Any) -> bool:
    """Whether a token may get another number of experts than ``moe_router_topk``."""
    return any(policy.fixed_k != args.moe_router_topk for policy in layer_policies(uar, args))


def check_compatible(uar: UARConfig, args: Any) -> None:
    """Refuse combinations that cannot work, or are not supported.

    Args:
        uar: the UAR section.
        args: Megatron's parsed arguments, or a ``TransformerConfig``.

    Raises:
        ConfigError: naming the option, why it is refused and what to do.
        UnsupportedEnvironmentError: the library of the chosen dispatcher is not installed.
    """
    if (args.num_experts if hasattr(args, "num_experts") else args.num_moe_experts) is None:
        raise ConfigError(
            "num_experts",
            "the model has no experts to route to",
            remedy="set num_experts, or train without this plugin",
        )
    policies = layer_policies(uar, args)
    _check_budget(uar, args, policies)
    _check_segment(policies, args)
    _check_balance(uar, args, policies[0])
    _check_sections(uar, args)
    applies = {
        "never": False,
        "variable k": varies(uar, args),
        "acting": not is_off(uar, args),
        "always": True,
    }
    for option in OPTIONS:
        if option.in_use is not None and applies[option.refused] and option.in_use(args):
            name, value = option.names[0], option.value and f"={option.value}"
            raise ConfigError(name, f"{name}{value}: {option.note}", remedy=option.remedy)
    check_flex(uar, args)
    uses_kernels(uar, args)


def _check_budget(uar: UARConfig, args: Any, policies: list[RoutingPolicy]) -> None:
    topk, experts = args.moe_router_topk, num_experts(args)
    policies = [policy for policy in policies if policy.fixed_k != topk]
    if not policies:
        return  # Megatron checks its own
    most = experts
    if args.moe_router_group_topk and args.moe_router_num_groups:
        most = args.moe_router_group_topk * experts // args.moe_router_num_groups
        if args.moe_router_group_topk > topk:
            raise ConfigError(
                "moe_router_group_topk",
                f"{args.moe_router_group_topk} groups for {topk} experts per token",
                allowed=f"1 … moe_router_topk = {topk}",
            )
    for policy in policies:
        budget = policy.settings.budget
        if policy.max_k > most:
            where = (
                "the number of experts" if most == experts else "the experts of a token's groups"
            )
            raise ConfigError(
                "uar.budget.k_max",
                f"k_max is {policy.max_k}, larger than {where}",
                allowed=f"1 … {most}",
                remedy="lower uar.budget.k_max",
            )
        ramps = uar.policy == "uar" and uar.expansion.ramp_steps > 0
        if ramps and budget.constant_k() != topk and not budget.k_min <= topk <= budget.k_max:
            raise ConfigError(
                "uar.expansion.ramp_steps",
                f"the ramp starts at moe_router_topk = {topk} experts, outside k_min = "
                f"{budget.k_min} … k_max = {budget.k_max}",
                remedy="widen the bounds, or set ramp_steps: 0",
            )


def _check_segment(policies: list[RoutingPolicy], args: Any) -> None:
    length = getattr(args, "seq_length", None)
    segment = policies[0].segment
    if segment is None or length is None:
        return
    # Context parallelism gives each rank two pieces of every sequence, so that work is even.
    pieces = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    pieces *= args.tensor_model_parallel_size
    if length % (pieces * segment):
        raise ConfigError(
            "uar.budget.segment",
            f"{segment}, but this layout cuts sequences of {length} tokens into {pieces} pieces, "
            f"which are no whole number of segments",
            allowed=f"a divisor of {length // pieces}",
        )


def _check_balance(uar: UARConfig, args: Any, policy: RoutingPolicy) -> None:
    """A policy that balances loads by itself goes with nothing else that does."""
    if policy.own_balance is None:
        return
    reason = f"with uar.policy={uar.policy}: {policy.own_balance}"
    if uar.clb.enabled:
        raise ConfigError(
            "uar.clb.enabled",
            f"there is no load loss and no bias to calibrate {reason}",
            remedy="set uar.clb.enabled=false, or use another policy",
        )
    if uar.bias.enabled or args.moe_router_enable_expert_bias:
        name = "uar.bias.enabled" if uar.bias.enabled else "moe_router_enable_expert_bias"
        raise ConfigError(name, f"true {reason}", remedy=f"set {name}=false")
    if _has_aux_loss(args):
        raise ConfigError(
            "moe_aux_loss_coeff",
            f"{args.moe_aux_loss_coeff} {reason}",
            remedy="set moe_router_load_balancing_type=none",
        )


def _check_sections(uar: UARConfig, args: Any) -> None:
    if uar.weights == "softmax_all" and args.moe_router_score_function != "softmax":
        raise ConfigError(
            "uar.weights",
            f"softmax_all with moe_router_score_function={args.moe_router_score_function}",
            allowed="megatron, renormalised, renormalised_to_K",
        )
    partial = "num_microbatches_with_partial_activation_checkpoints"
    for name in ("mtp_use_repeated_layer", partial):
        if uar.statistics.mode == "batch" and getattr(args, name, None):
            raise ConfigError(
                "uar.statistics.mode",
                f"batch with {name}: recomputation comes in another order than the first passes, "
                "so a micro-batch could meet another one's statistics",
                remedy="use uar.statistics.mode=moving",
            )
    if uar.observe.interval and getattr(args, partial, None):
        raise ConfigError(
            "uar.observe.interval",
            f"{uar.observe.interval} with {partial}: recomputation comes in another order "
            "than the first passes, so a micro-batch could meet another one's tokens",
            remedy="set uar.observe.interval=0",
        )
    if uar.clb.enabled and not (_has_aux_loss(args) or uar.bias.enabled):
        raise ConfigError(
            "uar.clb.enabled",
            "there is nothing to calibrate: no auxiliary loss and no bias",
            remedy="set moe_aux_loss_coeff above 0 with moe_router_load_balancing_type=aux_loss, "
            "or uar.bias.enabled=true",
        )
    local_groups = args.moe_grouped_gemm and getattr(args, "transformer_impl", "local") == "local"
    if local_groups and (getattr(args, "add_bias_linear", False) or getattr(args, "fp8", None)):
        raise ConfigError(
            "moe_grouped_gemm",
            "torch's grouped GEMM has neither biases nor FP8",
            remedy="set disable_bias_linear: true and no fp8, or transformer_impl: "
            "transformer_engine",
        )
    if uar.bias.enabled and args.moe_router_enable_expert_bias:
        raise ConfigError(
            "uar.bias.enabled",
            "Megatron's own expert bias is on as well",
            remedy="keep one: remove moe_router_enable_expert_bias, or set uar.bias.enabled=false",
        )


def _has_aux_loss(args: Any) -> bool:
    coeff = args.moe_aux_loss_coeff
    coeffs = coeff if isinstance(coeff, list | tuple) else [coeff] * len(loss_types(args))
    pairs = zip(loss_types(args), coeffs, strict=False)
    return any(name.endswith("aux_loss") and value > 0 for name, value in pairs)
