"""How unevenly experts are loaded, and so the ranks that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uar_megatron.errors import ConfigError
from uar_megatron.reporting.runlog import read_run

SAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Imbalance:
    """Rows of the fullest rank over the mean, in one layer.

    Attributes:
        expected: mean over samples, or over the records of a run log.
        worst: their 99th percentile, or the largest record.
        source: what it comes from.
    """

    expected: float
    worst: float
    source: str


EVEN = Imbalance(1.0, 1.0, "every expert gets the same number of rows (assumed)")


def dirichlet(concentration: float, experts: int, ranks: int) -> Imbalance:
    """Imbalance of expert loads drawn from a symmetric Dirichlet distribution.

    The load of a rank is the sum of those of its experts / ranks experts, so the loads of the ranks
    are Dirichlet too, with the sum of their concentrations.

    Args:
        concentration: of each expert; small is uneven. The load of an expert then has a standard
            deviation of about 1/√concentration of its mean.
        experts: E.
        ranks: of expert parallelism.

    Raises:
        ConfigError: a concentration that is not positive and finite.
    """
    if not 0 < concentration < math.inf:
        raise ConfigError(
            "--dirichlet", f"{concentration:g} is not allowed", allowed="more than 0, finite"
        )
    alphas = np.full(ranks, concentration * experts / ranks)
    shares = np.random.default_rng(_SEED).dirichlet(alphas, SAMPLES)
    fullest = shares.max(axis=1) * ranks
    return Imbalance(
        float(fullest.mean()),
        float(np.quantile(fullest, 0.99)),
        f"expert loads ~ Dirichlet({concentration:g}), {SAMPLES} samples",
    )


def replay(path: Path, experts: int, ranks: int, layers: int) -> list[Imbalance]:
    """Imbalance of each MoE layer as a run log has it.

    Loads in a run log are means over a logging interval and all ranks: a single micro-batch is
    more uneven. A load that sums to nothing or to no number says nothing, and is left out.

    Args:
        path: ``run.jsonl`` of a run of as many experts, or its folder.
        experts: E.
        ranks: of expert parallelism, onto which the loads are folded.
        layers: MoE layers of the plan.

    Raises:
        UARError: no run log there.
        ConfigError: it is of another model, or has no load of some layer.
    """
    path = path / "run.jsonl" if path.is_dir() else path
    steps = read_run(path).steps
    records = [[layer.load for layer in step.layers] for step in steps if step.layers]
    if not records:
        raise ConfigError("--load", f"{path} has no step with routing metrics")
    found = [("MoE layers", len(loads), layers) for loads in records]
    found += [("experts", len(load_E), experts) for loads in records for load_E in loads]
    other = next((one for one in found if one[1] != one[2]), None)
    if other is not None:
        name, has, wanted = other
        raise ConfigError(
            "--load",
            f"{path} is of {has} {name}, the configuration has {wanted}",
            remedy="replay the log of a run of this model, or use --dirichlet",
        )
    return [_replayed([loads[layer] for loads in records], ranks, path) for layer in range(layers)]


def _replayed(loads: list[list[float]], ranks: int, path: Path) -> Imbalance:
    """Imbalance of one layer from its load in each record."""
    fullest = [fullest_rank(load_E, ranks) for load_E in loads if 0 < sum(load_E) < math.inf]
    if not fullest:
        raise ConfigError(
            "--load",
            f"{path} has a layer whose loads are all zero or not finite",
            remedy="replay the log of a healthy run, or use --dirichlet",
        )
    return Imbalance(float(np.mean(fullest)), max(fullest), f"{len(fullest)} records of {path}")


def fullest_rank(load_E: Sequence[float], ranks: int) -> float:
    """Load of the fullest rank over the mean; ranks hold consecutive experts."""
    per_rank = np.asarray(load_E, dtype=float).reshape(ranks, -1).sum(axis=1)
    return float(per_rank.max() * ranks / per_rank.sum())
