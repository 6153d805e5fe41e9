"""From an experiment to its plan: what ``uar plan`` does. Needs no GPU, tokenizer or data."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

from uar_megatron.errors import ConfigError
from uar_megatron.experiment import Experiment
from uar_megatron.flops import layers_with_experts
from uar_megatron.planning.activations import implementation_of
from uar_megatron.planning.experts_per_token import layers_of, within_capacity
from uar_megatron.planning.hardware import Hardware
from uar_megatron.planning.job import Job
from uar_megatron.planning.layout import layout_of
from uar_megatron.planning.load import EVEN, Imbalance, dirichlet, replay
from uar_megatron.planning.state import precision_of
from uar_megatron.planning.step_time import overlap_of
from uar_megatron.policies import RoutingPolicy
from uar_megatron.shape import ModelShape, capacity_factor, shape_of

_NOT_MODELLED = (
    "moe_latent_size",
    "mtp_use_repeated_layer",
    "fp8",
    "fp4",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "use_precision_aware_optimizer",
    "optimizer_cpu_offload",
    "cpu_offloading_num_layers",
    "hybrid_layer_pattern",
    "heterogeneous_layers_config_path",
)
_AT_LEAST_1 = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "kv_channels",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "num_experts",
    "moe_router_topk",
    "vocab_size",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "recompute_num_layers",
    "micro_batch_size",
    "global_batch_size",
)
_AT_LEAST_0 = ("mtp_num_layers", "moe_shared_expert_intermediate_size", "moe_latent_size")


def job_of(
    experiment: Experiment,
    gpus: int,
    hardware: Hardware,
    *,
    gpus_per_node: int = 8,
    mfu: float,
    tokens: float | None = None,
    load: Path | None = None,
    concentration: float | None = None,
) -> Job:
    """Return what is planned for an experiment.

    Args:
        experiment: the composed configuration.
        gpus: ranks.
        hardware: their kind.
        gpus_per_node: of a node.
        mfu: fraction of the peak that matrix products reach.
        tokens: the budget; None for that of ``train_iters`` or ``train_samples``.
        load: run log whose loads are replayed.
        concentration: of a Dirichlet distribution of expert loads.

    Raises:
        UARError: the configuration or an option cannot be, or is not modelled.
    """
    args, routing, policies = _megatron(experiment)
    shape = shape_of(args)
    if not any(shape.is_moe):
        raise ConfigError(
            "moe_layer_freq",
            "no layer has experts, and a dense model is not planned",
            remedy="give one layer experts at least, for example moe_layer_freq=1",
        )
    layout = layout_of(args, shape, gpus, gpus_per_node)
    factor = capacity_factor(args)
    layers = within_capacity(
        layers_of(experiment.uar, shape, policies),
        factor,
        shape.topk,
        is_padded=args.moe_pad_expert_input_to_capacity,
    )
    if tokens is None:
        sequences = args.train_samples or (args.train_iters or 0) * layout.global_batch
        tokens = sequences * layout.seq_length or None
    return Job(
        shape=shape,
        how=implementation_of(args, experiment.uar, routing),
        layout=layout,
        precision=precision_of(args),
        overlap=overlap_of(args),
        hardware=hardware,
        mfu=mfu,
        layers=layers,
        imbalance=_imbalance(shape, layout.expert, load, concentration),
        capacity_factor=factor,
        tokens=tokens,
    )


def _imbalance(
    shape: ModelShape, ranks: int, load: Path | None, concentration: float | None
) -> list[Imbalance]:
    layers = sum(layers_with_experts(shape))
    if load is not None and concentration is not None:
        raise ConfigError("--load", "given together with --dirichlet", remedy="keep one of the two")
    if load is not None:
        return replay(load, shape.experts, ranks, layers)
    if concentration is not None:
        return [dirichlet(concentration, shape.experts, ranks)] * layers
    return [EVEN] * layers


def _megatron(
    experiment: Experiment,
) -> tuple[argparse.Namespace, str, list[RoutingPolicy]]:
    """Megatron's parsed arguments, who routes on the machine that will train, and how."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # about libraries that this machine does not have
        from uar_megatron.mcore.arguments import megatron_parser, to_argv
        from uar_megatron.mcore.compatibility import check_compatible, is_off
        from uar_megatron.mcore.kernels import unknown_setting
        from uar_megatron.mcore.policies import layer_policies

        args = megatron_parser().parse_args(to_argv(experiment.megatron))
    _check_modelled(args)
    uar = experiment.uar
    # Whether kernels can run is not this machine's matter.
    check_compatible(uar.model_copy(update={"kernel_backend": "torch"}), args)
    policies = layer_policies(uar, args)
    if is_off(uar, args):
        return args, "stock", policies
    is_on_gpu = experiment.launch.device == "cuda" and uar.kernel_backend == "auto"
    has_kernels = is_on_gpu or uar.kernel_backend == "triton"
    has_kernels = has_kernels and unknown_setting(uar, args) is None
    return args, "kernels" if has_kernels else "torch", policies


def _check_modelled(args: argparse.Namespace) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if getattr(args, name) is None:
            raise ConfigError(name, "is missing", remedy=f"set {name}")
    for least, names in ((1, _AT_LEAST_1), (0, _AT_LEAST_0)):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and value < least:
                raise ConfigError(name, f"{value} is not allowed", allowed=f"{least} or more")
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.kv_channels is None and args.hidden_size % heads:
        raise ConfigError(
            "hidden_size",
            f"{args.hidden_size} is not a multiple of num_attention_heads = {heads}",
            remedy="change one of the two, or set kv_channels",
        )
    if args.group_query_attention and (groups < 1 or heads % groups):
        raise ConfigError(
            "num_query_groups",
            f"{groups} does not divide num_attention_heads = {heads}",
            allowed=", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0),
        )
    if args.moe_token_dispatcher_type != "alltoall":
        raise ConfigError(
            "moe_token_dispatcher_type",
            f"traffic and buffers of {args.moe_token_dispatcher_type} are not modelled",
            allowed="alltoall",
            remedy="plan with moe_token_dispatcher_type=alltoall",
        )
    if args.optimizer != "adam":
        raise ConfigError("optimizer", f"{args.optimizer} is not modelled", allowed="adam")
    instances = args.num_distributed_optimizer_instances
    if instances > 1:
        raise ConfigError(
            "num_distributed_optimizer_instances",
            f"{instances}: an optimizer cut within a part of the ranks is not modelled",
            allowed="1",
            remedy="plan with num_distributed_optimizer_instances=1",
        )
    for name in _NOT_MODELLED:
        if getattr(args, name, None):
            raise ConfigError(name, "is not modelled", remedy=f"plan without {name}")
