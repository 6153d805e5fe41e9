"""Least-squares fits that are flat, piecewise polynomial, flat: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from uar_megatron.reporting.series import Array

_MOST = 4
"""Pieces between the flat parts."""
_SHORTEST = 3
"""Points of a piece."""
_JOINED = 6
"""Fits of straight pieces that are also tried joined: the best ones."""
_NOISE = 3.0
"""Standard deviations of what a fit leaves that may be noise."""
_MIN_FLAT = 0.03
"""Part of the series that a flat part must have."""


class Grams:
    """What fits of all intervals [i, j) of a series of some length share."""

    def __init__(self, points: int) -> None:
        self.points = points
        self.x = np.linspace(-1, 1, points)
        powers = self.x[:, None] ** np.arange(5)
        sums = np.concatenate([np.zeros((1, 5)), powers.cumsum(axis=0)])
        moments = sums[None] - sums[:, None]
        self.inverse = {
            degree: np.linalg.pinv(
                moments[..., np.add.outer(np.arange(degree + 1), np.arange(degree + 1))],
                rcond=1e-13,
                hermitian=True,
            )
            for degree in (0, 1, 2)
        }
        ends = np.arange(points + 1)
        self.length = ends[None] - ends[:, None]

    def costs(self, values: Array, degree: int, shortest: int) -> Array:
        """Residual sums of squares of the intervals; infinite where they are too short."""
        rows = np.column_stack([values * self.x**k for k in range(degree + 1)] + [values**2])
        sums = np.concatenate([np.zeros((1, degree + 2)), rows.cumsum(axis=0)])
        difference = sums[None] - sums[:, None]
        right = difference[..., :-1]
        explained = np.einsum("ijk,ijkl,ijl->ij", right, self.inverse[degree], right)
        cost = np.maximum(difference[..., -1] - explained, 0.0)
        return np.where(self.length >= shortest, cost, np.inf)


@dataclass
class Fit:
    """One fit.

    Attributes:
        knots: where the parts meet.
        parameters: levels, coefficients, and two for each place that was searched for.
        has_first, has_last: whether there is a flat part at the beginning, at the end.
        rss: residual sum of squares.
        draw: makes the curve.
        profile: given 0, least ``rss`` with the first knot at each point; given −1, the last knot.
    """

    knots: list[float]
    parameters: int
    has_first: bool
    has_last: bool
    rss: float
    draw: Callable[[], Array]
    profile: Callable[[int], Array]

    @cached_property
    def curve(self) -> Array:
        """The fitted curve."""
        return self.draw()

    def corners(self) -> tuple[float, float]:
        """End of the first flat part and beginning of the last.

        A part beside them that stays within the noise of their level belongs to them.
        """
        noise = _NOISE * float(np.sqrt(self.rss / len(self.curve)))

        def flat(part: int, level: float) -> bool:
            """Whether the curve is at the level from one knot to the next."""
            inside = self.curve[round(self.knots[part]) : round(self.knots[part + 1])]
            return bool((np.abs(inside - level) <= noise).all())

        first, last = 0, len(self.knots) - 1
        while self.has_first and first < last and flat(first, self.curve[0]):
            first += 1
        while self.has_last and first < last and flat(last - 1, self.curve[-1]):
            last -= 1
        begin = self.knots[first] if self.has_first else 0.0
        end = self.knots[last] if self.has_last else float(len(self.curve))
        return begin, max(begin, end)

    def certainty(self, reach: float, count: float, floor: float) -> float:
        """Probability that every boundary is within ``reach`` points of its place."""
        probability = 1.0
        for there, place in ((self.has_first, 0), (self.has_last, -1)):
            if there:
                profile = self.profile(place)
                weights = ((profile.min() + floor) / (profile + floor)) ** (count / 2)
                near = np.abs(np.arange(len(profile)) - self.knots[place]) <= reach
                probability *= float(weights[near].sum() / weights.sum())
        return probability


def independent_points(rest: Array, parameters: int) -> float:
    """Number of points that noise of the same autocorrelation is worth.

    Args:
        rest: what a fit leaves.
        parameters: of the fit; each lowers the correlation of what is left.
    """
    spread = float((rest**2).sum())
    if spread == 0.0:
        return float(len(rest))
    correlation = float((rest[1:] * rest[:-1]).sum()) / spread
    correlation = min(max(correlation + parameters / len(rest), 0.0), 0.98)
    return len(rest) * (1 - correlation) / (1 + correlation)


def fits(values: Array, grams: Grams) -> list[Fit]:
    """The best fit of each degree, number of pieces, and choice of flat ends; kinks as well."""
    shortest = max(_SHORTEST, round(_MIN_FLAT * grams.points))
    flat = grams.costs(values, 0, shortest)
    found = []
    for degree in (2, 0, 1):
        piece = grams.costs(values, degree, _SHORTEST + degree - 1)
        piece[grams.length == 1] = 0.0  # where the series jumps inside a point
        straight = []
        for first, last in ((True, True), (True, False), (False, True), (False, False)):
            straight += _best(values, grams, flat, piece, degree, first, last)
        found += straight
    promising = [fit for fit in straight if fit.has_first or fit.has_last]
    weight = float(np.log(grams.points))
    promising.sort(key=lambda f: grams.points * np.log(f.rss + 1e-300) + f.parameters * weight)
    return found + [_joined(fit, values, shortest) for fit in promising[:_JOINED]]


def _best(
    values: Array, grams: Grams, flat: Array, piece: Array, degree: int, first: bool, last: bool
) -> list[Fit]:
    """The best fit for each number of pieces, which need not meet."""
    points = grams.points
    start, goal = np.full(points + 1, np.inf), np.full(points + 1, np.inf)
    start[0] = goal[points] = 0.0
    if first:
        start = flat[0]
    if last:
        goal = flat[:, points]
    # forward[m][j]: least cost of [0, j) with m pieces; backward[m][i]: of [i, points).
    forward, backward = [start], [goal]
    came: list[NDArray[np.int_]] = []
    by_end = np.ascontiguousarray(piece.T)
    for _ in range(_MOST):
        table = forward[-1][None] + by_end
        came.append(table.argmin(axis=1))
        forward.append(np.take_along_axis(table, came[-1][:, None], axis=1)[:, 0])
        backward.append((piece + backward[-1][None]).min(axis=1))
    found = []
    # Two flat parts may also meet in a jump.
    for pieces in range(0 if first and last and degree == 1 else 1, _MOST + 1):
        total = forward[pieces] + goal
        if not np.isfinite(total.min()):
            continue
        bounds = [int(total.argmin())]
        for m in range(pieces, 0, -1):
            bounds.append(int(came[m - 1][bounds[-1]]))
        coefficients = int(np.minimum(np.diff(bounds[::-1]), degree + 1).sum())
        bounds = ([0] if first else []) + bounds[::-1] + ([points] if last else [])
        draw = partial(_curve, values, grams.x, bounds, degree, first, last)
        knots = [float(b) for b in bounds[1:-1]]
        parameters = first + last + coefficients + 2 * len(knots)
        profiles = (start + backward[pieces], total)
        rss = float(total.min())
        found.append(Fit(knots, parameters, first, last, rss, draw, profiles.__getitem__))
    return found


def _curve(
    values: Array, x: Array, bounds: list[int], degree: int, first: bool, last: bool
) -> Array:
    curve = np.empty(len(values))
    parts = len(bounds) - 1
    for i in range(parts):
        part = slice(bounds[i], bounds[i + 1])
        flat = (i == 0 and first) or (i == parts - 1 and last)
        fitted = np.polyfit(x[part], values[part], 0 if flat or len(x[part]) == 1 else degree)
        curve[part] = np.polyval(fitted, x[part])
    return curve


def _joined(fit: Fit, values: Array, shortest: int) -> Fit:
    """The same parts, but each begins where the one before ends: kinks, moved until they fit.

    Args:
        fit: where they are at first.
        values: the series.
        shortest: points that a flat part keeps.
    """
    points = len(values)
    knots = np.array(fit.knots)
    rss, curve = _hats(knots, fit, values)
    one = np.eye(len(knots))
    # Neighbours also together, so that what is between them can move or close.
    moves = [*one, *(one[:-1] + one[1:]), *(one[:-1] - one[1:])]
    step = points / 40
    while step >= 0.02:
        better = False
        for move in (sign * direction for direction in moves for sign in (-step, step)):
            moved = knots + move
            if not _has_room(moved, fit, points, shortest):
                continue
            moved_rss, moved_curve = _hats(moved, fit, values)
            if moved_rss < rss * (1 - 1e-9):
                knots, rss, curve, better = moved, moved_rss, moved_curve, True
        if not better:
            step /= 2
    levels = len(knots) + (not fit.has_first) + (not fit.has_last)
    return replace(
        fit, knots=knots.tolist(), parameters=levels + 2 * len(knots), rss=rss,
        draw=lambda: curve, profile=partial(_joined_profile, knots, fit, values, shortest),
    )  # fmt: skip


def _has_room(knots: Array, fit: Fit, points: int, shortest: int) -> bool:
    """Whether flat parts are long enough and the pieces between them a point each."""
    first = shortest if fit.has_first else 1
    last = shortest if fit.has_last else 1
    between = np.diff(knots).min(initial=1.0)
    return bool(knots[0] >= first and knots[-1] <= points - last and between >= 1)


def _joined_profile(knots: Array, fit: Fit, values: Array, shortest: int, place: int) -> Array:
    """``rss`` with a knot elsewhere; the one beside it moves along, half as far, or stays."""
    points = len(values)
    profile = np.full(points + 1, np.inf)
    beside = 1 if place == 0 else -2
    for at in range(1, points):
        change = at - knots[place]
        if abs(change) > points / 5:
            continue
        for share in (0.0, 0.5, 1.0) if len(knots) > 2 else (0.0,):
            moved = knots.copy()
            moved[place] = at
            if share:
                moved[beside] += share * change
            if _has_room(moved, fit, points, shortest):
                profile[at] = min(profile[at], _hats(moved, fit, values)[0])
    return profile


def _hats(knots: Array, fit: Fit, values: Array) -> tuple[float, Array]:
    """Least squares of a continuous curve with these knots."""
    places = knots
    if not fit.has_first:
        places = np.concatenate([[0.0], places])
    if not fit.has_last:
        places = np.concatenate([places, [float(len(values))]])
    # Points are means over a width of one: a kink inside one is rounded as they are.
    x = np.arange(len(values) + 1)
    width = np.diff(places)[:, None]
    way = np.clip((x - places[:-1, None]) / width, 0.0, 1.0)
    rising = np.diff(width * way**2 / 2 + np.maximum(x - places[1:, None], 0.0))
    one = np.ones((1, len(values)))
    # A hat has risen from the knot before, and not yet fallen to the one after.
    design = (np.concatenate([one, rising]) - np.concatenate([rising, 0 * one])).T
    gram = design.T @ design + 1e-9 * np.eye(len(places))
    curve = design @ np.linalg.solve(gram, design.T @ values)
    return float(((values - curve) ** 2).sum()), curve
