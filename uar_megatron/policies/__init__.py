"""Routing policies by name. A new one is a file here and a line in ``POLICIES``."""

from uar_megatron.policies.base import RouterSettings, RoutingPolicy
from uar_megatron.policies.topk import TopKPolicy
from uar_megatron.policies.uar import UARPolicy

POLICIES: dict[str, type[RoutingPolicy]] = {
    "topk": TopKPolicy,
    "uar": UARPolicy,
}

__all__ = ["POLICIES", "RouterSettings", "RoutingPolicy"]
