"""The lm-eval model ``uar_megatron``.

lm-eval 0.4 has no entry points for models: a class is known once its module is imported. ``uar
lm-eval …`` imports this one and hands over to lm-eval's own command. ``lm_eval`` itself imports it
when the first of its ``--tasks`` is the file of a task that names it: ``uar tasks`` writes such.
"""

from __future__ import annotations

import atexit
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.evaluation.generation import continue_greedily
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.usage import Usage

logger = logging.getLogger(__name__)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("uar_megatron")
class UARMegatronLM(TemplateLM):
    """A run's checkpoint for lm-eval, with the routing it was trained with.

    All ranks of a torchrun job build one; rank 0 alone goes on with the evaluation, the others
    serve it and leave with exit code 0.

    Attributes:
        usage: what the routers did, by task. Requests that lm-eval answers from its cache are not
            in it.
        answered: requests that were not in its cache, by task.

    Args:
        checkpoint: folder of a run, of its checkpoints, or of one of them.
        config: the run's resolved configuration, where it is not beside the checkpoint.
        batch_size: sequences of a micro-batch on each data-parallel rank; ``auto`` for 8.
        max_batch_size: lm-eval's; of no effect.
        device: lm-eval's; of no effect: ``launch.device`` of the configuration says.
        max_gen_toks: tokens that are generated where a task does not say.
        overrides: every other key: dotted overrides of the run's configuration.
        model: one that is loaded already.

    Raises:
        UARError: as :class:`~uar_megatron.evaluation.model.CheckpointModel`.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str = "",
        config: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        model: CheckpointModel | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        if model is None:
            if not checkpoint:
                raise ConfigError(
                    "checkpoint", "none is named", remedy="--model_args checkpoint=FOLDER"
                )
            words = [f"{key}={_word(value)}" for key, value in overrides.items()]
            model = CheckpointModel(
                str(checkpoint), words, config=config, batch_size=self.batch_size
            )
            if model.rank == 0:
                atexit.register(model.close)  # lm-eval does not say when it is done
        self.model, self.max_gen_toks = model, max_gen_toks
        self._device = model.experiment.launch.device
        self.usage: dict[str, Usage] = defaultdict(Usage)
        self.answered: Counter[str] = Counter()
        self._owners: list[str] = []
        self._has_cut = False
        if model.rank != 0:
            model.serve()
            raise SystemExit(0)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.model.text.eod

    @property
    def prefix_token_id(self) -> int:
        """The context of what has none, as lm-eval's own models choose it."""
        return self.model.text.prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model sees."""
        return self.model.window

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.model.text.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, with what the tokenizer adds by itself unless told otherwise.

        Untold, nothing is added to a text that has the BOS already.
        """
        if add_special_tokens is None:
            bos = self.model.text.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, bos or None)
        return self.model.text.encode(string, special_tokens=add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.model.text.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As lm-eval's; see :class:`lm_eval.api.model.LM`.

        The left end of what is longer than ``max_length + 1`` tokens is cut off.
        """
        self._count(requests)
        self._owners = [str(request.task_name) for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """As lm-eval's: each token once, with as much context as there is in windows that join.

        A BOS that the tokenizer adds is one of these tokens, with the prefix before it: lm-eval's
        own models count it too.
        """
        self._count(requests)
        windows: list[TokenRequest] = []
        owners, of = [], []
        for i, request in enumerate(requests):
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(str(request.task_name))
                of.append(i)
        self._owners = owners
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logprob, _) in zip(of, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; those that differ in their last token alone share one run."""
        owners = self._owners or [""] * len(requests)
        whole = [
            (self._fit(context, continuation), len(continuation), i)
            for i, (_, context, continuation) in enumerate(requests)
        ]
        groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
        for tokens, length, i in whole:
            groups[tuple(tokens[:-1])].append((tokens[-1], length, i))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = Collator(list(groups), sort_fn=lambda row: (-len(row), row))
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods")
        for rows in order.get_batched(n=self._rows_of_a_batch()):
            finals = [[last for last, _, _ in groups[row]] for row in rows]
            scored = self.model.score(rows, finals)
            for b, row in enumerate(rows):
                for j, (_, length, i) in enumerate(groups[row]):
                    own = scored.own[b][len(row) - length :] if length > 1 else scored.own[b][:0]
                    last = scored.finals[b][j]
                    logprob = float(own[:, 0].sum(dtype="float64") + last[0])
                    found[i] = (logprob, bool(own[:, 1].all() and last[1]))
                    self.usage[owners[i]].add(scored.signals, b, len(row))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                    progress.update()
        progress.close()
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> list[int]:
        """The last tokens that the model can see and the one after them.

        A context of white space has no tokens of its own: lm-eval moves them to the continuation.
        """
        most = self.max_length
        if not continuation:
            raise DataError("a task asks for the likelihood of an empty continuation")
        if len(continuation) > most:
            raise DataError(
                f"a task asks for the likelihood of {len(continuation)} tokens at once\n"
                f"  allowed: {most}, the tokens that this model sees (seq_length)"
            )
        return ((context or [self.prefix_token_id]) + continuation)[-(most + 1) :]

    def _rows_of_a_batch(self) -> int:
        """So many that every data-parallel rank and every pipeline stage has something to do."""
        return self.batch_size * self.model.rows_at_once

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily; without a cache of keys and values, so each token costs a forward.

        Raises:
            ConfigError: a task asks for sampling, or for so many tokens after a prompt that fills
                the window.
        """
        self._count(requests)
        order = Collator(
            [(*request.args, str(request.task_name)) for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        found = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="generations")
        for chunk in order.get_batched(n=self._rows_of_a_batch()):
            contexts, owners = [c for c, _, _ in chunk], [owner for _, _, owner in chunk]
            for text, context, gen_kwargs in zip(
                self._generate(contexts, chunk[0][1], owners),
                contexts,
                [kwargs for _, kwargs, _ in chunk],
                strict=True,
            ):
                found.append(text)
                self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
                progress.update()
        progress.close()
        originals: list[str] = order.get_original(found)
        return originals

    def _generate(
        self, contexts: list[str], gen_kwargs: dict[str, Any], owners: list[str]
    ) -> Iterator[str]:
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        if kwargs.get("do_sample") and kwargs.get("temperature", 0.0) > 0:
            raise ConfigError(
                "do_sample", "true: this model generates greedily", allowed="do_sample: false"
            )
        eod = self.model.text.decode([self.eot_token_id])
        stops = handle_stop_sequences(kwargs.get("until"), eos=eod or None)
        most = int(kwargs["max_gen_toks"])
        prompts = [self._prompt(context, most) for context in contexts]
        rooms = [min(most, self.max_length - len(prompt)) for prompt in prompts]
        for ids in continue_greedily(
            self.model, prompts, rooms, stops, [self.usage[owner] for owner in owners]
        ):
            yield self._answer(ids, stops)

    def _answer(self, ids: list[int], stops: list[str]) -> str:
        """The text before the first stop, without special tokens, which may be stops themselves."""
        decode, end = self.model.text.decode, len(ids)
        kept = postprocess_generated_text(decode(ids), stops, None)
        while end and decode(ids[: end - 1]).startswith(kept):
            end -= 1
        begun = decode(ids[:end])[len(kept) :]  # a stop may begin within a token
        return self.tok_decode(ids[:end]).removesuffix(begun)

    def _prompt(self, context: str, most: int) -> list[int]:
        """The ids of a context, with room in the window for what is generated.

        As lm-eval's own models do, the left end of what is too long is cut off. Where ``most``
        alone fills the window, which they refuse, the context stays whole.
        """
        ids = self.tok_encode(context) or [self.prefix_token_id]
        left = self.max_length - most
        if left >= len(ids):
            return ids
        if left > 0:
            if not self._has_cut:
                logger.warning(
                    "prompts of more than %d tokens are cut on the left: the model sees %d, and "
                    "%d are to be generated",
                    *(left, self.max_length, most),
                )
            self._has_cut = True
            return ids[-left:]
        if len(ids) >= self.max_length:
            raise ConfigError(
                "max_gen_toks",
                f"{most} tokens after a prompt of {len(ids)}, and the model sees {self.max_length}",
                allowed=f"1 … {self.max_length - 1}: the prompt is then cut on the left",
            )
        return ids

    def _count(self, requests: Sequence[Instance]) -> None:
        self.answered.update(str(request.task_name) for request in requests)

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results: the checkpoint, and what the routers did in each task."""
        return self.model.describe() | {"uar": self.describe_usage()}

    def describe_usage(self) -> dict[str, dict[str, Any]]:
        """k_eff, FLOPs per token, energy and entropy of each task."""
        return {task: usage.describe(self.model.shape) for task, usage in self.usage.items()}

    def describe_usage_of(self, tasks: Sequence[str]) -> dict[str, Any]:
        """The same of several tasks together."""
        total = Usage()
        for task in tasks:
            if task in self.usage:
                total.add_usage(self.usage[task])
        return total.describe(self.model.shape)


def _batch_size(batch_size: int | str) -> int:
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return 8
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("batch_size", f"{batch_size!r}", allowed="1 or more, auto for 8")
    return int(text)


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
