"""Our entry, and after the training what its model says of some sequences, written down.

Run as ``forward_after_training.py`` with the entry's arguments, one rank, and in ``RECORD`` a file
that has ``sequences``: it gets, for each, the model's ``logits`` and each MoE layer's ``k``,
``energy`` and ``entropy``, from forwards of one sequence without padding.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from uar_megatron.mcore import cpu

cpu.enable()

from uar_megatron.mcore.loop import on_built_model  # noqa: E402
from uar_megatron.mcore.router import UARRouter  # noqa: E402
from uar_megatron.pretrain import main  # noqa: E402

MODEL: list[torch.nn.Module] = []


def direct_forward(model: torch.nn.Module, tokens: list[int]) -> dict[str, Any]:
    """One sequence through a model in evaluation mode, and what its routers decided."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    route = UARRouter.routing

    def recording(self: UARRouter, logits: torch.Tensor, padding_mask: Any = None) -> Any:
        result = route(self, logits, padding_mask=padding_mask)
        seen.append((logits.detach()[:, 0].double(), result[1]))
        return result

    UARRouter.routing = recording
    length = len(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(length)[None], mask)[0]
    UARRouter.routing = route
    probs = [torch.softmax(z_TE, dim=-1) for z_TE, _ in seen]
    return {
        "logits": logits,
        "k": torch.stack([map_TE.sum(dim=-1) for _, map_TE in seen]),
        "slots": torch.stack([map_TE.sum(dim=0) for _, map_TE in seen]),
        "energy": torch.stack([-z_TE.exp().sum(dim=-1).log() for z_TE, _ in seen]),
        "entropy": torch.stack([-(p * p.log()).sum(dim=-1) for p in probs]),
    }


if __name__ == "__main__":
    on_built_model(lambda model, args: MODEL.extend(model))
    main()
    (chunk,) = MODEL
    chunk.eval()
    record = torch.load(os.environ["RECORD"])
    record["found"] = [direct_forward(chunk.module, s) for s in record["sequences"]]
    torch.save(record, os.environ["RECORD"])
