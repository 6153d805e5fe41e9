"""`uar watch`: a running job in the terminal."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from uar_megatron.reporting.runlog import RUN_LOG, Run
from uar_megatron.reporting.sample import evenly, index_log, read_lines
from uar_megatron.reporting.schema import (
    AnyRecord,
    LayerMetrics,
    Observation,
    Step,
    parse_record,
)

_SPARKS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = ("green", "cyan", "yellow", "magenta")
_HELD = 2000
"""Steps that are held at most, all but the last without their layers; older ones go."""
_LATE = 5.0
"""Logging intervals without a record after which a picture says so."""
_OTHER_LINES = 9
"""Of a picture, beside the layers."""


class Tail:
    """Follows a log: what was in it, then what is appended.

    Args:
        log: the run log, which need not be there yet.
    """

    def __init__(self, log: Path) -> None:
        self.run = Run()
        self._log = log
        self._offset = 0
        if log.is_file():
            size = log.stat().st_size
            index = index_log(log)
            self.run = index.run
            with log.open("rb") as file:
                for record in read_lines(file, evenly(index.steps), index):
                    self._add(record)
            self._offset = self._whole_lines(size)

    def poll(self) -> bool:
        """Take what was appended since; whether there was something."""
        size = self._log.stat().st_size if self._log.is_file() else 0
        if size < self._offset:
            # Another run took the place of this one.
            self.run, self._offset = Run(), 0
        if size == self._offset:
            return False
        before = self._offset
        with self._log.open("rb") as file:
            file.seek(before)
            for line in file:
                # The last line may still be written.
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with suppress(ValidationError):
                    self._add(parse_record(line))
        return self._offset > before

    def _add(self, record: AnyRecord) -> None:
        """Hold what a picture shows: layers have tens of kilobytes a step, observations more."""
        if isinstance(record, Observation):
            return
        if isinstance(record, Step) and self.run.steps:
            self.run.steps[-1].layers = []
        self.run.add(record)
        del self.run.steps[:-_HELD], self.run.validations[:-1]

    def _whole_lines(self, size: int) -> int:
        """Where the last line that had ended began to be followed by another."""
        with self._log.open("rb") as file:
            at = size
            while at > 0:
                start = max(0, at - (1 << 20))
                file.seek(start)
                found = file.read(at - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                at = start
        return 0


def watch_run(run: Path, interval: float, once: bool, console: Console | None = None) -> None:
    """Show a run until it ends or the user stops; ``once`` prints one picture of it."""
    log = run if run.suffix == ".jsonl" else run / RUN_LOG
    console = console or Console()
    tail = Tail(log)
    if once:
        console.print(picture(tail.run, log))
        return

    def now() -> Panel:
        age = time.time() - log.stat().st_mtime if log.is_file() else 0.0
        return picture(tail.run, log, age, max(console.height - _OTHER_LINES, 3))

    try:
        with Live(now(), console=console, auto_refresh=False) as live:
            while tail.run.end is None:
                time.sleep(interval)
                tail.poll()
                live.update(now(), refresh=True)
    except KeyboardInterrupt:
        return


def picture(run: Run, log: Path, age: float = 0.0, most: int | None = None) -> Panel:
    """One picture of a run.

    Args:
        run: the run.
        log: its log.
        age: seconds since the log was written to.
        most: layers that are shown, evenly spaced ones; all if None.
    """
    title = escape(run.starts[-1].run) if run.starts else escape(str(log.parent))
    if not run.steps:
        text = "waiting for the first logging interval" if run.starts else f"waiting for {log}"
        return Panel(Text(text), title=title)
    parts: list[Text | Table] = [_headline(run)]
    last_step = run.steps[-1]
    if run.end is None and age > max(60.0, _LATE * last_step.interval * last_step.seconds_per_step):
        text = f"no record for {_duration(age)}: training hangs, validates, saves, or was killed"
        parts.append(Text(text, style="bold yellow"))
    losses = [s.loss for s in run.steps if s.loss is not None]
    if losses:
        parts.append(Text(f"loss  {spark(losses)}"))
    known = [s.k_eff for s in run.steps if s.k_eff is not None]
    if known:
        parts.append(Text(f"k     {spark(known)}"))
    if run.validations:
        last = run.validations[-1]
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in last.losses.items())
        parts.append(Text(f"validation at step {last.step}:  {shown}"))
    if last_step.layers:
        parts.append(_layers(last_step.layers, most or len(last_step.layers)))
    return Panel(Group(*parts), title=title)


def spark(values: list[float], width: int = 60) -> str:
    """Values as bars, the latest on the right; averages where there are too many."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "not finite"
    size = -(-len(finite) // width)
    parts = [finite[i : i + size] for i in range(0, len(finite), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((v - low) * scale)] for v in means) + f"  {finite[-1]:.4g}"


def _headline(run: Run) -> Text:
    step = run.steps[-1]
    total = run.starts[-1].config.get("train_iters") if run.starts else None
    text = f"step {step.step}"
    if isinstance(total, int) and total > 0:
        left = max(total - step.step, 0) * step.seconds_per_step
        text += f" of {total} ({step.step / total:.0%}, {_duration(left)} of training left)"
    speed = step.tokens_per_second / 1000
    text += f"   {speed:.1f}k tok/s" if math.isfinite(speed) else "   – tok/s"
    if step.flops_ratio is not None:
        text += f"   FLOPs {step.flops_ratio:.3f} × top-k"
    if run.end is not None:
        text += f"   stopped: {run.end.reason}"
    return Text(text, style="bold")


def _layers(layers: list[LayerMetrics], most: int) -> Table:
    if len(layers) > most:
        layers = [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "F", "H", "k", "MaxVio", "|bias|"):
        table.add_column(name, justify="right")
    table.add_column("states I II III IV")
    for m in layers:
        bias = "–" if m.bias_max_abs is None else f"{m.bias_max_abs:.3f}"
        numbers = (m.energy_mean, m.entropy_mean, m.k_eff, m.max_vio)
        states = Text()
        for share, style in zip(m.states, _STATE_STYLES, strict=False):
            states.append("█" * round(24 * share) if math.isfinite(share) else "", style=style)
        table.add_row(str(m.layer), *(f"{v:.2f}" for v in numbers), bias, states)
    return table


def _duration(seconds: float) -> str:
    # Logs of older versions have no time of a step.
    if not math.isfinite(seconds):
        return "–"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
