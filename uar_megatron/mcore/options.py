"""Every Megatron option that touches routing: supported, or refused with the reason.

``OPTIONS`` is the documentation (``scripts/config_reference.py`` prints it into the README) and the
check (:func:`check_compatible`) in one; a test holds it against the installed Megatron's fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.depth import moe_layers
from uar_megatron.mcore.flex_dispatcher import check_flex

Refused = Literal["never", "variable k", "acting", "always"]


class Option(NamedTuple):
    """One row: options that go together, and when they are refused.

    Attributes:
        names: Megatron's arguments, the first of them named in errors.
        refused: ``never``; with a ``variable k``; when UAR is ``acting`` in any way; ``always``.
        note: for ``never``, how it works with UAR; else the reason of the refusal.
        remedy: what to do instead.
        in_use: whether the arguments ask for what is refused.
        value: the value that is refused, where others are supported.
    """

    names: tuple[str, ...]
    refused: Refused
    note: str
    remedy: str = ""
    in_use: Callable[[Any], object] | None = None
    value: str = ""


def _loss_types(args: Any) -> list[str]:
    types = args.moe_router_load_balancing_type
    return list(types) if isinstance(types, list | tuple) else [types]


def _captured(args: Any) -> set[str]:
    """The parts of a layer that CUDA graphs capture; ``{"everything"}`` if nothing is named."""
    if getattr(args, "cuda_graph_impl", "none") == "none":
        return set()
    modules = getattr(args, "cuda_graph_modules", None) or ["everything"]
    return {str(getattr(module, "name", module)) for module in modules}


def _set(*names: str) -> Callable[[Any], object]:
    return lambda args: any(getattr(args, name, None) for name in names)


def _wants_a_budget(args: Any) -> bool:
    is_hybridep = getattr(args, "moe_flex_dispatcher_backend", None) != "ncclep"
    budget = getattr(args, "moe_expert_rank_capacity_factor", None)
    return bool(getattr(args, "moe_paged_stash", None)) or (is_hybridep and budget is not None)


_TOPK = "use uar.policy=topk without clb, bias and weights for this run"

OPTIONS = (
    Option(
        ("moe_router_topk",),
        "never",
        "K: what `policy: topk` and steps before `expansion.start_step` route to, and what "
        "capacities, group scores and `renormalised_to_K` count",
    ),
    Option(
        ("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
        "never",
        "softmax before or after the selection, sigmoid, sqrtsoftplus; `uar.weights` can differ",
    ),
    Option(("moe_router_dtype",), "never", "of the gating; uncertainty is fp32 or better anyway"),
    Option(
        ("moe_router_group_topk", "moe_router_num_groups", "moe_router_topk_limited_devices"),
        "never",
        "a token's groups do not depend on its k; K_max is at most the experts of its groups",
    ),
    Option(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
        "never",
        "aux_loss, seq_aux_loss, global_aux_loss, several at once, none; all under the mask",
    ),
    Option(
        ("moe_router_load_balancing_type",),
        "acting",
        "sinkhorn assigns experts by itself: there is no loss and no bias to calibrate",
        "use aux_loss, or uar.bias.enabled=true with none",
        lambda args: "sinkhorn" in _loss_types(args),
        "sinkhorn",
    ),
    Option(
        ("moe_router_load_balancing_type", "moe_router_quantile_balancing_ema"),
        "acting",
        "quantile balancing has a bias of its own, found for a fixed k",
        "use uar.bias.enabled=true with moe_router_load_balancing_type=none",
        lambda args: "quantile_balancing" in _loss_types(args),
        "quantile_balancing",
    ),
    Option(
        ("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
        "never",
        "Megatron's bias selects among any k; its update is not weighted by λ (`uar.bias` is)",
    ),
    Option(
        (
            "moe_z_loss_coeff",
            "moe_input_jitter_eps",
            "calculate_per_token_loss",
            "moe_grad_scale_func",
        ),
        "never",
        "Megatron's own code; uncertainty is measured on the jittered input's logits",
    ),
    Option(
        ("moe_router_force_load_balancing", "moe_router_force_biased"),
        "never",
        "for benchmarks: uncertainty is then that of the random logits",
    ),
    Option(
        (
            "moe_expert_capacity_factor",
            "moe_token_drop_policy",
            "moe_pad_expert_input_to_capacity",
            "moe_token_dropping",
        ),
        "never",
        "capacity counts K experts per token whatever its k; losses and biases see the map before "
        "dropping, the run log what was dispatched",
    ),
    Option(
        ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"),
        "never",
        "the dispatcher pads the map and counts again; the rows it adds are in `rows`",
    ),
    Option(
        ("moe_router_fusion",),
        "acting",
        "Transformer Engine's fused router computes a fixed top-k and its own losses",
        "remove moe_router_fusion",
        _set("moe_router_fusion"),
    ),
    Option(
        ("moe_enable_routing_replay",),
        "acting",
        "recorded routings hold exactly K experts per token",
        _TOPK,
        _set("moe_enable_routing_replay"),
    ),
    Option(
        ("moe_token_dispatcher_type",),
        "never",
        "alltoall, allgather, flex: exactly Σk rows move; flex has not yet been run on hardware",
    ),
    Option(
        (
            "moe_flex_dispatcher_backend",
            "moe_enable_deepep",
            "moe_flex_dispatcher_num_sms",
            "moe_deepep_num_sms",
            "moe_hybridep_num_sms",
            "moe_hybridep_num_blocks_permute",
            "moe_hybridep_num_blocks_unpermute",
            "moe_hybridep_num_sms_preprocessing",
            "moe_hybridep_pad_uneven_dispatch_inputs",
            "moe_permute_fusion_into_hybridep",
        ),
        "never",
        "with deepep and ncclep K_max (times the expert tensor parallel size) is at most 32; "
        "tested with stand-ins for the libraries over gloo, not yet on hardware",
    ),
    Option(
        ("moe_ncclep_static_shape", "moe_ncclep_zero_copy"),
        "acting",
        "experts are handed the whole receive buffer: the rows they compute cannot be counted",
        "remove it",
        _set("moe_ncclep_static_shape", "moe_ncclep_zero_copy"),
    ),
    Option(("moe_permute_fusion",), "never", "takes the number of rows; needs Transformer Engine"),
    Option(
        ("moe_apply_probs_on_input",),
        "variable k",
        "weights before the non-linearity are right only for a single expert per token",
        "remove moe_apply_probs_on_input",
        _set("moe_apply_probs_on_input"),
    ),
    Option(
        (
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_shared_expert_overlap",
            "moe_shared_expert_glu_interleave_size",
            "use_grouped_gemm_for_shared_expert",
        ),
        "never",
        "shared experts see every token, whatever its k",
    ),
    Option(
        ("moe_latent_size",),
        "never",
        "the router sees the full hidden size; needs Transformer Engine",
    ),
    Option(
        (
            "num_moe_experts",
            "moe_ffn_hidden_size",
            "moe_layer_freq",
            "moe_grouped_gemm",
            "moe_single_grouped_weight",
            "moe_single_grouped_bias",
            "moe_mlp_glu_interleave_size",
        ),
        "never",
        "experts compute the rows they get; grouped GEMM without Transformer Engine is torch's",
    ),
    Option(
        ("recompute_granularity", "recompute_modules", "moe_layer_recompute"),
        "never",
        "a recomputed forward sees the same statistics and so the same k",
    ),
    Option(
        ("mtp_num_layers",),
        "never",
        "with our entry; layers for multi-token prediction share the last MoE layer's budget",
    ),
    Option(
        ("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
        "variable k",
        "the overlapped schedule has not been run with a variable k",
        "remove it",
        _set("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
    ),
    Option(
        ("cuda_graph_impl", "cuda_graph_modules"),
        "acting",
        "a graph that captures the router would freeze θ_t, the ramp and the row counts",
        "capture attention only (cuda_graph_modules=[attn]), or set cuda_graph_impl=none",
        lambda args: _captured(args) - {"attn", "mlp", "mamba"},
        "anything but attn, mlp, mamba",
    ),
    Option(
        ("cuda_graph_impl",),
        "always",
        "a graph of the whole iteration captures the step boundary, part of which is on the host",
        "capture attention only (cuda_graph_modules=[attn]), or set cuda_graph_impl=none",
        lambda args: getattr(args, "cuda_graph_impl", "none") == "full_iteration",
        "full_iteration",
    ),
    Option(
        (
            "transformer_impl",
            "inference_moe_token_dispatcher_type",
            "inference_moe_disable_fused_quant_kernels",
        ),
        "always",
        "the inference-optimized layers have a router of their own",
        "use transformer_impl=transformer_engine or local",
        lambda args: getattr(args, "transformer_impl", "local") == "inference_optimized",
        "inference_optimized",
    ),
    Option(
        ("moe_pad_experts_for_cuda_graph_inference",),
        "acting",
        "it is for CUDA graphs in inference, which would capture the router",
        "remove it",
        _set("moe_pad_experts_for_cuda_graph_inference"),
    ),
    Option(
        ("moe_expert_rank_capacity_factor",),
        "never",
        "with ncclep: of K_max experts per token, of `target_mean_k` in `budget.mode: exact`",
    ),
    Option(
        (
            "moe_expert_rank_capacity_factor",
            "moe_paged_stash",
            "moe_paged_stash_buffer_size_factor_cpu",
            "moe_paged_stash_buffer_size_factor_cuda",
            "moe_paged_stash_page_size",
        ),
        "acting",
        "HybridEP drops what its budget does not hold, and the retry repeats the step boundary",
        "remove it; recompute_modules=[moe] saves memory too",
        _wants_a_budget,
    ),
    Option(
        (
            "moe_routing_trace_path",
            "moe_routing_trace_capture_hidden_states",
            "moe_routing_trace_capture_logits",
            "moe_routing_trace_dump_weights",
            "moe_routing_trace_max_training_iters",
        ),
        "variable k",
        "the trace stores K experts per token; other rows would be lost or mixed up",
        "remove it; the run log has the load of every expert",
        _set("moe_routing_trace_path"),
    ),
    Option(
        ("rerun_mode",),
        "acting",
        "it takes the step boundary twice in every step",
        "use rerun_mode=validate_results or disabled",
        lambda args: getattr(args, "rerun_mode", None) == "report_stats",
        "report_stats",
    ),
    Option(
        ("moe_use_upcycling", "moe_upcycling_granularity"),
        "acting",
        "upcycling a dense checkpoint has not been tried with UAR's state",
        "upcycle with stock Megatron first, then attach UAR to its checkpoint",
        _set("moe_use_upcycling"),
    ),
    Option(("moe_per_layer_logging",), "never", "Megatron's own log"),
)


def is_off(uar: UARConfig, args: Any) -> bool:
    """Whether every step is stock Megatron's."""
    weights_off = uar.weights == "megatron"
    return not (varies(uar, args) or uar.clb.enabled or uar.bias.enabled) and weights_off


