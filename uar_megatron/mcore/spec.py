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
from uar_megatron.mcore.arguments import check_compatible
from uar_megatron.mcore.compat import (
    MoELayer,
    TopKRouter,
    TransformerBlockSubmodules,
    default_layer_spec,
    finalize_model_grads,
)
from uar_megatron.mcore.moe_layer import UARMoELayer
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
        ConfigError: the section is invalid, or does not go with Megatron's configuration.
    """
    config_of_uar = uar if isinstance(uar, UARConfig) else load_uar_section(uar)

    def layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer = getattr(config, "transformer", config)
        check_compatible(config_of_uar, transformer)
        finalize = transformer.finalize_model_grads_func or finalize_model_grads
        if not isinstance(finalize, StepBoundary):
            transformer.finalize_model_grads_func = StepBoundary(finalize)
        return with_uar_routers(default_layer_spec(config, vp_stage), config_of_uar)

    return layer_spec


def with_uar_routers(
    block: TransformerBlockSubmodules, uar: UARConfig
) -> TransformerBlockSubmodules:
    """Return a copy of a block spec whose MoE layers are ours; layers may share one spec object."""
    return dataclasses.replace(
        block, layer_specs=[_with_uar_router(layer, uar) for layer in block.layer_specs]
    )


def _with_uar_router(layer: Any, uar: UARConfig) -> Any:
    mlp = layer.submodules.mlp
    if not (isinstance(mlp, functools.partial) and mlp.func is MoELayer):
        return layer
    return dataclasses.replace(
        layer,
        submodules=dataclasses.replace(layer.submodules, mlp=with_uar_moe_layer(mlp, uar)),
    )


def with_uar_moe_layer(mlp: functools.partial[MoELayer], uar: UARConfig) -> Any:
    """Return Megatron's builder of a ``MoELayer`` as one of a ``UARMoELayer`` with our router."""
    submodules = mlp.keywords["submodules"]
    if submodules.router is not TopKRouter:
        raise UARError(
            f"the layer spec already has a router of its own ({submodules.router}); "
            "uar_megatron replaces Megatron's TopKRouter only"
        )
    ours = dataclasses.replace(submodules, router=functools.partial(UARRouter, uar=uar))
    return functools.partial(UARMoELayer, *mlp.args, **{**mlp.keywords, "submodules": ours})


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
        )
    logger.info("UAR routers in %d MoE layers of this rank", len(routers_of(chunks)))
