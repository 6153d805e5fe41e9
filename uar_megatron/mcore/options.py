"""Every Megatron option that touches routing: supported, or refused with the reason.

``OPTIONS`` is the documentation (``scripts/config_reference.py`` prints it into the README) and, in
``compatibility.py``, the check; a test holds it against the installed Megatron's fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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


def loss_types(args: Any) -> list[str]:
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
        "softmax before or after the selection, sigmoid, sqrtsoftplus; `uar.weights` can differ; "
        "softmax with `top_p`, `relu` (before the selection) and `sinkhorn_selective` (after it)",
    ),
    Option(("moe_router_dtype",), "never", "of the gating; uncertainty is fp32 or better anyway"),
    Option(
        ("moe_router_group_topk", "moe_router_num_groups", "moe_router_topk_limited_devices"),
        "never",
        "a token's groups do not depend on its k; K_max is at most the experts of its groups; "
        "with `policy: topk` and `uar` only",
    ),
    Option(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
        "never",
        "aux_loss, seq_aux_loss, global_aux_loss, several at once, none; all under the mask; none "
        "with `relu` and `sinkhorn_selective`, which balance loads by themselves",
    ),
    Option(
        ("moe_router_load_balancing_type",),
        "acting",
        "sinkhorn assigns experts by itself: there is no loss and no bias to calibrate",
        "use aux_loss, or uar.bias.enabled=true with none",
        lambda args: "sinkhorn" in loss_types(args),
        "sinkhorn",
    ),
    Option(
        ("moe_router_load_balancing_type", "moe_router_quantile_balancing_ema"),
        "acting",
        "quantile balancing has a bias of its own, found for a fixed k",
        "use uar.bias.enabled=true with moe_router_load_balancing_type=none",
        lambda args: "quantile_balancing" in loss_types(args),
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
        "always",
        "a graph that captures the router would freeze θ_t, the ramp and what the run log measures",
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