def varies(uar: UARConfig, args: Any) -> bool:
    """Whether a token may get another number of experts than ``moe_router_topk``."""
    if uar.policy != "uar":
        return False
    budgets = uar.budget.layers(max(len(moe_layers(args)), 1), args.moe_router_topk)
    return any(budget.constant_k() != args.moe_router_topk for budget in budgets)


def check_compatible(uar: UARConfig, args: Any) -> None:
    """Refuse combinations that cannot work, or are not supported.

    Args:
        uar: the UAR section.
        args: Megatron's parsed arguments, or a ``TransformerConfig``.

    Raises:
        ConfigError: naming the option, why it is refused and what to do.
        UnsupportedEnvironmentError: the library of the chosen dispatcher is not installed.
    """
    experts = args.num_experts if hasattr(args, "num_experts") else args.num_moe_experts
    if experts is None:
        raise ConfigError(
            "num_experts",
            "the model has no experts to route to",
            remedy="set num_experts, or train without this plugin",
        )
    _check_budget(uar, args, experts)
    _check_segment(uar, args)
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


def _check_budget(uar: UARConfig, args: Any, experts: int) -> None:
    topk = args.moe_router_topk
    # A budget that cannot be is refused even where no policy uses it.
    budgets = uar.budget.layers(max(len(moe_layers(args)), 1), topk)
    if uar.policy != "uar":
        return
    most = experts
    if args.moe_router_group_topk and args.moe_router_num_groups:
        most = args.moe_router_group_topk * experts // args.moe_router_num_groups
        if args.moe_router_group_topk > topk:
            raise ConfigError(
                "moe_router_group_topk",
                f"{args.moe_router_group_topk} groups for {topk} experts per token",
                allowed=f"1 … moe_router_topk = {topk}",
            )
    for budget in budgets:
        if budget.k_max > most:
            where = (
                "the number of experts" if most == experts else "the experts of a token's groups"
            )
            raise ConfigError(
                "uar.budget.k_max",
                f"k_max is {budget.k_max}, larger than {where}",
                allowed=f"1 … {most}",
                remedy="lower uar.budget.k_max",
            )
        ramps = uar.expansion.ramp_steps > 0 and budget.constant_k() != topk
        if ramps and not budget.k_min <= topk <= budget.k_max:
            raise ConfigError(
                "uar.expansion.ramp_steps",
                f"the ramp starts at moe_router_topk = {topk} experts, outside k_min = "
                f"{budget.k_min} … k_max = {budget.k_max}",
                remedy="widen the bounds, or set ramp_steps: 0",
            )


def _check_segment(uar: UARConfig, args: Any) -> None:
    length, segment = getattr(args, "seq_length", None), uar.budget.segment
    if uar.policy != "uar" or segment is None or length is None:
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


def _check_sections(uar: UARConfig, args: Any) -> None:
    if uar.weights == "softmax_all" and args.moe_router_score_function != "softmax":
        raise ConfigError(
            "uar.weights",
            f"softmax_all with moe_router_score_function={args.moe_router_score_function}",
            allowed="megatron, renormalised, renormalised_to_K",
        )
    reordered = ("mtp_use_repeated_layer", "num_microbatches_with_partial_activation_checkpoints")
    for name in reordered:
        if uar.statistics.mode == "batch" and getattr(args, name, None):
            raise ConfigError(
                "uar.statistics.mode",
                f"batch with {name}: recomputation comes in another order than the first passes, "
                "so a micro-batch could meet another one's statistics",
                remedy="use uar.statistics.mode=moving",
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
    coeffs = coeff if isinstance(coeff, list | tuple) else [coeff] * len(_loss_types(args))
    pairs = zip(_loss_types(args), coeffs, strict=False)
    return any(name.endswith("aux_loss") and value > 0 for name, value in pairs)
