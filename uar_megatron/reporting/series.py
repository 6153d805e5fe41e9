"""The numbers of a run as arrays: steps, layers, experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.schema import LayerMetrics

Array = NDArray[np.float64]
STATE_NAMES = ("I consensus", "II ambiguity", "III stubborn bias", "IV vacuum")


class Series:
    """Arrays of a run; NaN where the log has no number.

    Attributes:
        steps: logged optimizer steps.
        edges: where the logging intervals begin and end, one more than ``steps``.
        layers: numbers of the MoE layers, as Megatron counts.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.steps: list[int] = [s.step for s in run.steps]
        self.edges: list[int] = [run.begin, *self.steps]
        self.layers: list[int] = sorted({m.layer for s in run.steps for m in s.layers})
        place = {layer: i for i, layer in enumerate(self.layers)}
        self._cells: list[tuple[int, int, LayerMetrics]] = [
            (row, place[m.layer], m) for row, s in enumerate(run.steps) for m in s.layers
        ]

    def of_step(self, name: str) -> Array:
        """A field of ``Step``: one number per step."""
        return np.array([_number(getattr(s, name)) for s in self._run.steps], dtype=float)

    def of_layer(self, name: str) -> Array:
        """A field of ``LayerMetrics``: steps × layers."""
        table = np.full((len(self.steps), len(self.layers)), np.nan)
        for row, column, metrics in self._cells:
            table[row, column] = _number(getattr(metrics, name))
        return table

    def balancing_loss(self) -> Array:
        """Sum of the balancing losses that are on, without coefficients: steps × layers."""
        table = np.full((len(self.steps), len(self.layers)), np.nan)
        for row, column, metrics in self._cells:
            if metrics.balancing_loss:
                table[row, column] = sum(metrics.balancing_loss.values())
        return table

    def states(self) -> Array:
        """Shares of the four states: steps × layers × 4."""
        return self._vectors([m.states for _, _, m in self._cells], 4)

    def observed(self, name: str) -> Array:
        """A field of ``LayerObservation``: observations × layers."""
        found = [{m.layer: getattr(m, name) for m in o.layers} for o in self._run.observations]
        table = [[_number(values.get(layer)) for layer in self.layers] for values in found]
        return np.array(table, dtype=float).reshape(len(found), len(self.layers))

    @cached_property
    def loads(self) -> Array:
        """Fraction of slots per expert: steps × layers × experts."""
        loads = [m.load for _, _, m in self._cells]
        return self._vectors(loads, max(map(len, loads), default=0))

    def _vectors(self, vectors: Sequence[list[float]], width: int) -> Array:
        table = np.full((len(self.steps), len(self.layers), width), np.nan)
        for (row, column, _), vector in zip(self._cells, vectors, strict=True):
            table[row, column, : len(vector)] = vector
        return table


def mean(table: Array, axis: int) -> Array:
    """Mean of what is there; NaN, without a warning, where nothing is."""
    there = np.isfinite(table)
    count = there.sum(axis=axis)
    total = np.where(there, table, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
