"""Observed steps: token-level signals of one optimizer step in every so many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from uar_megatron.mcore.compat import TopKRouter, keep_state_over_reruns
from uar_megatron.mcore.token_classes import TokenClasses
from uar_megatron.mcore.watching import (
    dispatched_map,
    row_of,
    selection_bias,
    valid_tokens,
    watch_routing,
)
from uar_megatron.observatory import TokenSignals, describe_tokens


class ObservedSteps:
    """Adds up the token-level signals of observed steps, for any kind of router.

    At other steps it asks once per decision whether this one is observed, and does nothing. At the
    end of an observed step there is one all-reduce over all ranks, for all layers together.

    Args:
        routers: this rank's.
        num_layers: of the whole model, with those for multi-token prediction.
        num_experts: E.
        temperature: τ.
        classes: knows the tokens' classes.
        is_observed: whether the current step is.
    """

    def __init__(
        self,
        routers: Sequence[TopKRouter],
        num_layers: int,
        num_experts: int,
        temperature: float,
        classes: TokenClasses,
        is_observed: Callable[[], bool],
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.classes, self.is_observed = classes, is_observed
        self.device = torch.cuda.current_device()
        num_classes = len(classes.names)
        self._width = TokenSignals.width(num_experts, num_classes)
        self._layers = [
            _Layer(router, TokenSignals(num_experts, temperature, num_classes, self.device))
            for router in routers
        ]
        for layer in self._layers:
            self._watch(layer)
        # A step that Megatron repeats is looked at again.
        keep_state_over_reruns(lambda: None, lambda saved: self._clear())

    def take(self) -> dict[int, dict[str, Any]]:
        """Reduce and forget an observed step; called on every rank.

        Returns:
            For each row that is a MoE layer the fields of a ``LayerObservation``.
        """
        table = torch.zeros(
            self.num_layers,
            self._width + _Layer.SHARED * self.num_experts + 2,
            dtype=torch.float64,
            device=self.device,
        )
        for layer in self._layers:
            row = table[row_of(layer.router)]
            row[: self._width] = layer.signals.flat()
            row[self._width :] = layer.shared()
        self._clear()
        torch.distributed.all_reduce(table)
        return {
            index: describe_tokens(row[: self._width], self.num_experts, self.classes.names)
            | self._describe_shared(row[self._width :])
            for index, row in enumerate(table.cpu())
            if row[-2]  # ranks that have this layer
        }

    def _describe_shared(self, sums: torch.Tensor) -> dict[str, Any]:
        squares_E, bias_E, (ranks, with_bias) = sums.split([self.num_experts] * 2 + [2])
        squares_E = squares_E / ranks
        return {
            "router_norm": float(squares_E.sum().sqrt()),
            "router_row_norms": _six_digits(squares_E.sqrt()),
            "bias": _six_digits(bias_E / with_bias) if with_bias else None,
        }

    def _clear(self) -> None:
        self.classes.clear()
        for layer in self._layers:
            layer.signals.clear()
            layer.at_step = None

    def _watch(self, layer: _Layer) -> None:
        router = layer.router

        def look(
            logits: torch.Tensor,
            padding_mask: torch.Tensor | None,
            probs: torch.Tensor,
            routed: torch.Tensor,
        ) -> None:
            if not (router.training and self.is_observed()):
                return
            class_AT = self.classes.of(router, logits.shape[0])
            if not torch.is_grad_enabled():
                return  # the first pass of activation recomputation
            k_T = dispatched_map(router, probs.detach(), routed).sum(dim=-1)
            logits_TE = logits.detach().reshape(-1, self.num_experts)
            layer.signals.add(logits_TE, k_T, valid_tokens(padding_mask), class_AT)
            layer.look_at_state()

        watch_routing(router, look)


def _six_digits(values: torch.Tensor) -> list[float]:
    """They are most of a run log: 48 layers of 256 experts have 25,000 of them."""
    return [float(f"{value:.6g}") for value in values.tolist()]


class _Layer:
    """One router's sums, and its state at the observed step."""

    SHARED = 2  # vectors of a value per expert

    def __init__(self, router: TopKRouter, signals: TokenSignals) -> None:
        self.router, self.signals = router, signals
        self.at_step: torch.Tensor | None = None

    def look_at_state(self) -> None:
        """Squared norms of the router's rows and its bias, once per step.

        In the forward, where all ranks have the same weights: with overlapped parameter gathering
        they are not yet whole at the end of a step.
        """
        if self.at_step is not None:
            return
        with torch.no_grad():
            squares_E = self.router.weight.double().square().sum(dim=-1)
            bias_E = selection_bias(self.router)
            counts = squares_E.new_tensor([1.0, float(bias_E is not None)])
            bias_E = torch.zeros_like(squares_E) if bias_E is None else bias_E.double()
            self.at_step = torch.cat((squares_E, bias_E, counts))

    def shared(self) -> torch.Tensor:
        """What :meth:`look_at_state` saw; zeros if the router met no token."""
        width = self.SHARED * self.signals.num_experts + 2
        if self.at_step is None:
            return self.signals.flat().new_zeros(width)
        return self.at_step
