"""Experts as two grouped matrix products, where Transformer Engine's are not to be had."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uar_megatron.mcore.compat import SequentialMLP


class TorchGroupedMLP(SequentialMLP):
    """``SequentialMLP`` whose experts are computed together by ``torch.nn.functional.grouped_mm``.

    Parameters and checkpoints are those of ``SequentialMLP``; the weights are stacked in each
    forward, which costs one copy of them and saves two launches per expert. Takes the place of
    ``SequentialMLP`` under ``moe_grouped_gemm`` with ``transformer_impl=local``, which Megatron
    itself ignores there (backends.py:133). Rows per expert are what the dispatcher delivers, with
    no padding.
    """

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Compute the local experts' outputs, each row weighted by its probability.

        Args:
            permuted_local_hidden_states: ``[rows, hidden]``, ordered by expert.
            tokens_per_expert: int64 ``[local experts]``, summing to the rows.
            permuted_probs: ``[rows]``.

        Returns:
            ``[rows, hidden]``, and None for the bias.
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            rows = (rows * probs.unsqueeze(-1)).to(rows.dtype)
            probs = torch.ones_like(probs)
        ends_E = tokens_per_expert.to(rows.device).cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(rows, self._weights("linear_fc1"), offs=ends_E)
        config = self.config
        if config.gated_linear_unit:
            gate, linear = torch.chunk(hidden, 2, dim=-1)
            limit = config.activation_func_clamp_value
            if limit is not None:
                gate = gate.clamp(max=limit)
                linear = linear.clamp(min=-limit, max=limit)
            hidden = config.activation_func(gate) * (linear + config.glu_linear_offset)
        else:
            hidden = config.activation_func(hidden)
        hidden = (hidden * probs.unsqueeze(-1)).to(rows.dtype)
        return F.grouped_mm(hidden, self._weights("linear_fc2"), offs=ends_E), None

    def _weights(self, linear: str) -> torch.Tensor:
        """``[local experts, in, out]``; transposed views, as grouped_mm wants them."""
        weights = [getattr(expert, linear).weight for expert in self.local_experts]
        return torch.stack(weights).transpose(1, 2)
