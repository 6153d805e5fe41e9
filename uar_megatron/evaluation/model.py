"""A run's model, loaded from its checkpoint, with the routing that it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.evaluation.checkpoint import evaluation_experiment, locate
from uar_megatron.evaluation.collect import Signals
from uar_megatron.evaluation.load import build
from uar_megatron.shape import ModelShape, shape_of

if TYPE_CHECKING:
    from uar_megatron.evaluation.ranks import Ranks
    from uar_megatron.evaluation.text import Text

logger = logging.getLogger(__name__)

Padding = Literal["right", "left"]


@dataclass(frozen=True)
class Forwarded:
    """The logits of a batch, and its signals.

    Attributes:
        logits: fp32 ``[sequences, tokens, padded vocabulary]`` on the host; those of padding are
            of no meaning.
        signals: of the routers.
    """

    logits: torch.Tensor
    signals: Signals


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of sequences, and their signals.

    Attributes:
        own: for each sequence (log p, is_greedy) of its tokens from the second on given those
            before, fp32 ``[tokens − 1, 2]``; is_greedy is 1 where no token has a higher
            probability.
        finals: the same of each token that may follow the sequence, ``[finals, 2]``.
        signals: of the routers.
    """

    own: list[np.ndarray]
    finals: list[np.ndarray]
    signals: Signals


