"""Which class each token of the micro-batch at hand is of: a router does not see token ids.

Frequency deciles come from the ids that the model is called with, so they are known in anybody's
script; domains from the data loader's samples, which our own ``forward_step`` passes on. Pipeline
stages that are not given token ids have no classes. Layers for multi-token prediction class by the
id at the token's position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.mcore.compat import TopKRouter, get_tensor_model_parallel_rank
from uar_megatron.observatory import DECILES, NO_CLASS


class BatchDomains:
    """The data set of the blend that each sequence of the current micro-batch is from.

    Attributes:
        is_wanted: whether anybody looks at this micro-batch's.
        current: int64 ``[batch]``, the same on all tensor-parallel ranks; None where unknown.
    """

    def __init__(self) -> None:
        self.is_wanted: Callable[[], bool] = lambda: False
        self.current: torch.Tensor | None = None


DOMAINS = BatchDomains()
"""What our ``forward_step`` leaves for the model that it calls next."""


class TokenClasses:
    """Classes of the tokens that a model was last called with.

    Args:
        model: this rank's chunks, whose calls are looked at.
        num_domains: data sets of the blend; 0 where their numbers are not known.
        is_observed: whether the current step is.
    """

    def __init__(
        self,
        model: Iterable[torch.nn.Module],
        num_domains: int,
        is_observed: Callable[[], bool],
    ) -> None:
        self.names = [f"decile_{i + 1}" for i in range(DECILES)]
        self.names += [f"domain_{i}" for i in range(num_domains)]
        self.num_domains = num_domains
        self.is_observed = is_observed
        self.decile_V: torch.Tensor | None = None
        self._current: torch.Tensor | None = None
        # Of each router, those of micro-batches whose recomputation is still to come.
        self._first_passes: dict[TopKRouter, deque[torch.Tensor | None]] = {}
        for chunk in model:
            unwrapped: Any = chunk
            while hasattr(unwrapped, "module"):  # of data parallelism, of 16-bit training
                unwrapped = unwrapped.module
            unwrapped.register_forward_pre_hook(self._on_call, with_kwargs=True)
        if num_domains:
            DOMAINS.is_wanted = lambda: torch.is_grad_enabled() and is_observed()

    def of(self, router: TopKRouter, sequence: int) -> torch.Tensor | None:
        """The classes of the tokens that a router is given, int64 ``[2, tokens]``; None if unknown.

        To be called once in each pass of a training step. Activation recomputation comes in the
        order of the first passes, as pipeline schedules run micro-batches backward.

        Args:
            router: it.
            sequence: tokens of a sequence that it is given: all of this context-parallel rank's,
                or with sequence parallelism this tensor-parallel rank's part of them.
        """
        waiting = self._first_passes.setdefault(router, deque())
        if not torch.is_grad_enabled():
            waiting.append(self._current)
            return None
        current = waiting.popleft() if waiting else self._current
        if current is None or current.shape[1] % sequence:
            return None
        if current.shape[1] > sequence:
            part = get_tensor_model_parallel_rank()
            current = current[:, part * sequence : (part + 1) * sequence]
        return current.flatten(1)

    def clear(self) -> None:
        """Forget the step."""
        self._current = None
        self._first_passes.clear()

    def _on_call(self, chunk: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if not (chunk.training and self.is_observed()):
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        self._current = None if tokens is None else self._classify(tokens)

    def _classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[2, sequence, batch]``, in the order in which hidden states are laid out."""
        class_ASB = torch.full((2, *tokens.T.shape), NO_CLASS, device=tokens.device)
        if self.decile_V is not None:
            class_ASB[0] = self.decile_V[tokens.T].long()
        if DOMAINS.current is not None and len(DOMAINS.current) == len(tokens):
            class_ASB[1] = DOMAINS.current + DECILES
        return class_ASB
