"""One batch over all ranks: spread over data-parallel ranks, run down the pipeline, collected."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from uar_megatron.errors import UARError
from uar_megatron.evaluation.collect import Signals, outputs_of, signals_of
from uar_megatron.evaluation.failures import describe_failure, first_line
from uar_megatron.evaluation.signals import RouterWatch

logger = logging.getLogger(__name__)

Row = tuple[torch.Tensor, Sequence[int]]
_NOTHING: Row = (torch.zeros(0, dtype=torch.int64), ())

What = Literal["logits", "scores", "last"]
_PATIENCE = timedelta(days=30)
"""Rank 0 may prepare tasks, or wait for a user, for longer than collectives usually may."""


@dataclass
class MicroBatch:
    """Rows of one length, padded on the right; those with a ``lengths`` of 0 only fill it up.

    ``finals`` are the tokens after each row that are to be scored.
    """

    tokens_BS: torch.Tensor
    lengths: list[int]
    finals: Sequence[Sequence[int]]

    @property
    def valid(self) -> torch.Tensor:
        """True for tokens that are not padding, ``[sequences, tokens]``."""
        at_S, lengths_B = torch.arange(self.tokens_BS.shape[1]), torch.tensor(self.lengths)
        return at_S < lengths_B[:, None]


class Ranks:
    """Runs batches on the model, on every rank of the job together.

    Args:
        model: this rank's chunk, in a list.
        args: Megatron's arguments.
        temperature: τ of energy and entropy.
        batch_size: rows of a micro-batch.
        vocab_size: ids below it are tokens.
        is_per_token: whether rows may be padded to one length.
    """

    def __init__(
        self,
        model: list[torch.nn.Module],
        args: argparse.Namespace,
        *,
        temperature: float,
        batch_size: int,
        vocab_size: int,
        is_per_token: bool,
    ) -> None:
        from megatron.core import parallel_state as ps

        self.model, self.args = model, args
        self.batch_size, self.vocab_size = batch_size, vocab_size
        self.is_per_token = is_per_token
        self.watch = RouterWatch(model, temperature)
        self.data_rank, self.data_ranks = (
            ps.get_data_parallel_rank(),
            ps.get_data_parallel_world_size(),
        )
        self.tensor_rank = ps.get_tensor_model_parallel_rank()
        self.is_last = ps.is_pipeline_last_stage()
        self.is_alone = torch.distributed.get_world_size() == 1
        self._control: torch.distributed.ProcessGroup | None = None
        if not self.is_alone:
            self._control = _control_group()
        self._is_open = True

    def run(
        self,
        what: What,
        rows: Sequence[np.ndarray],
        *,
        width: int,
        is_left: bool = False,
        finals: Sequence[Sequence[int]] = (),
    ) -> tuple[list[np.ndarray], Signals]:
        """Run one batch; on rank 0.

        Args:
            what: ``logits`` of each token, those of the ``last`` one, or ``scores``: (log p,
                is_greedy) of a row's tokens from the second on, and then of its ``finals``.
            rows: tokens without padding.
            width: tokens of a row of the signals.
            is_left: the signals' padding is on the left. That of the tokens never is: attention
                that takes no mask would see it.
            finals: for each row, tokens that may follow it.

        Returns:
            What was asked for of each row, and the signals.

        Raises:
            UARError: a rank has run out of memory, has failed, or has left. What fails where there
                is one rank is raised as it is.
        """
        request = (what, rows, finals or [()] * len(rows))
        # Until all have answered, the others wait for this batch's end: close() may not speak.
        self._is_open = False
        self._tell(request)
        own = self._attempt(*request)
        try:
            parts = self._collect(own)
        except RuntimeError as error:
            raise UARError(
                f"ranks: one has left in the middle of a batch ({first_line(error)})\n"
                "  remedy:  its own message says why"
            ) from error
        self._is_open = True
        failures = [part["error"] for part in parts if "error" in part]
        if failures:
            raise UARError("\n".join(failures))
        lengths = [len(row) for row in rows]
        return (
            outputs_of(parts, len(rows), self.data_ranks),
            signals_of(parts, lengths, width, is_left, self.data_ranks),
        )

    def serve(self) -> None:
        """Take part in batches until rank 0 closes."""
        while (request := self._tell(None)) is not None:
            self._collect(self._attempt(*request))

    def close(self) -> None:
        """End :meth:`serve` on the other ranks; of no effect where a batch has been broken off."""
        if self._is_open:
            self._tell(None)
        self._is_open = False

    def _tell(self, request: Any) -> Any:
        if self.is_alone:
            return request
        box = [request]
        torch.distributed.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def _collect(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        if self.is_alone:
            return [part]
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        parts: list[Any] | None = [None] * size if rank == 0 else None
        torch.distributed.gather_object(part, parts, dst=0, group=self._control)
        return parts or []

    def _attempt(self, *request: Any) -> dict[str, Any]:
        """This rank's part, or what went wrong: rank 0 must hear of it, or all wait for ever."""
        try:
            return self._execute(*request)
        except Exception as error:
            if not self.is_alone:
                logger.exception("an evaluation's batch")  # rank 0 gets the first line alone
            elif not isinstance(error, torch.OutOfMemoryError):
                raise
            return {"error": describe_failure(error, torch.distributed.get_rank())}

    @torch.inference_mode()
    def _execute(
        self,
        what: What,
        rows: Sequence[np.ndarray],
        finals: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        """This rank's part: the rows of its data-parallel rank, in their order."""
        share = -(-len(rows) // self.data_ranks)
        mine = slice(self.data_rank, None, self.data_ranks)
        own = [
            (torch.from_numpy(row), after)
            for row, after in zip(rows[mine], finals[mine], strict=True)
        ]
        fill = [_NOTHING] * (share - len(own))
        longest = max(map(len, rows))
        outputs: list[np.ndarray] = []
        self.watch.clear()
        for batches in self._micro_batches([*own, *fill], longest):
            outputs += self._schedule(what, batches)
        return {
            "data_rank": self.data_rank,
            "tensor_rank": self.tensor_rank,
            "layers": self.watch.take(),
            "output": outputs[: len(own)] if self.is_last and self.tensor_rank == 0 else None,
        }

    def _micro_batches(self, rows: list[Row], longest: int) -> Iterator[list[MicroBatch]]:
        """Micro-batches that go down the pipeline together: of one shape."""
        if not self.is_per_token:
            for row, after in rows:
                tokens_BS = row[None] if len(row) else torch.zeros(1, 1, dtype=torch.int64)
                yield [MicroBatch(tokens_BS, [len(row)], [after])]
            return
        tensor = self.args.tensor_model_parallel_size
        width, size = -(-longest // tensor) * tensor, min(self.batch_size, len(rows))
        rows = rows + [_NOTHING] * (-len(rows) % size)
        batches = []
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            tokens_BS = torch.zeros(size, width, dtype=torch.int64)
            for b, (row, _) in enumerate(some):
                tokens_BS[b, : len(row)] = row
            lengths = [len(row) for row, _ in some]
            batches.append(MicroBatch(tokens_BS, lengths, [after for _, after in some]))
        yield batches

    def _schedule(self, what: What, batches: list[MicroBatch]) -> list[np.ndarray]:
        """Megatron's schedule over micro-batches of one shape; each row's output."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size, width = batches[0].tokens_BS.shape

        def step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> Any:
            batch = next(iterator)
            self.watch.begin(batch.valid)
            output = model(*self._inputs(batch))
            return output, partial(_reduce, what, batch, self.vocab_size)

        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=width,
            micro_batch_size=size,
            decoder_seq_length=width,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return [row for rows in found or [] for row in rows]

    def _inputs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, positions and the mask (True: not seen), as Megatron's data sets make them."""
        tokens_BS = batch.tokens_BS.cuda()
        size, width = tokens_BS.shape
        position_S = torch.arange(width, device=tokens_BS.device)
        position_BS = position_S.expand(size, width)
        if not self.args.create_attention_mask_in_dataloader:
            return tokens_BS, position_BS, None
        mask = position_S[None, :] > position_S[:, None]
        return tokens_BS, position_BS, mask[None, None]


def _control_group() -> torch.distributed.ProcessGroup:
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


def _reduce(
    what: What,
    batch: MicroBatch,
    vocab_size: int,
    logits_BSV: torch.Tensor,
    non_loss_data: bool = True,
) -> list[np.ndarray]:
    """What was asked for of each row, on the host, without its padding."""
    found = []
    for logits_SV, tokens_S, length, finals in zip(
        logits_BSV, batch.tokens_BS, batch.lengths, batch.finals, strict=True
    ):
        own_SV = logits_SV[:length].float()
        if what == "logits":
            output = own_SV
        elif what == "last" or not length:
            output = own_SV[-1:]
        else:
            after = torch.tensor(finals, dtype=torch.int64)
            output = _scores(own_SV, tokens_S[:length], after, vocab_size)
        found.append(output.cpu().numpy())
    return found


def _scores(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, finals: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """(log p, is_greedy) of the tokens from the second on, then of those that may come next.

    As in training, the softmax is over the padded vocabulary; greedy is the best of real tokens.
    """
    finals, next_S = finals.to(logits_SV.device), tokens_S[1:].to(logits_SV.device)
    best_S = logits_SV[:, :vocab_size].argmax(dim=-1)
    logprob_SV = F.log_softmax(logits_SV, dim=-1)
    logprob = torch.cat((logprob_SV[:-1].gather(1, next_S[:, None])[:, 0], logprob_SV[-1][finals]))
    is_greedy = torch.cat((best_S[:-1] == next_S, best_S[-1] == finals))
    return torch.stack((logprob, is_greedy.float()), dim=1)
