"""What routers do with the tokens of an evaluation, kept token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from uar_kernels.uncertainty import energy_and_entropy
from uar_megatron.mcore.compat import TopKRouter
from uar_megatron.mcore.watching import dispatched_map, moe_layers, row_of, watch_routing


class RouterWatch:
    """Keeps k, F and H of each token, and each expert's tokens, of the micro-batches run.

    With sequence parallelism a rank's routers see a part of each sequence.

    Args:
        model: this rank's chunks.
        temperature: τ.
    """

    def __init__(self, model: list[torch.nn.Module], temperature: float) -> None:
        self.temperature = temperature
        self._valid_BS: torch.Tensor | None = None
        self._layers: dict[int, _Layer] = {}
        for moe in moe_layers(model):
            layer = _Layer(moe.router.num_experts)
            self._layers[row_of(moe.router) + 1] = layer
            self._watch(moe.router, layer)

    def begin(self, valid_BS: torch.Tensor) -> None:
        """Say which tokens of the next micro-batch are not padding."""
        self._valid_BS = valid_BS

    def clear(self) -> None:
        """Forget what was seen, and look away until the next micro-batch."""
        self._valid_BS = None
        for layer in self._layers.values():
            layer.clear()

    def take(self) -> dict[int, dict[str, Any]]:
        """Return and forget: for each MoE layer a list of ``[3, sequences, tokens]`` arrays with k,
        F and H, one for each micro-batch, and ``slots``, int64 ``[experts]``."""
        found = {
            number: {
                "tokens": [part.cpu().numpy() for part in layer.parts],
                "slots": layer.slots(),
            }
            for number, layer in self._layers.items()
        }
        self.clear()
        return found

    def _watch(self, router: TopKRouter, layer: _Layer) -> None:
        def look(
            logits: torch.Tensor, padding_mask: Any, probs: torch.Tensor, routed: torch.Tensor
        ) -> None:
            if self._valid_BS is None:
                return
            length, size, experts = logits.shape
            routed_TE = dispatched_map(router, probs, routed)
            energy_T, entropy_T = energy_and_entropy(logits.reshape(-1, experts), self.temperature)
            signals_3T = torch.stack((routed_TE.sum(dim=-1).float(), energy_T, entropy_T))
            layer.parts.append(signals_3T.float().view(3, length, size).transpose(1, 2))
            valid_SB = _own_part(self._valid_BS, length).T.to(logits.device)
            kept_TE = routed_TE & valid_SB.reshape(-1, 1)
            layer.counts.append(kept_TE.sum(dim=0))

        watch_routing(router, look)


def _own_part(valid_BS: torch.Tensor, length: int) -> torch.Tensor:
    """This rank's tokens of the sequences, where tensor-parallel ranks share them."""
    if valid_BS.shape[1] == length:
        return valid_BS
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() * length
    return valid_BS[:, first : first + length]


class _Layer:
    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.clear()

    def clear(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []

    def slots(self) -> np.ndarray:
        if not self.counts:
            return np.zeros(self.num_experts, dtype=np.int64)
        total: np.ndarray = torch.stack(self.counts).sum(dim=0).cpu().numpy().astype(np.int64)
        return total
