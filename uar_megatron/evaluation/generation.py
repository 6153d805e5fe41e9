"""Greedy continuation of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.usage import Usage


def continue_greedily(
    model: CheckpointModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    stops: Sequence[str],
    usages: Sequence[Usage],
) -> list[list[int]]:
    """Return the tokens that follow each prompt, the most probable at a time.

    Every step runs the whole sequence: there is no cache of keys and values. A sequence ends with
    the id that ends documents, at its ``most`` tokens, or when its text has a stop string, which
    may be a special token.

    Args:
        model: on rank 0, while the others serve.
        prompts: token ids; with its ``most`` more each fits into the model's window.
        most: tokens to generate, for each prompt.
        stops: strings.
        usages: of each prompt's task; the last forward of each sequence, which has all its tokens,
            is added.
    """
    rows = [list(prompt) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(rows)))
    for step in range(max(most)):
        width = max(len(rows[i]) for i in going)
        tokens_BS = torch.zeros(len(going), width, dtype=torch.int64)
        for b, i in enumerate(going):
            tokens_BS[b, : len(rows[i])] = torch.tensor(rows[i])
        found = model.last_logits(tokens_BS, [len(rows[i]) for i in going])
        best = found.logits.argmax(dim=-1).tolist()
        left = []
        for b, (i, token) in enumerate(zip(going, best, strict=True)):
            made[i].append(token)
            text = model.text.decode(made[i])
            if token == model.text.eod or any(s in text for s in stops if s) or step == most[i] - 1:
                usages[i].add(found.signals, b, len(rows[i]))
                continue
            rows[i].append(token)
            left.append(i)
        going = left
        if not going:
            break
    return made
