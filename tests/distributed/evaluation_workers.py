"""One rank of an evaluation: loads a run in one layout after the other and writes what it says.

Run as ``evaluation_workers.py RUN RECORD OUTPUT``; rank 0 leaves in OUTPUT, for each layout, what
``forward`` and the lm-eval model say.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from uar_megatron.mcore import cpu

cpu.enable()

from evaluated_run import padded  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from uar_megatron.errors import UARError  # noqa: E402
from uar_megatron.evaluation.lm import UARMegatronLM  # noqa: E402
from uar_megatron.evaluation.model import CheckpointModel  # noqa: E402

LAYOUTS: dict[str, tuple[str, ...]] = {
    "EP2": ("expert_model_parallel_size=2",),
    "TP2": ("tensor_model_parallel_size=2",),
    "PP2": ("pipeline_model_parallel_size=2",),
    "DP2": (),
    # Ranks that exchange tokens have sequences of different lengths.
    "EP2, exact": ("expert_model_parallel_size=2", "uar.budget.mode=exact"),
}
TEXTS = ["the text of a test", "another text", "x", "a b c " * 30, "of a test"]


FAULT = 250
"""A sequence that begins with it makes the forward fail."""


def fail(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if arguments[0][0, 0] == FAULT:
        raise RuntimeError if arguments[0][0, 1] == FAULT else RuntimeError("broken\nhere")


def failures(model: CheckpointModel) -> list[str]:
    """What rank 0 says where its own forward fails, rank 1's, both; then nothing has failed."""
    said = []
    for rows in ([[FAULT, 1], [1, 1]], [[1, 1], [FAULT, 1]], [[FAULT, 1], [FAULT, FAULT]]):
        try:
            model.score(rows, [[], []])
        except UARError as error:
            said.append(str(error))
    model.score([[1], [1]], [[], []])
    return said


def evaluate(run: str, overrides: tuple[str, ...], sequences: list[list[int]]) -> Any:
    model = CheckpointModel(run, overrides, batch_size=2)
    model._ranks.model[0].register_forward_pre_hook(fail, with_kwargs=True)
    try:
        lm = UARMegatronLM(model=model, batch_size=2)
    except SystemExit:  # the ranks that have served
        return None
    with model:
        forwarded = model.forward(padded(sequences), [len(s) for s in sequences])
        requests = [
            Instance("loglikelihood", {}, (text, " a test"), i, metadata=("t", i, 1))
            for i, text in enumerate(TEXTS)
        ]
        found = lm.loglikelihood(requests, disable_tqdm=True)
        return {
            "logits": forwarded.logits,
            "k": forwarded.signals.k_LBS,
            "slots": forwarded.signals.slots_LE,
            "energy": forwarded.signals.energy_LBS,
            "likelihoods": found,
            "usage": lm.describe_usage(),
            "layout": model.describe()["layout"],
            "failures": failures(model) if not overrides else [],
        }


def main() -> None:
    run, record, output = sys.argv[1:]
    sequences = torch.load(record)["sequences"]
    found = {name: evaluate(run, overrides, sequences) for name, overrides in LAYOUTS.items()}
    if torch.distributed.get_rank() == 0:
        Path(output).write_bytes(pickle.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
