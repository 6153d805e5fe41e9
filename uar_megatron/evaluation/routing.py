"""Policies that look at several tokens at once: one sequence at a time, to its last token."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from typing import Any

import torch

from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.step import routers_of
from uar_megatron.policies.base import KernelPolicy
from uar_megatron.shape import capacity_factor


def prepare_policies(model: list[torch.nn.Module], args: argparse.Namespace) -> bool:
    """Return whether every layer decides about each token by itself. Called on every rank.

    Where one does not, its policy is made to count the tokens after the last whole segment as a
    segment of their own.

    Raises:
        ConfigError: the layout would change what is counted together.
    """
    together: list[UARRouter] = [
        router for router in routers_of(model) if not router.policy.is_per_token
    ]
    mixes = bool(together) or capacity_factor(args) is not None
    found: list[bool] = [mixes] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mixes)
    if not any(found):
        return True
    why = "this routing decides about the tokens of a sequence together"
    if args.tensor_model_parallel_size > 1:
        raise ConfigError(
            "tensor_model_parallel_size",
            f"{args.tensor_model_parallel_size}: {why}, and tensor parallelism cuts it",
            allowed="1",
            remedy="spread the model with expert_model_parallel_size instead",
        )
    if args.moe_token_dispatcher_type == "allgather" and args.expert_model_parallel_size > 1:
        raise ConfigError(
            "moe_token_dispatcher_type",
            f"allgather: {why}, and ranks with sequences of different lengths cannot gather them",
            allowed="alltoall",
        )
    for router in together:
        if router.policy.segment is not None:
            _count_the_rest(router.policy)
    return False


def _count_the_rest(policy: Any) -> None:
    """Let a policy that counts in segments take a sequence that is no whole number of them."""
    segment: int = policy.segment
    # The methods of the class, bound: those of the instance are replaced below.
    whole, rest = copy.copy(policy), _without_segment(policy)

    def parts(tokens: int) -> list[tuple[Any, slice]]:
        """Who decides about which tokens."""
        cut = tokens // segment * segment
        both = [(whole, slice(0, cut)), (rest, slice(cut, tokens))]
        return [(of, at) for of, at in both if at.stop > at.start]

    def route(
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        return _joined(
            [
                of.route(logits_TE[at], _part(uncertainty, at), bias_E, step, batch_size)
                for of, at in parts(len(logits_TE))
            ]
        )

    def experts_of(
        zscore_T: torch.Tensor, step: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = [of.experts_of(zscore_T[at], step, batch_size) for of, at in parts(len(zscore_T))]
        return torch.cat([k_T for k_T, _ in found]), _joined_wanted(found)

    def total_slots(tokens: int, step: int) -> int | None:
        counts = [of.total_slots(at.stop - at.start, step) for of, at in parts(tokens)]
        return None if None in counts else sum(counts)

    policy.route, policy.total_slots = route, total_slots
    if isinstance(policy, KernelPolicy):
        policy.experts_of = experts_of  # type: ignore[method-assign]


def _without_segment(policy: Any) -> Any:
    """The same policy, with the same state, which counts over all tokens that it is given."""
    rest = copy.copy(policy)
    budget = dataclasses.replace(policy.settings.budget, segment=None)
    rest.settings = dataclasses.replace(policy.settings, budget=budget)
    rest.segment = None
    if hasattr(policy, "budget"):
        rest.budget = copy.copy(policy.budget)
        rest.budget.budget = budget
    return rest


def _part(uncertainty: Uncertainty, at: slice) -> Uncertainty:
    values = {
        field.name: getattr(uncertainty, field.name)[at]
        for field in dataclasses.fields(uncertainty)
        if field.name.endswith("_T")
    }
    return dataclasses.replace(uncertainty, **values)


def _joined(parts: list[RoutingDecision]) -> RoutingDecision:
    return RoutingDecision(
        torch.cat([p.probs_TE for p in parts]),
        torch.cat([p.routing_map_TE for p in parts]),
        torch.cat([p.k_T for p in parts]),
        _joined_wanted([(p.k_T, p.wanted_k_T) for p in parts]),
    )


def _joined_wanted(parts: list[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    wanted = [wanted_T for _, wanted_T in parts if wanted_T is not None]
    return torch.cat(wanted) if len(wanted) == len(parts) else None
