"""What the routers spent on a task: experts, FLOPs, and how sure they were."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uar_megatron.evaluation.collect import Signals
from uar_megatron.flops import forward_flops
from uar_megatron.shape import ModelShape


@dataclass
class Usage:
    """Sums over the tokens that a model was run on, padding left out.

    Attributes:
        tokens: their number.
        context: Σ of the length of the sequence that each of them was in.
        k: Σ of experts, for each MoE layer.
        energy: Σ of F, for each MoE layer.
        entropy: Σ of H, for each MoE layer.
        slots: tokens of each expert, for each MoE layer; None where they are not asked for.
    """

    tokens: int = 0
    context: float = 0.0
    layers: tuple[int, ...] = ()
    k: np.ndarray = field(default_factory=lambda: np.zeros(0))
    energy: np.ndarray = field(default_factory=lambda: np.zeros(0))
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(0))
    slots: np.ndarray | None = None

    def add(self, signals: Signals, row: int, length: int) -> None:
        """Add one sequence of a batch, which is padded on the right."""
        if not self.layers:
            self.layers = signals.layers
            self.k, self.energy, self.entropy = (np.zeros(len(signals.layers)) for _ in range(3))
        own = slice(0, length)
        self.tokens += length
        self.context += float(length) ** 2
        self.k += signals.k_LBS[:, row, own].sum(axis=-1)
        self.energy += signals.energy_LBS[:, row, own].sum(axis=-1, dtype=np.float64)
        self.entropy += signals.entropy_LBS[:, row, own].sum(axis=-1, dtype=np.float64)

    def add_usage(self, other: Usage) -> None:
        """Add the sums of another set."""
        if not self.layers:
            self.layers = other.layers
            self.k, self.energy, self.entropy = (np.zeros(len(other.layers)) for _ in range(3))
        self.tokens += other.tokens
        self.context += other.context
        for name in ("k", "energy", "entropy"):
            if other.tokens:
                setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_loads(self, signals: Signals) -> None:
        """Add the loads of the experts in a whole batch."""
        self.slots = signals.slots_LE if self.slots is None else self.slots + signals.slots_LE

    def describe(self, shape: ModelShape | None) -> dict[str, Any]:
        """Return means per token, over the MoE layers and of each; FLOPs of the forward.

        FLOPs count the rows that experts computed, and attention over the sequences' own lengths
        (``uar_megatron.flops``); an architecture whose FLOPs are not modelled (None for its shape)
        has none. ``max_vio`` is the largest load of an expert over the mean load,
        less one, over the whole set; the mean over the layers.
        """
        if not self.tokens:
            return {"tokens": 0}
        k_L = self.k / self.tokens
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "k_eff": float(k_L.mean()) if len(k_L) else 0.0,
            **({} if shape is None else self._flops(shape, k_L)),
            "energy": float(self.energy.mean() / self.tokens) if len(k_L) else 0.0,
            "entropy": float(self.entropy.mean() / self.tokens) if len(k_L) else 0.0,
            "layers": {
                str(layer): {
                    "k_eff": float(k),
                    "energy": float(energy) / self.tokens,
                    "entropy": float(entropy) / self.tokens,
                }
                for layer, k, energy, entropy in zip(
                    self.layers, k_L, self.energy, self.entropy, strict=True
                )
            },
        }
        if self.slots is not None and self.slots.size:
            mean_L = self.slots.mean(axis=1)
            violation_L = self.slots.max(axis=1) / np.maximum(mean_L, 1e-12) - 1.0
            found["max_vio"] = float(violation_L.mean())
            for layer, violation in zip(self.layers, violation_L, strict=True):
                found["layers"][str(layer)]["max_vio"] = float(violation)
        return found

    def _flops(self, shape: ModelShape, k_L: np.ndarray) -> dict[str, float]:
        # A token's attention core costs as much as the mean position in its sequence.
        at_length = dataclasses.replace(shape, seq_length=self.context / self.tokens)  # type: ignore[arg-type]
        parts = forward_flops(at_length)
        own = dict(zip(self.layers, k_L, strict=True))

        def total(top_k: bool) -> float:
            layers = (
                parts.layer((shape.topk if top_k else own[i + 1]) if is_moe else None)
                for i, is_moe in enumerate(shape.is_moe)
            )
            return float(sum(layers) + parts.logits)

        flops = total(False)
        return {"flops_per_token": flops, "flops_ratio": flops / total(True)}
