"""Measuring a Megatron run that uses neither our entry nor our routers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uar_megatron.config import ObserveConfig, UARConfig, parse_section
from uar_megatron.errors import UARError
from uar_megatron.experiment import RunConfig, check_writable

_watching = False


def watch_training(
    folder: str | Path,
    *,
    name: str | None = None,
    observe: ObserveConfig | Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> None:
    """Write the run log of the training that this process is about to start.

    To be called once, on every rank, before Megatron's ``pretrain``; in ``pretrain_gpt.py`` that is
    one line. Routers stay Megatron's own objects and route as they did, bit for bit: their
    decisions are looked at. Ranks exchange one reduction per logging interval and one per
    observation; ``observe.probe_interval``, where set, runs a batch forward besides, with the
    collectives that the model and the comparison of its experts need. UAR routers (of ``--spec``)
    are read as in our own entry.

    Token classes are those of frequency; data sets are known to our own ``forward_step`` alone. ẑ
    is normalised with the interval before, so that it is 0 in the first one of each process.

    Args:
        folder: gets ``run.jsonl``, which ``uar report`` reads.
        name: in logs and figures; the folder's unless set.
        observe: as ``uar.observe`` of the configuration; nothing beyond the run log unless set.
        temperature: τ of energy and entropy.

    Raises:
        ConfigError: a bad value, a folder that cannot be written to; or, when the model is built, a
            training that cannot be watched.
        UARError: this training is watched already.
    """
    global _watching
    if _watching:
        raise UARError(
            "watch_training: this process is watched already\n"
            "  remedy:  call it once, and not with uar_megatron.pretrain, which writes a run log "
            "anyway"
        )
    if isinstance(observe, ObserveConfig):
        observe = observe.model_dump()
    section = {"observe": {} if observe is None else observe, "temperature": temperature}
    # Nothing of ours routes, so no kernels are looked for.
    uar = parse_section(UARConfig, section | {"kernel_backend": "torch"}, "uar")
    _watching = True
    run = RunConfig(name=name or Path(folder).name, dir=str(folder))
    check_writable("folder", run.dir)

    from uar_megatron.mcore.compatibility import check_compatible
    from uar_megatron.mcore.loop import on_built_model, on_end_of_training
    from uar_megatron.mcore.spec import section_of_routers
    from uar_megatron.run_recorder import RunRecorder

    def attach(model: list[Any], args: argparse.Namespace) -> None:
        section = section_of_routers(model)
        ours = uar if section is None else section.model_copy(update={"observe": uar.observe})
        check_compatible(ours, args)
        recorder = RunRecorder(run, ours, {"uar": ours.model_dump(), **_plain(args)}, args)
        recorder.attach(model)
        on_end_of_training(recorder.close)

    on_built_model(attach)


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    """Megatron's arguments as JSON knows them."""
    plain = (bool, int, float, str, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in sorted(vars(args).items())}
