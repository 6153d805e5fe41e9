"""Loss, balance, biases and active experts (paper: Figures 7, 8, 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from uar_megatron.reporting.figures.overview import experts, loss
from uar_megatron.reporting.figures.style import by_layer, by_step, panels
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stability(figure: Figure, views: Sequence[View]) -> None:
    """Loss, balancing loss, mean of the expert bias."""
    axes = panels(figure, 1, 3)
    loss(axes[0], views)
    by_step(axes[1], views, "balancing_loss")
    by_step(axes[2], views, "bias_mean")


def uncertainty(figure: Figure, views: Sequence[View]) -> None:
    """Balancing loss over steps; energy and entropy by layer at the end."""
    axes = panels(figure, 1, 3)
    by_step(axes[0], views, "balancing_loss")
    by_layer(axes[1], views, "energy_mean", "Free energy by layer, last step", last=0.0)
    by_layer(axes[2], views, "entropy_mean", "Router entropy by layer, last step", last=0.0)


def expansion(figure: Figure, views: Sequence[View]) -> None:
    """Active experts over steps; load violation and balancing loss by layer."""
    axes = panels(figure, 1, 3)
    experts(axes[0], views)
    by_layer(axes[1], views, "max_vio", "Max/mean load − 1 by layer, last quarter")
    by_layer(axes[2], views, "balancing_loss", "Balancing loss by layer, last quarter")
