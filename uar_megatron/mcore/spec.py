"""Layer specs with UAR routers, for our entry and for anybody's Megatron script."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from uar_megatron.config import UARConfig
from uar_megatron.errors import UARError
from uar_megatron.experiment import load_uar_section
from uar_megatron.mcore.compat import (
    MoELayer,
    SequentialMLP,
    TopKRouter,
    TransformerBlockSubmodules,
    default_layer_spec,
    finalize_model_grads,
    get_transformer_layer_offset,
    start_missing_state_fresh,
    training_arguments,
    transform_mtp_specs,
)
from uar_megatron.mcore.compatibility import check_compatible
from uar_megatron.mcore.experts import TorchGroupedMLP
from uar_megatron.mcore.guard import check_same_section
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.policies import layer_policies
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.step import StepBoundary, routers_of

logger = logging.getLogger(__name__)


def uar_layer_spec(uar: UARConfig | str | Path) -> Callable[..., TransformerBlockSubmodules]:
    """Return a ``transformer_layer_spec`` that builds every MoE layer with a UAR router.

    Assign it to ``GPTModelConfig.transformer_layer_spec``, or name it with Megatron's ``--spec``
    from a module of your own (the README shows how). Building a model with it also installs the
    step boundary on the transformer configuration.

    Args:
        uar: the UAR section, or the path of a YAML file that holds it.

    Raises:
        ConfigError: the section is invalid, is not the same on all ranks, or does not go with
            Megatron's configuration.
    """
    transform_mtp_specs(_with_uar_mtp)
    start_missing_state_fresh(".uar_")
    config_of_uar = uar if isinstance(uar, UARConfig) else load_uar_section(uar)

    def layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer = getattr(config, "transformer", config)
        # The arguments know more than the configuration that is made of them.
        check_compatible(config_of_uar, training_arguments() or transformer)
        # Once: pipeline ranks wait for each other between their virtual stages as well.
        if torch.distributed.is_initialized() and not vp_stage:
            check_same_section(config_of_uar)
        finalize = transformer.finalize_model_grads_func or finalize_model_grads
        if not isinstance(finalize, StepBoundary):
            (policy, *_) = layer_policies(config_of_uar, transformer)
            transformer.finalize_model_grads_func = StepBoundary(
                finalize, config_of_uar.consistency_interval, policy.state
            )
        first = get_transformer_layer_offset(transformer, vp_stage) + 1
        return with_uar_routers(default_layer_spec(config, vp_stage), config_of_uar, first)

    return layer_spec


def section_of_routers(model: Iterable[torch.nn.Module]) -> UARConfig | None:
    """Return the section that a built model's routers follow, None if all are Megatron's.

    Called on every rank: a pipeline stage may have no router.
    """
    own = next((router.uar for router in routers_of(model)), None)
    sections: list[UARConfig | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sections, own)
    return next((section for section in sections if section is not None), None)


@dataclasses.dataclass
class UARBlockSubmodules(TransformerBlockSubmodules):
    """A block spec whose MoE layers are ours, with the section that they were made from."""

    uar: UARConfig = dataclasses.field(default_factory=UARConfig)


def with_uar_routers(
    block: TransformerBlockSubmodules, uar: UARConfig, first: int = 1
) -> TransformerBlockSubmodules:
    """Return a copy of a block spec whose MoE layers are ours; layers may share one spec object.

    Args:
        block: of this rank's stage of the pipeline.
        uar: the UAR section.
        first: 1-based number of its first layer. Megatron tells a layer its number only when it is
            built (transformer_layer.py:433), which is too late for a budget that depends on it.
    """
    fields = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
    fields["layer_specs"] = [
        _with_uar_router(layer, uar, number)
        for number, layer in enumerate(block.layer_specs or (), start=first)
    ]
    return UARBlockSubmodules(**fields, uar=uar)


def _with_uar_mtp(decoder: Any, mtp: Any) -> Any:
    """Give multi-token-prediction layers the routers of the decoder they belong to."""
    if mtp is None or not isinstance(decoder, UARBlockSubmodules):
        return mtp
    layers = [
        dataclasses.replace(
            layer,
            submodules=dataclasses.replace(
                layer.submodules,
                mtp_model_layer=_with_uar_router(layer.submodules.mtp_model_layer, decoder.uar),
            ),
        )
        for layer in mtp.layer_specs
    ]
    return dataclasses.replace(mtp, layer_specs=layers)


def _with_uar_router(layer: Any, uar: UARConfig, number: int | None = None) -> Any:
    mlp = layer.submodules.mlp
    if not (isinstance(mlp, functools.partial) and mlp.func is MoELayer):
        return layer
    return dataclasses.replace(
        layer,
        submodules=dataclasses.replace(layer.submodules, mlp=with_uar_moe_layer(mlp, uar, number)),
    )


def with_uar_moe_layer(
    mlp: functools.partial[MoELayer], uar: UARConfig, number: int | None = None
) -> Any:
    """Return Megatron's builder of a ``MoELayer`` as one of a ``UARMoELayer`` with our router.

    Args:
        mlp: the builder.
        uar: the UAR section.
        number: 1-based number of the transformer layer, None where its budget does not depend on
            it (layers for multi-token prediction).
    """
    submodules = mlp.keywords["submodules"]
    if submodules.router is not TopKRouter:
        raise UARError(
            f"the layer spec already has a router of its own ({submodules.router}); "
            "uar_megatron replaces Megatron's TopKRouter only"
        )
    ours = dataclasses.replace(submodules, router=functools.partial(UARRouter, uar=uar))
    experts = submodules.experts
    if isinstance(experts, functools.partial) and experts.func is SequentialMLP:
        ours = dataclasses.replace(
            ours, experts=functools.partial(_local_experts, *experts.args, **experts.keywords)
        )
    known = {**mlp.keywords, "submodules": ours, "layer_number": number}
    return functools.partial(UARMoELayer, *mlp.args, **known)


def _local_experts(num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> SequentialMLP:
    """Build the experts of a local spec: grouped where ``moe_grouped_gemm`` asks for it."""
    experts = TorchGroupedMLP if config.moe_grouped_gemm else SequentialMLP
    return experts(num_local_experts, config, *args, **kwargs)


def assert_uar_routers(model: Iterable[torch.nn.Module]) -> None:
    """Raise UARError if a MoE layer of ``model`` routes with anything but a UAR router.

    ``--spec`` fails silently when its import does: stock routing would train instead.
    """
    chunks = list(model)
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer)]
    stock = [layer for layer in layers if not isinstance(layer.router, UARRouter)]
    if stock:
        raise UARError(
            f"{len(stock)} of {len(layers)} MoE layers were built with "
            f"{type(stock[0].router).__name__}, not with UARRouter.\n"
            "  remedy:  check that the spec was imported (Megatron ignores a --spec it cannot find)"
            "\n           and that multi-token-prediction layers come from megatron.training.models"
        )
    logger.info("UAR routers in %d MoE layers of this rank", len(routers_of(chunks)))
