"""Our entry, with everything that the observatory's signals are made of written down.

Run as ``recorded_pretrain.py`` with the entry's arguments, and a folder in ``RECORD``: each rank
leaves there, as ``rank_<r>.pt``, what its routers were given and decided, and its experts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from uar_megatron.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

from uar_megatron.mcore import observer, probe  # noqa: E402
from uar_megatron.mcore.compat import current_iteration  # noqa: E402
from uar_megatron.mcore.router import UARRouter  # noqa: E402
from uar_megatron.mcore.watching import dispatched_map, row_of  # noqa: E402
from uar_megatron.pretrain import main  # noqa: E402

CALLS: list[dict[str, Any]] = []
PROBED: list[dict[str, Any]] = []
TOKENS: list[Any] = [None]
COUNTS: list[torch.Tensor] = []


def record() -> None:
    route, forward, output = UARRouter.routing, GPTModel.forward, probe.output_similarity
    count = observer.count_ids

    def recording_route(self: UARRouter, logits: Any, padding_mask: Any = None) -> Any:
        result = route(self, logits, padding_mask=padding_mask)
        CALLS.append(
            {
                "step": current_iteration(),
                "layer": row_of(self) + 1,
                "training": self.training,
                "grad": torch.is_grad_enabled(),
                "tokens": TOKENS[0],
                "logits": logits.detach().clone(),
                "map": dispatched_map(self, *result).view(logits.shape),
                "weight": self.weight.detach().clone(),
            }
        )
        return result

    def recording_forward(self: GPTModel, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        TOKENS[0] = input_ids
        return forward(self, input_ids, *args, **kwargs)

    def recording_output(moe: Any, inputs: torch.Tensor) -> torch.Tensor:
        result = output(moe, inputs)  # which broadcasts into the inputs
        PROBED.append(
            {
                "step": current_iteration(),
                "layer": row_of(moe.router) + 1,
                "inputs": inputs,
                "experts": [
                    {name: w.detach().clone() for name, w in expert.named_parameters()}
                    for expert in moe.experts.local_experts
                ],
            }
        )
        return result

    def recording_count(*args: Any) -> torch.Tensor:
        COUNTS.append(count(*args))
        return COUNTS[0]

    observer.count_ids = recording_count
    UARRouter.routing, GPTModel.forward = recording_route, recording_forward
    probe.output_similarity = recording_output


if __name__ == "__main__":
    record()
    main()
    where = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
    }
    target = Path(os.environ["RECORD"]) / f"rank_{torch.distributed.get_rank()}.pt"
    torch.save({**where, "calls": CALLS, "probed": PROBED, "counts": COUNTS}, target)
