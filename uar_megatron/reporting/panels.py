"""The report's panels for wandb: which metrics of ``WandbSink`` stand together.

``panels_of`` is the definition, plain data; ``save_workspace`` makes a wandb workspace of it and
needs the ``workspaces`` extra and a login.
"""

from __future__ import annotations

from typing import Any

from uar_megatron.errors import UARError
from uar_megatron.reporting.page_data import METRICS, SIGNALS
from uar_megatron.reporting.sinks import STATES, scalars
from uar_megatron.reporting.view import View

_SECTIONS = {
    "Loss and speed": ("validation_loss", "k_eff", "flops_ratio", "tokens_per_second"),
    "Thermodynamics": ("energy_mean", "energy_std", "entropy_mean", "entropy_std"),
    "Routing states": STATES,
    "Balance": ("max_vio", "utilisation_entropy", "aux_loss", "seq_aux_loss", "global_aux_loss",
                "bias_mean", "bias_max_abs", "validation_max_vio"),
    "Control": ("zscore_mean", "omega_mean", "theta", "beta"),
    "Observed signals": tuple(SIGNALS),
}  # fmt: skip

_TITLES = {name: title for name, (title, *_) in (METRICS | SIGNALS).items()}


def panels_of(view: View) -> dict[str, list[dict[str, Any]]]:
    """Sections of line plots: ``{section: [{"title": …, "metrics": [wandb names]}]}``.

    Only metrics that the run has logged are in it.
    """
    names: set[str] = set()
    run = view.run
    for record in (*run.steps[-1:], *run.validations[-1:]):
        names |= set(scalars(record))
    for observation in run.observations:
        # Those of token classes are named like the layers' own.
        names |= {n for n in scalars(observation) if n.split("/")[1] in SIGNALS}
    sections = {}
    for section, metrics in _SECTIONS.items():
        plots = []
        for metric in metrics:
            prefix = f"uar/{metric}"
            found = [n for n in names if n == prefix or n.startswith(f"{prefix}/")]
            if found:
                title = _TITLES.get(metric, metric.replace("_", " "))
                plots.append({"title": title, "metrics": sorted(found, key=_by_layer)})
        if plots:
            sections[section] = plots
    return sections


def save_workspace(
    sections: dict[str, list[dict[str, Any]]], project: str, entity: str | None
) -> str:
    """Save a workspace with these panels; return its address.

    Raises:
        UARError: wandb-workspaces is not installed, or wandb does not take it.
    """
    try:
        from wandb_workspaces import reports, workspaces
    except ImportError as error:
        raise UARError(
            "a wandb workspace needs wandb-workspaces\n"
            "  remedy:  pip install 'uar-megatron[workspaces]'; or print the panels: no --project"
        ) from error
    made = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[reports.v2.LinePlot(title=p["title"], x="Step", y=p["metrics"]) for p in plots],
        )
        for name, plots in sections.items()
    ]
    try:
        workspace = workspaces.Workspace(
            entity=entity or "", project=project, name="uar-megatron", sections=made
        )
        workspace.save()
    # Whatever wandb raises: no login, no such project, no network.
    except Exception as error:
        raise UARError(
            f"wandb did not take the workspace: {error}\n  remedy:  wandb login; check --entity "
            "and --project"
        ) from error
    return str(workspace.url)


def _by_layer(name: str) -> tuple[str, int]:
    head, _, layer = name.rpartition("layer_")
    return (head, int(layer)) if layer.isdigit() else (name, 0)
