"""Text from a checkpoint, token by token, with what its routers did with each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from uar_megatron.errors import ConfigError
from uar_megatron.evaluation.model import CheckpointModel, Forwarded


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: tokens of the answer at most.
        temperature: of the softmax; 0 takes the most probable token.
        top_p: the most probable tokens that together have this probability take part.
        seed: of the draws.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled.

        Raises:
            ConfigError: naming the field.
        """
        if self.max_tokens < 1:
            raise ConfigError("max_tokens", f"{self.max_tokens}", allowed="1 or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", f"{self.temperature}", allowed="0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError("top_p", f"{self.top_p}", allowed="above 0 … 1")
        if not -(2**63) <= self.seed < 2**64:  # what torch takes
            raise ConfigError("seed", f"{self.seed}", allowed="-2**63 … 2**64-1")


@dataclass(frozen=True)
class Token:
    """A token of the prompt or of the answer.

    Attributes:
        text: what it adds to the text; empty while a character is not complete.
        id: its id.
        is_prompt: whether it was given.
        k: experts that it got, mean over the MoE layers.
        energy: free energy F of the routers about it, mean over the MoE layers; high is uncertain.
    """

    text: str
    id: int
    is_prompt: bool
    k: float
    energy: float


def generate(model: CheckpointModel, prompt: str, sampling: Sampling) -> Iterator[Token]:
    """Yield the tokens of the prompt, then those of the answer as they come.

    Every token is a forward of the whole text: there is no cache of keys and values. The answer
    ends at the end-of-document token, which is not part of it, after ``max_tokens``, or where the
    model's window is full. A prompt without text begins a document.

    Args:
        model: the checkpoint, on one rank.
        prompt: text.
        sampling: how tokens are chosen.

    Raises:
        ConfigError: the prompt leaves no room in the model's window, or the run has no tokenizer.
    """
    ids = model.text.encode(prompt) or [model.text.eod]
    if len(ids) >= model.window:
        raise ConfigError(
            "prompt",
            f"{len(ids)} tokens, and the model sees {model.window}",
            allowed=f"1 … {model.window - 1} tokens",
        )
    draw = torch.Generator().manual_seed(sampling.seed)
    prompt_length, text = len(ids), _Decoder(model)
    found = _forward(model, ids)
    for position, token in enumerate(ids):
        yield _token(text.piece(token), token, found, position, is_prompt=True)
    while len(ids) < min(prompt_length + sampling.max_tokens, model.window):
        following = choose(found.logits[0], sampling, draw)
        if following == model.text.eod:
            break
        ids.append(following)
        found = _forward(model, ids)  # what its routers do is known only now
        yield _token(text.piece(following), following, found, len(ids) - 1, is_prompt=False)
    if rest := text.rest():
        yield Token(rest, ids[-1], len(ids) == prompt_length, float("nan"), float("nan"))


def choose(logits_V: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """Return the next token.

    Args:
        logits_V: of the vocabulary, fp32; −inf for what is no token.
        sampling: how.
        draw: where chance comes from.
    """
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    # Below the maximum, which a tiny temperature would make infinite.
    below_V = logits_V.double() - logits_V.max()
    probs_V = torch.softmax(below_V / sampling.temperature, dim=-1)
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    # The first token that reaches top_p still takes part.
    outside_V = sorted_V.cumsum(dim=-1) - sorted_V >= sampling.top_p
    outside_V[0] = False
    chosen = torch.multinomial(sorted_V.masked_fill(outside_V, 0.0), 1, generator=draw)
    return int(order_V[chosen])


def _forward(model: CheckpointModel, ids: list[int]) -> Forwarded:
    return model.last_logits(torch.tensor([ids]), [len(ids)])


def _token(text: str, token: int, found: Forwarded, position: int, *, is_prompt: bool) -> Token:
    k_L = found.signals.k_LBS[:, 0, position]
    energy_L = found.signals.energy_LBS[:, 0, position]
    return Token(text, token, is_prompt, float(np.mean(k_L)), float(np.mean(energy_L)))


class _Decoder:
    """Text of ids that come one by one; a character may be several of them."""

    def __init__(self, model: CheckpointModel) -> None:
        self.text = model.text
        self._ids: list[int] = []
        self._done = ""

    def piece(self, token: int) -> str:
        """What the text grows by; nothing while it ends within a character."""
        self._ids.append(token)
        decoded = self.text.decode(self._ids)
        if decoded.endswith("�"):
            return ""
        return self._advance(decoded)

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._advance(self.text.decode(self._ids))

    def _advance(self, decoded: str) -> str:
        piece, self._done = decoded[len(self._done) :], decoded
        return piece
