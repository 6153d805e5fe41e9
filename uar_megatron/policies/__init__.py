"""Routing policies by name. A new one is a file here and a line in ``POLICIES``."""

from __future__ import annotations

import importlib
import inspect

from uar_megatron.config import nearest
from uar_megatron.errors import ConfigError
from uar_megatron.policies.base import RouterSettings, RoutingPolicy
from uar_megatron.policies.relu import ReLUPolicy
from uar_megatron.policies.seq_topk import SeqTopKPolicy
from uar_megatron.policies.sinkhorn_selective import SelectiveSinkhornPolicy
from uar_megatron.policies.top_p import TopPPolicy
from uar_megatron.policies.topk import TopKPolicy
from uar_megatron.policies.uar import UARPolicy

POLICIES: dict[str, type[RoutingPolicy]] = {
    "topk": TopKPolicy,
    "uar": UARPolicy,
    "top_p": TopPPolicy,
    "relu": ReLUPolicy,
    "seq_topk": SeqTopKPolicy,
    "sinkhorn_selective": SelectiveSinkhornPolicy,
}


def find_policy(name: str) -> type[RoutingPolicy]:
    """Return the class of a policy: one of ``POLICIES``, or ``module:Class`` from anywhere.

    Raises:
        ConfigError: there is none of this name, or it is not a ``RoutingPolicy``.
    """
    if name in POLICIES:
        return POLICIES[name]
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ConfigError(
            "uar.policy",
            f"{name!r} is not allowed",
            allowed=", ".join((*POLICIES, "module:Class for one of your own")),
            remedy=nearest(name, POLICIES),
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever a module of somebody else's raises
        raise ConfigError(
            "uar.policy",
            f"{name!r} cannot be imported: {type(error).__name__}: {error}",
            remedy="name a module that Python finds on every rank (PYTHONPATH, or the folder that "
            "the job starts in) and a class in it",
        ) from error
    is_policy = isinstance(found, type) and issubclass(found, RoutingPolicy)
    if not is_policy or inspect.isabstract(found):
        raise ConfigError(
            "uar.policy",
            f"{name!r} is not a routing policy",
            allowed="a subclass of uar_megatron.policies.RoutingPolicy that has its method route",
        )
    return found


__all__ = ["POLICIES", "RouterSettings", "RoutingPolicy", "find_policy"]