class CheckpointModel:
    """A model for evaluation, over all ranks of the job. Rank 0 asks, the others :meth:`serve`.

    The routing is that of the checkpoint: its statistics are frozen, ``uar_step`` is that of the
    save, and a token's k follows from the configuration of the run (``free``, ``mean``, ``exact``,
    or another policy). For a policy that decides about each token by itself a sequence's results do
    not depend on what it is batched with. Where it does not (``uar.budget.mode: exact``,
    ``max_rows_factor``, ``seq_topk``, a policy from outside, experts with a capacity), sequences
    are run one by one, without padding: a micro-batch is one sequence, or its segments where
    ``uar.budget.segment`` is set; the tokens after the last whole segment are a shorter one. That
    is what these modes mean by definition; for training they count over the micro-batch.

    Attributes:
        experiment: the configuration, as evaluated.
        args: Megatron's arguments.
        located: the checkpoint.
        window: tokens that the model can see, ``seq_length``.
        shape: sizes of the model; None for an architecture whose FLOPs are not modelled.
        text: the tokenizer.
        is_per_token: whether sequences may be batched without changing results.

    Args:
        checkpoint: folder of a run, of its checkpoints, or of one of them.
        overrides: dotted overrides of the run's configuration.
        config: the run's resolved configuration, where it is not beside the checkpoint.
        batch_size: sequences of a micro-batch.

    Raises:
        UARError: checkpoint, configuration or layout cannot be used; the message says why.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        overrides: Sequence[str] = (),
        *,
        config: str | Path | None = None,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size", f"{batch_size}", allowed="1 or more")
        self.located = locate(checkpoint, config)
        self.experiment = evaluation_experiment(self.located, overrides)
        self.args, model = build(self.experiment, self.located)
        from uar_megatron.evaluation.ranks import Ranks
        from uar_megatron.evaluation.routing import prepare_policies
        from uar_megatron.evaluation.text import text_of

        self.window = int(self.args.seq_length)
        self.shape: ModelShape | None = None
        try:
            self.shape = shape_of(self.args)
        except ConfigError as error:
            logger.warning("no FLOPs: %s", error)
        self.text: Text = text_of(self.args)
        self.is_per_token = prepare_policies(model, self.args)
        self._ranks: Ranks = Ranks(
            model,
            self.args,
            temperature=self.experiment.uar.temperature,
            batch_size=batch_size,
            vocab_size=self.text.vocab_size,
            is_per_token=self.is_per_token,
        )

    @property
    def rank(self) -> int:
        """This process's rank."""
        return torch.distributed.get_rank()

    @property
    def rows_at_once(self) -> int:
        """Micro-batches that keep every data-parallel rank and every pipeline stage busy."""
        stages = int(self.args.pipeline_model_parallel_size)
        return self._ranks.data_ranks * (1 if stages == 1 else 2 * stages)

    def describe(self) -> dict[str, Any]:
        """What was evaluated: for results."""
        uar, args = self.experiment.uar, self.args
        return {
            "checkpoint": str(self.located.folder),
            "iteration": self.located.iteration,
            "run": self.experiment.run.name,
            "policy": uar.policy,
            "budget": uar.budget.model_dump(mode="json"),
            "topk": int(args.moe_router_topk) if args.num_experts else None,
            "window": self.window,
            "is_per_token": self.is_per_token,
            "layout": {
                "ranks": torch.distributed.get_world_size(),
                "tensor": int(args.tensor_model_parallel_size),
                "pipeline": int(args.pipeline_model_parallel_size),
                "expert": int(args.expert_model_parallel_size),
                "data": self._ranks.data_ranks,
            },
        }

    def forward(
        self, tokens_BS: torch.Tensor, lengths: Sequence[int], *, padding: Padding = "right"
    ) -> Forwarded:
        """Run sequences through the model. On rank 0 while the others serve.

        Args:
            tokens_BS: int64 ``[sequences, tokens]``, at most ``window`` tokens.
            lengths: tokens of each sequence that are not padding.
            padding: where a row's padding is; the model runs it on the right in any case.

        Raises:
            UARError: a sequence is empty, too long, or has a token that is not in the vocabulary.
        """
        is_left, width = padding == "left", tokens_BS.shape[-1]
        rows = _rows(tokens_BS, lengths, is_left)
        self._check(rows)
        outputs, signals = self._ranks.run("logits", rows, width=width, is_left=is_left)
        logits = np.zeros((*tokens_BS.shape, self.args.padded_vocab_size), dtype=np.float32)
        for row, output in zip(logits, outputs, strict=True):
            first = width - len(output) if is_left else 0
            row[first : first + len(output)] = output
        return Forwarded(torch.from_numpy(logits), signals)

    def last_logits(self, tokens_BS: torch.Tensor, lengths: Sequence[int]) -> Forwarded:
        """As :meth:`forward`, but of each sequence's last token alone: ``[sequences, vocabulary]``.

        Entries of the vocabulary that only pad it to a round number are −inf.
        """
        rows = _rows(tokens_BS, lengths, is_left=False)
        self._check(rows)
        outputs, signals = self._ranks.run("last", rows, width=tokens_BS.shape[1])
        logits = np.concatenate(outputs)
        logits[:, self.text.vocab_size :] = -np.inf
        return Forwarded(torch.from_numpy(logits), signals)

    def score(self, rows: Sequence[Sequence[int]], finals: Sequence[Sequence[int]]) -> Scored:
        """Return log-probabilities of sequences' own tokens, and of those that may follow them.

        Args:
            rows: token ids, 1 … ``window`` of them.
            finals: for each row, tokens that may come next.

        Raises:
            UARError: as :meth:`forward`.
        """
        own = [np.asarray(row, dtype=np.int64) for row in rows]
        self._check(own)
        unique = [np.unique(np.asarray(after, dtype=np.int64)) for after in finals]
        self._check_ids([after for after in unique if len(after)])
        outputs, signals = self._ranks.run(
            "scores",
            own,
            width=max(map(len, own)),
            finals=[after.tolist() for after in unique],
        )
        cut = [len(row) - 1 for row in own]
        return Scored(
            [output[:n] for output, n in zip(outputs, cut, strict=True)],
            [
                output[n:][np.searchsorted(once, after)]
                for output, n, once, after in zip(outputs, cut, unique, finals, strict=True)
            ],
            signals,
        )

    def serve(self) -> None:
        """Take part in what rank 0 asks for, until it closes. On the other ranks."""
        self._ranks.serve()

    def close(self) -> None:
        """Let the other ranks go. On rank 0; a second call does nothing."""
        self._ranks.close()

    def __enter__(self) -> CheckpointModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.rank == 0:
            self.close()

    def _check(self, rows: Sequence[np.ndarray]) -> None:
        lengths = [len(row) for row in rows]
        if not rows or min(lengths) < 1 or max(lengths) > self.window:
            raise UARError(
                f"tokens: {len(rows)} sequences of {min(lengths, default=0)} … "
                f"{max(lengths, default=0)} tokens\n"
                f"  allowed: one or more, of 1 … {self.window} tokens (seq_length)"
            )
        self._check_ids(rows)

    def _check_ids(self, rows: Sequence[np.ndarray]) -> None:
        low = min((int(row.min()) for row in rows), default=0)
        high = max((int(row.max()) for row in rows), default=0)
        if low < 0 or high >= self.args.padded_vocab_size:
            raise UARError(
                f"tokens: ids {low} … {high}\n  allowed: 0 … {self.args.padded_vocab_size - 1}"
            )


def _rows(tokens_BS: torch.Tensor, lengths: Sequence[int], is_left: bool) -> list[np.ndarray]:
    """Sequences without their padding."""
    if tokens_BS.dim() != 2 or len(lengths) != tokens_BS.shape[0]:
        raise UARError(
            f"tokens: shape {tuple(tokens_BS.shape)} with {len(lengths)} lengths\n"
            "  allowed: [sequences, tokens], and one length for each sequence"
        )
    width = tokens_BS.shape[1]
    return [
        (row[width - length :] if is_left else row[:length]).cpu().numpy()
        for row, length in zip(tokens_BS, lengths, strict=True)
    ]
