"""Megatron's FLOPs of a step with the rows that experts computed in place of K per token."""

from __future__ import annotations

import argparse
from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.flops import FORWARD_AND_BACKWARD, layers_with_experts, mlp_flops, step_flops
from uar_megatron.mcore.compat import flops_function
from uar_megatron.shape import ModelShape, shape_of


class CountedFlops:
    """Counts the FLOPs of a run from its step records.

    The model's total is Megatron's own, so that all it knows (latent attention, multi-token
    prediction, …) stays, plus the rows of routed experts beyond K per token, and plus the gates of
    ``quick_geglu``, which Megatron counts for SwiGLU alone (training.py:610). A layer's figures are
    of ``uar_megatron.flops``, which counts the router too.

    Args:
        args: Megatron's validated arguments.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._static_flops = flops_function()
        self._row_flops = FORWARD_AND_BACKWARD * mlp_flops(
            args.moe_latent_size or args.hidden_size,
            args.moe_ffn_hidden_size or args.ffn_hidden_size,
            args.swiglu or args.quick_geglu,
        )
        # Per token, whatever its experts.
        self._gate_flops = 0.0
        if args.quick_geglu and not args.swiglu:
            gated = argparse.Namespace(**vars(args) | {"swiglu": True})
            gates = self._static_flops(gated, 1) - self._static_flops(args, 1)
            self._gate_flops = gates / args.seq_length
        # Of all MoE layers together, per token, beyond K; what the last record says.
        self._more_rows = 0.0
        self._shape: ModelShape | None
        try:
            self._shape = shape_of(args)
        except ConfigError:
            self._shape = None

    def correction(self, tokens: float) -> float:
        """FLOPs beyond Megatron's static count of a step, at the rows per token last counted.

        Before the first record rows are K per token. Every rank has the same ones.

        Args:
            tokens: of the step's global batch.
        """
        return tokens * (self._more_rows * self._row_flops + self._gate_flops)

    def add_to(self, record: dict[str, Any]) -> None:
        """Add FLOPs to a step record and its layers, and take note of its rows.

        Args:
            record: the fields of a step record, the same on every rank.
        """
        tokens, layers = record["tokens_per_step"], record["layers"]
        rows = sum(layer["rows"] for layer in layers) / tokens
        calls = sum(self._calls(layer["layer"]) for layer in layers)
        self._more_rows = rows - self.args.moe_router_topk * calls
        static = self._static_flops(self.args, tokens / self.args.seq_length)
        flops = static + self.correction(tokens)
        top_k = static + tokens * self._gate_flops
        seconds = max(record["seconds_per_step"], 1e-9)
        record["flops"] = flops
        record["flops_ratio"] = flops / top_k
        record["throughput"] = flops / (seconds * 1e12 * self.args.world_size)
        if self._shape is None:
            return
        rows_of = {i: n["rows"] / self._calls(i) for n in layers if (i := n["layer"])}
        has_experts = layers_with_experts(self._shape)
        numbers = [i for i, is_moe in enumerate(has_experts, start=1) if is_moe]
        step = step_flops(self._shape, tokens, [rows_of.get(number, 0.0) for number in numbers])
        for layer in layers:
            number = layer["layer"]
            layer["flops"] = step.per_layer[number - 1] * self._calls(number)
            layer["flops_ratio"] = step.layer_ratios[number - 1]

    def _calls(self, layer: int) -> int:
        """How often a forward pass runs a layer: all MTP layers may be one."""
        is_repeated = self.args.mtp_use_repeated_layer and layer > self.args.num_layers
        return int(self.args.mtp_num_layers) if is_repeated else 1
