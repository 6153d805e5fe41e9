"""Generated text in the terminal: colour says how many experts a token got, weight its energy."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from uar_megatron.evaluation.generate import Token

_COLOURS = ("#3b82f6", "#14b8a6", "#84a916", "#e58e1b", "#e5484d")
"""From few experts to many."""
_WEIGHTS = (Style(dim=True), Style(), Style(bold=True, underline=True))
"""From low energy (certain) to high."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as their pictures: a model may not steer the terminal."""


class Painter:
    """Styles of tokens.

    Args:
        fewest: least k of a token.
        most: largest k.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self.fewest, self.most = fewest, most
        self._energies: list[float] = []

    def style(self, token: Token) -> Style:
        """The style of a token; its energy is compared with those seen so far."""
        if math.isnan(token.k):
            return Style()
        place = (token.k - self.fewest) / max(self.most - self.fewest, 1)
        step = round(min(max(place, 0.0), 1.0) * (len(_COLOURS) - 1))
        return Style(color=_COLOURS[step]) + _WEIGHTS[self._third(token.energy)]

    def see(self, tokens: Iterable[Token]) -> None:
        """Take tokens' energies into the comparison."""
        self._energies.extend(token.energy for token in tokens if not math.isnan(token.energy))
        self._energies.sort()

    def _third(self, energy: float) -> int:
        """Whether it is in the lowest, middle or highest third of what was seen."""
        if len(self._energies) < len(_WEIGHTS):
            return 1
        below = sum(seen < energy for seen in self._energies)
        return min(len(_WEIGHTS) * below // len(self._energies), len(_WEIGHTS) - 1)

    def legend(self) -> Text:
        """What colours and weights mean."""
        text = Text("experts per token ")
        for step, colour in enumerate(_COLOURS):
            k = self.fewest + (self.most - self.fewest) * step / (len(_COLOURS) - 1)
            text.append(f"■ {k:g} ", Style(color=colour))
        text.append("  energy ")
        for name, style in zip(("low", "middle", "high"), _WEIGHTS, strict=True):
            text.append(name, style)
            text.append(" ")
        return text


def stream(tokens: Iterable[Token], painter: Painter, console: Console) -> list[Token]:
    """Print tokens as they come, coloured where the console has colours; return them."""
    has_colour = console.color_system is not None and not console.no_color

    def show(some: list[Token]) -> None:
        painter.see(some)  # the prompt's tokens come together, and are compared with each other
        for token in some:
            if has_colour:
                text = token.text.translate(_VISIBLE)
                console.print(Text(text, painter.style(token)), end="", soft_wrap=True)
            else:
                console.file.write(token.text)
        console.file.flush()

    if has_colour:
        console.print(painter.legend())
    seen: list[Token] = []
    prompt: list[Token] = []
    for token in tokens:
        seen.append(token)
        if token.is_prompt:
            prompt.append(token)
        else:
            show([*prompt, token])
            prompt.clear()
    show(prompt)
    console.file.write("\n")
    return seen


def summary(tokens: list[Token]) -> Table:
    """Tokens, experts and energy of the prompt and of the answer."""
    table = Table("", *("tokens", "mean k", "lowest k", "highest k", "mean energy"))
    for name, is_prompt in (("prompt", True), ("answer", False)):
        part = [t for t in tokens if t.is_prompt == is_prompt and not math.isnan(t.k)]
        if not part:
            table.add_row(name, "0", "–", "–", "–", "–")
            continue
        ks = [token.k for token in part]
        energy = sum(token.energy for token in part) / len(part)
        row = (sum(ks) / len(ks), min(ks), max(ks), energy)
        table.add_row(name, str(len(part)), *(f"{value:.2f}" for value in row))
    return table
