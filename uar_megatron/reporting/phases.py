"""The three phases of the paper's section 4.2, found in the logged free energy.

Exploration: the mean energy rests at its first level. Symmetry breaking: it moves, often over an
energy peak. Stabilisation: it rests at its last level. ``find_phases`` averages a series into at
most ``_BINS`` points and fits a flat part, up to four straight (or all parabolic) pieces, and a
flat part. Dynamic programming finds the least squares over all boundaries exactly
(``segments.py``); the Bayesian information criterion chooses number and degree of the pieces,
whether there is a flat part at either end, and whether a constant, a power of the step or its
logarithm says as much; a constant also with each point weighed by the noise around it, as noise is
often larger early on. It counts fewer points where what is left is autocorrelated. Straight pieces
are also tried joined, with kinks for jumps.

The confidence is the probability, by the likelihoods of all other boundaries, that each reported
one is within 2 % of the run of where it should be, if the noise is the same all along: a boundary
beside much larger noise can be further off. "Not yet distinguishable" is an answer: too few
steps, no movement beyond the noise, a drift without a level. A phase that is not there (a run that
moves from its first record, or still moves at its last) is left out.

Why not a library: ruptures 1.1.10, the best kept one, refuses Python 3.14, and has no model that is
flat at the ends and free between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uar_megatron.reporting.segments import Fit, Grams, fits, independent_points
from uar_megatron.reporting.series import Array, Series, mean

MIN_POINTS = 24
_POWERS = np.arange(-10, 11) / 10
"""Of the step, for 0 its logarithm: drifts without a level."""
_BINS = 150
"""Points that are fitted: longer series are averaged, 0.7 % of the run each."""
_TOLERANCE = 0.02
_EVIDENCE = 20.0
"""By how much a fit must beat a constant and a drift in the criterion; false alarms are counted
in ``tests/reporting/test_phases.py``."""
_MOVING = 8.0
"""By how much an end that is not flat must fit better."""
_SHORTEST = 0.04
"""A movement that ends where it began and takes less of the run is an outlier."""
_SIGNAL = 3.0
"""The fitted curve must range over so many standard deviations of what is left."""


@dataclass(frozen=True)
class Phases:
    """Where the phases of one energy curve lie; steps are optimizer steps.

    Attributes:
        layer: the layer; None for the mean over layers.
        reason: why nothing can be said; empty where something can.
        first, last: first and last logged step.
        breaking: step at which symmetry breaking begins; None if it had begun before the log did.
        settled: step at which stabilisation begins; None if the energy still moves.
        peak_step, peak: the energy peak; None where the energy has none above both levels.
        initial, plateau: mean energy of exploration and stabilisation; None without the phase.
        confidence: 0 to 1.
    """

    layer: int | None
    reason: str = ""
    first: int = 0
    last: int = 0
    breaking: int | None = None
    settled: int | None = None
    peak_step: int | None = None
    peak: float | None = None
    initial: float | None = None
    plateau: float | None = None
    confidence: float = 0.0

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """Name, first and last step of each phase that is there."""
        if self.reason:
            return []
        start = self.first if self.breaking is None else self.breaking
        end = self.last if self.settled is None else self.settled
        spans = [("Exploration", self.first, start)] if self.breaking is not None else []
        spans.append(("Symmetry breaking", start, end))
        if self.settled is not None:
            spans.append(("Stabilisation", end, self.last))
        return spans


def phases_of(series: Series) -> tuple[Phases, list[Phases]]:
    """Phases of the mean over layers, and of each layer."""
    energy = series.of_layer("energy_mean")
    curves = np.column_stack([mean(energy, 1), energy])
    overall, *layers = find_phases(series.steps, curves, [None, *series.layers])
    return overall, layers


def find_phases(steps: Sequence[int], energy: Array, layers: Sequence[int | None]) -> list[Phases]:
    """Find the phases of several curves over the same steps.

    Args:
        steps: logged steps.
        energy: steps × curves; NaN where it is missing.
        layers: what each curve is of.
    """
    if len(steps) < MIN_POINTS:
        reason = f"only {len(steps)} logged steps; {MIN_POINTS} are needed"
        return [Phases(layer, reason) for layer in layers]
    at = np.asarray(steps, dtype=float)
    since = np.maximum(at, 1.0)
    records = np.arange(len(steps) + 1)
    edges = np.linspace(0, len(steps), min(_BINS, len(steps)) + 1)
    grams = Grams(len(edges) - 1)

    def averaged(curve: Array) -> Array:
        # All of the same width, so that they may begin inside a record.
        sums = np.concatenate([[0.0], curve.cumsum()])
        return np.diff(np.interp(edges, records, sums)) / np.diff(edges)

    drifts = np.array([averaged(np.log(since) if p == 0 else since**p) for p in _POWERS])
    found = []
    for layer, curve in zip(layers, energy.T, strict=True):
        there = np.isfinite(curve)
        if there.sum() < max(MIN_POINTS, 0.9 * len(steps)):
            missing = len(steps) - int(there.sum())
            reason = f"the energy is not finite at {missing} of {len(steps)} logged steps"
            found.append(Phases(layer, reason))
            continue
        filled = np.interp(at, at[there], curve[there])
        found.append(_judge(layer, averaged(filled), drifts, grams, at, edges))
    return found


def _judge(
    layer: int | None, values: Array, drifts: Array, grams: Grams, at: Array, edges: Array
) -> Phases:
    """Turn the best fit into phases, if it says more than a constant or one of ``drifts``."""
    points = len(values)
    centred = values - values.mean()
    total = float((centred**2).sum())
    if total <= 1e-12 * float((values**2).sum()):
        return Phases(layer, "the energy is constant")
    candidates = fits(centred, grams)
    floor = 1e-9 * total

    def criterion(rss: float, parameters: int) -> float:
        return count * float(np.log(rss + floor)) + parameters * float(np.log(max(count, 2.0)))

    def of_fit(fit: Fit) -> float:
        moving = (not fit.has_first) + (not fit.has_last)
        return criterion(fit.rss, fit.parameters) + _MOVING * moving

    # What the fit leaves tells how many points count, and that again which fit is best.
    count = float(points)
    for _ in range(2):
        fit = min(candidates, key=of_fit)
        count = independent_points(centred - fit.curve, fit.parameters)
    score = criterion(fit.rss, fit.parameters)
    noise = float(np.sqrt(fit.rss / points))
    explained = max(float(np.corrcoef(centred, drift)[0, 1]) ** 2 for drift in drifts)
    if criterion(total, 1) - score < _EVIDENCE or np.ptp(fit.curve) < _SIGNAL * noise:
        return Phases(layer, "the energy does not move by more than its noise")
    if not fit.has_first and not fit.has_last:
        return Phases(layer, "the energy moves over the whole run")
    if criterion(total * (1 - explained), 3) - score < _EVIDENCE:
        return Phases(layer, "the energy drifts in one direction, without a level before or after")
    # Noise is often larger early on, and parts of it then look like levels.
    weight = _local_noise(values) ** -2.0
    flat = centred - np.average(centred, weights=weight)
    weighed = float((weight * flat**2).sum())
    left = float((weight * (centred - fit.curve) ** 2).sum()) + 1e-9 * weighed
    more = (fit.parameters - 1) * float(np.log(max(count, 2.0)))
    if count * float(np.log(weighed / left)) - more < _EVIDENCE:
        return Phases(layer, "the energy does not move by more than its noise")
    begin, end = fit.corners()
    if end - begin < _SHORTEST * points and abs(fit.curve[-1] - fit.curve[0]) < _SIGNAL * noise:
        return Phases(layer, "the energy leaves its level for single records only")
    curve = fit.curve + values.mean()
    bin_starts = np.interp(edges, np.arange(len(at)), at)
    begin_step, end_step = np.interp([begin, end], np.arange(points + 1), bin_starts).tolist()
    levels = [float(curve[0])] * fit.has_first + [float(curve[-1])] * fit.has_last
    low, high = round(begin), min(round(end), points - 1)
    top = low + int(np.argmax(curve[low : high + 1]))
    rise = float(curve[top]) - max(levels)
    peaks = low < top < high and rise > max(2 * noise, 0.1 * float(np.ptp(curve)))
    return Phases(
        layer,
        first=int(at[0]),
        last=int(at[-1]),
        breaking=round(begin_step) if fit.has_first else None,
        settled=round(end_step) if fit.has_last else None,
        peak_step=int(at[int((edges[top] + edges[top + 1] - 1) / 2)]) if peaks else None,
        peak=float(curve[top]) if peaks else None,
        initial=float(curve[0]) if fit.has_first else None,
        plateau=float(curve[-1]) if fit.has_last else None,
        confidence=min(fit.certainty(_TOLERANCE * points, count, floor), 1.0),
    )


def _local_noise(values: Array) -> Array:
    """Standard deviation of the noise around each point, in units of the values.

    From the median second difference in a tenth of the series: no slope changes it, and few jumps.
    """
    wide = max(9, len(values) // 10)
    # Of independent points a second difference has the variance 1 + 4 + 1.
    change = np.abs(np.diff(values, 2, append=values[-2:][::-1])) / np.sqrt(6)
    padded = np.pad(change, wide // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, wide)[: len(values)]
    # A normal distribution's standard deviation is 1.4826 times the median distance.
    noise = 1.4826 * np.median(windows, axis=1)
    return np.maximum(noise, 0.05 * float(np.median(noise)) + 1e-12 * float(np.ptp(values)))
