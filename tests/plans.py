"""Plans of the shipped configuration of 256 experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uar_megatron.experiment import load_experiment
from uar_megatron.planner import job_of
from uar_megatron.planning.hardware import hardware
from uar_megatron.planning.plan import Plan, plan

CONFIG = Path(__file__).parents[1] / "configs" / "plan_256a8.yaml"


def planned(gpus: int, *overrides: str, gpu: str = "h800", **options: Any) -> Plan:
    """Its plan on so many GPUs, with overrides; ``options`` are those of ``job_of``."""
    experiment = load_experiment(CONFIG, overrides)
    return plan(job_of(experiment, gpus, hardware(gpu), **{"mfu": 0.35} | options))
