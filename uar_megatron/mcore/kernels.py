"""Whether a model's routers and dispatchers use the fused kernels (``uar.kernel_backend``)."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from uar_kernels.backend import resolve_for
from uar_kernels.routing import MOST_EXPERTS
from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, UnsupportedEnvironmentError
from uar_megatron.mcore.policies import num_experts
from uar_megatron.policies import find_policy
from uar_megatron.policies.base import KernelPolicy
from uar_megatron.shape import capacity_factor

logger = logging.getLogger(__name__)


def uses_kernels(uar: UARConfig, config: Any) -> bool:
    """Return whether the kernels run; ``auto`` says once in the log which it is and why.

    Args:
        uar: the UAR section.
        config: Megatron's arguments or its ``TransformerConfig``.

    Raises:
        ConfigError: ``triton`` was asked for, with settings that the kernels do not know.
        UnsupportedEnvironmentError: ``triton`` was asked for and cannot run on this machine.
    """
    if uar.kernel_backend == "torch":
        return False
    reason = unknown_setting(uar, config)
    if uar.kernel_backend == "triton":
        if reason is not None:
            raise ConfigError(
                "uar.kernel_backend",
                f"triton: the kernels cannot do it, {reason}",
                remedy="use uar.kernel_backend=auto or torch, or change that setting",
            )
        try:
            resolve_for("triton", torch.cuda.is_available())
        except RuntimeError as error:
            raise UnsupportedEnvironmentError(f"uar.kernel_backend: {error}") from error
        return True
    if reason is None and resolve_for("auto", torch.cuda.is_available()) == "torch":
        reason = "there is no GPU here, or no triton"
    _say("plain torch, because " + reason if reason else "triton kernels")
    return reason is None


def takes_indices(config: Any) -> bool:
    """Return whether the dispatcher takes the kernels' indices as they are, without a dense map."""
    dispatcher = config.moe_token_dispatcher_type
    tables = dispatcher == "flex" and config.moe_flex_dispatcher_backend != "hybridep"
    return dispatcher == "alltoall" or tables


@functools.cache
def _say(which: str) -> None:
    logger.warning("uar.kernel_backend=auto: %s", which)


def unknown_setting(uar: UARConfig, config: Any) -> str | None:
    """Return what the kernels do not know of these settings, None if they know them all."""
    if not issubclass(find_policy(uar.policy), KernelPolicy):
        return f"they do not know uar.policy={uar.policy}"
    experts = num_experts(config)
    if experts > MOST_EXPERTS:
        return f"they know up to {MOST_EXPERTS} experts, these are {experts}"
    if config.moe_router_score_function not in ("softmax", "sigmoid"):
        return f"they have no moe_router_score_function={config.moe_router_score_function}"
    if config.moe_router_group_topk:
        return "they do not limit tokens to groups of experts (moe_router_group_topk)"
    if uar.weights == "renormalised_to_K":
        return "they have no uar.weights=renormalised_to_K"
    if config.moe_router_dtype == "fp64":
        return "they compute in fp32 (moe_router_dtype=fp64)"
    if capacity_factor(config) is not None:
        return "they do not drop tokens (moe_expert_capacity_factor)"
    if config.moe_router_padding_for_quantization:
        return "they do not pad experts (moe_router_padding_for_quantization)"
    return None
