"""Text from a checkpoint, and what is said of its tokens."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from export_cases import opened
from rich.console import Console
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import ConfigError
from uar_megatron.evaluation.generate import Sampling, Token, choose, generate
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.show import Painter, stream, summary

PROMPT = "The router é"


@pytest.fixture(scope="module")
def model(text_run: Path, model_parallel: None) -> Iterator[CheckpointModel]:
    with opened(text_run) as found:
        yield found


def test_greedy_tokens_and_their_k_are_those_of_one_forward(model: CheckpointModel) -> None:
    tokens = list(generate(model, PROMPT, Sampling(max_tokens=8, temperature=0.0)))
    ids = [token.id for token in tokens if token.k == token.k]
    prompt = model.text.encode(PROMPT)
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + 8
    found = model.forward(torch.tensor([ids]), [len(ids)])
    best = found.logits[0, :, : model.text.vocab_size].argmax(dim=-1).tolist()
    assert best[len(prompt) - 1 : -1] == ids[len(prompt) :]
    for position, token in enumerate(tokens[: len(ids)]):
        assert token.is_prompt == (position < len(prompt))
        assert token.k == found.signals.k_LBS[:, 0, position].mean()
        assert token.energy == pytest.approx(found.signals.energy_LBS[:, 0, position].mean())
    assert len({token.k for token in tokens}) > 2
    assert "".join(token.text for token in tokens) == model.text.decode(ids)


def test_the_seed_decides(model: CheckpointModel) -> None:
    def answer(seed: int) -> list[int]:
        return [t.id for t in generate(model, PROMPT, Sampling(max_tokens=6, seed=seed))]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_it_ends_with_the_document_and_with_the_window(
    model: CheckpointModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(generate(model, PROMPT, Sampling(max_tokens=1000, seed=3)))
    assert len([t for t in tokens if t.k == t.k]) <= model.window
    greedy = Sampling(max_tokens=3, temperature=0.0)
    monkeypatch.setattr(
        "uar_megatron.evaluation.generate.choose", lambda *arguments: model.text.eod
    )
    assert all(token.is_prompt for token in generate(model, PROMPT, greedy))
    assert [t.id for t in generate(model, "", greedy)] == [model.text.eod]
    with pytest.raises(ConfigError, match=f"the model sees {model.window}"):
        next(generate(model, "word " * 100, greedy))


def test_sampling() -> None:
    """Half, a quarter, two eighths: frequencies, and which tokens top-p leaves."""
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()

    def shares(sampling: Sampling) -> list[float]:
        draw = torch.Generator().manual_seed(0)
        chosen = torch.tensor([choose(logits, sampling, draw) for _ in range(2000)])
        return [float((chosen == i).float().mean()) for i in range(4)]

    def about(*values: float) -> object:
        return pytest.approx(values, abs=0.04)

    assert shares(Sampling()) == about(0.25, 0.5, 0.125, 0.125)
    assert shares(Sampling(top_p=0.5)) == [0.0, 1.0, 0.0, 0.0]
    assert shares(Sampling(top_p=0.6)) == about(1 / 3, 2 / 3, 0.0, 0.0)
    assert shares(Sampling(temperature=2.0)) == about(0.26, 0.37, 0.18, 0.18)  # square roots
    for temperature in (0.0, 1e-309, 5e-324):
        assert shares(Sampling(temperature=temperature)) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": -(2**63) - 1}),
    ],
)
def test_bad_settings(field: str, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**settings)  # type: ignore[arg-type]


TOKENS = [
    Token("one", 1, True, 1.0, -3.0),
    Token(" \x1b[2J", 2, True, 2.5, -2.0),
    Token(" three", 3, True, 4.0, -1.0),
    Token(" four", 4, False, 4.0, -0.5),
]


def test_colours_say_k_and_weights_energy() -> None:
    screen = Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False
    )
    painter = Painter(1, 4)
    assert stream(TOKENS, painter, screen) == TOKENS
    styles = [painter.style(token) for token in TOKENS]
    assert len({str(style.color) for style in styles[:3]}) == 3
    assert styles[2].color == styles[3].color
    assert (styles[0].dim, styles[0].bold) == (True, None)
    assert (styles[3].dim, styles[3].bold) == (None, True)
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    assert printed.startswith("experts per token")
    assert "\x1b[2J" not in printed  # a model may not clear the screen
    assert "␛[2J" in printed


def test_plain_text_is_the_text_alone() -> None:
    for console in (
        Console(file=io.StringIO()),
        Console(file=io.StringIO(), force_terminal=True, no_color=True),
    ):
        stream(TOKENS, Painter(1, 4), console)
        assert console.file.getvalue() == "one \x1b[2J three four\n"  # type: ignore[attr-defined]


def test_summary() -> None:
    screen = Console(file=io.StringIO(), width=100)
    screen.print(summary(TOKENS))
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "│ prompt │ 3      │ 2.50   │ 1.00     │ 4.00      │ -2.00" in printed
    assert "│ answer │ 1      │ 4.00   │ 4.00" in printed


@pytest.mark.usefixtures("model")
def test_command(text_run: Path) -> None:
    options = ["--prompt", PROMPT, "--max-tokens", "3", "--seed", "4"]
    result = CliRunner().invoke(app, ["generate", str(text_run), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(PROMPT)
    assert "answer │ 3" in result.stderr
    with pytest.raises(ConfigError, match="top_p"):
        CliRunner().invoke(app, ["generate", str(text_run), "--top-p", "2"], catch_exceptions=False)
