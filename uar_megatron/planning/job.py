"""What is planned: a model, how and where it runs, and how its experts are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uar_megatron.flops import layers_with_experts
from uar_megatron.planning.activations import Implementation, Rows
from uar_megatron.planning.experts_per_token import LayerK
from uar_megatron.planning.hardware import Hardware
from uar_megatron.planning.layout import Layout
from uar_megatron.planning.load import Imbalance
from uar_megatron.planning.memory import RankMemory, fullest_stage
from uar_megatron.planning.state import Precision
from uar_megatron.planning.step_time import Overlap
from uar_megatron.shape import ModelShape

RESERVED = 0.08
"""Part of a GPU's memory that is left to the CUDA context, NCCL and fragmentation."""


@dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
        shape: the model.
        how: its implementation.
        layout: its layout.
        precision: bytes per parameter.
        overlap: what communication hides behind computation.
        hardware: the GPUs.
        mfu: fraction of the peak that matrix products reach (assumed).
        layers: experts per token of each MoE layer, MTP layers last.
        imbalance: of each of them.
        capacity_factor: ``moe_expert_capacity_factor``, None without a capacity.
        tokens: the budget, None for no end.
    """

    shape: ModelShape
    how: Implementation
    layout: Layout
    precision: Precision
    overlap: Overlap
    hardware: Hardware
    mfu: float
    layers: Sequence[LayerK]
    imbalance: Sequence[Imbalance]
    capacity_factor: float | None
    tokens: float | None

    def rows_of_layer(self, k: Sequence[float], imbalance: Sequence[float]) -> dict[int, Rows]:
        """Rows of a micro-batch by layer number, on the rank that receives most.

        Args:
            k: rows per token of each MoE layer.
            imbalance: rows of that rank over the mean.
        """
        tokens = self.layout.routed_tokens
        found = {}
        for i, layer in enumerate(self.moe_layers()):
            sent = tokens * k[i]
            # Ranks of expert tensor parallelism share the rows that each of them routed.
            received = sent * imbalance[i]
            if self.capacity_factor is not None:
                # Of each rank an expert takes factor · tokens · topk / E (moe_utils.py:248).
                received = min(received, self.capacity_factor * self.shape.topk * tokens)
            columns = self.layers[i].k_max
            found[layer] = Rows(tokens, columns, sent, received * self.layout.expert_tensor)
        return found

    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts; MTP layers count on from the decoder's."""
        return [i for i, is_moe in enumerate(layers_with_experts(self.shape)) if is_moe]

    def memory(self, rows_of_layer: Mapping[int, Rows], most_rows: float) -> RankMemory:
        """Memory of the fullest rank.

        Args:
            rows_of_layer: from :meth:`rows_of_layer`.
            most_rows: per token: what the kernels allocate for.
        """
        return fullest_stage(
            self.shape,
            self.how,
            self.layout,
            self.precision,
            rows_of_layer,
            self.layout.routed_tokens * most_rows,
        )

    def worst_memory(self, most: float = float("inf")) -> RankMemory:
        """Memory where every layer has its most rows, or ``most`` per token where that is less."""
        k = [min(layer.most_rows_per_token, most) for layer in self.layers]
        rows = self.rows_of_layer(k, [layer.worst for layer in self.imbalance])
        return self.memory(rows, max(k))

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return self.hardware.memory * (1 - RESERVED)
