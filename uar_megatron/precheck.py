"""Checks experiments before any of them starts, as ``uar train`` would."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import Experiment, builtin_config_dir, load_experiment


def check_experiments(experiments: Mapping[str, Experiment], *, is_elsewhere: bool = False) -> None:
    """Refuse experiments that cannot be trained.

    A process of its own does it: Megatron changes the environment, and stays in memory.

    Args:
        experiments: by the name that a refusal begins with.
        is_elsewhere: they will be trained on other machines; this one needs no GPU. What only a
            GPU can tell is then told by the ranks when they start.

    Raises:
        ConfigError: the first that is refused, and why.
    """
    if not experiments:
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        refused = pool.submit(_first_refused, dict(experiments), is_elsewhere).result()
    if refused is not None:
        name, why = refused
        raise ConfigError(name, why)


def _first_refused(
    experiments: dict[str, Experiment], is_elsewhere: bool
) -> tuple[str, str] | None:
    """Errors do not travel between processes; their text does."""
    warnings.simplefilter("ignore")
    import torch

    from uar_megatron.mcore import cpu
    from uar_megatron.pretrain import validate

    has_no_gpu = is_elsewhere and not torch.cuda.is_available()
    if has_no_gpu:
        cpu.enable()
    for name, experiment in experiments.items():
        try:
            if has_no_gpu:
                experiment = _on_cpu(experiment)
            with contextlib.redirect_stdout(io.StringIO()):
                validate(experiment, experiment.launch.nproc_per_node * experiment.launch.nnodes)
        except UARError as error:
            return name, str(error)
    return None


def _on_cpu(experiment: Experiment) -> Experiment:
    """The same without the fused kernels and the libraries that need a GPU."""
    from uar_megatron.mcore.arguments import destination

    plain = load_experiment(builtin_config_dir() / "parallel" / "cpu.yaml").megatron
    replaced = {destination(key) for key in plain}
    kept = {k: v for k, v in experiment.megatron.items() if destination(k) not in replaced}
    launch = experiment.launch.model_copy(update={"device": "cpu"})
    return dataclasses.replace(experiment, launch=launch, megatron=kept | plain)
