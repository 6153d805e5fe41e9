"""``uar doctor``: can training start here, and which parts of the stack are missing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from uar_megatron.errors import UARError

Status = Literal["ok", "off", "error"]
_ENOUGH_BYTES = 1024**3  # below it not even a small model's checkpoint is safe


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``off``: a feature that is not available, training works without it;
            ``error``: training could not start.
        detail: what was found.
        remedy: what to do about it, where something can be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(
    config: Path | None = None, overrides: Sequence[str] = (), folder: Path = Path()
) -> list[Check]:
    """Run every check; never raises for what it finds.

    Args:
        config: an experiment to check as ``uar train --dry-run`` would.
        overrides: dotted overrides for it.
        folder: where runs would be written, if no experiment says.
    """
    checks = [Check("python", "ok", f"{platform.python_version()} ({sys.executable})")]
    checks += [*_packages(), _device(), _nccl()]
    checks += [_triton(), _transformer_engine(), _apex(), _wandb()]
    if config is None:
        checks += [_writable(folder), _space(folder)]
        return checks
    return checks + _experiment(config, overrides, folder)


def report(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the machine-readable form: ``{"ok": bool, "checks": [...]}``."""
    return {"ok": can_train(checks), "checks": [asdict(check) for check in checks]}


def can_train(checks: Sequence[Check]) -> bool:
    """Whether no check is an error."""
    return all(check.status != "error" for check in checks)


def _packages() -> list[Check]:
    """The packages this distribution requires, against the ranges it was tested with."""
    checks = []
    for line in metadata.requires("uar-megatron") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            checks.append(Check(requirement.name, "error", "not installed", install))
            continue
        is_supported = requirement.specifier.contains(installed, prereleases=True)
        detail = f"{installed}, supported: {requirement.specifier or 'any'}"
        status: Status = "ok" if is_supported else "error"
        checks.append(Check(requirement.name, status, detail, "" if is_supported else install))
    return checks


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} × {', '.join(sorted(names))}"
        return Check("CUDA", "ok", f"{found}, CUDA {torch.version.cuda}")
    why = "torch was built without CUDA" if torch.version.cuda is None else "no device found"
    return Check("CUDA", "off", why, "train on the CPU with parallel=cpu, or fix the driver")


def _nccl() -> Check:
    import torch

    if not torch.distributed.is_nccl_available():
        return Check("NCCL", "off", "not in this torch", "gloo is used on the CPU")
    if not torch.cuda.is_available():
        return Check("NCCL", "off", "needs a CUDA device", "gloo is used on the CPU")
    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _triton() -> Check:
    if importlib.util.find_spec("triton") is None:
        return Check("Triton", "off", "not installed", "pip install triton (Linux)")
    import torch

    version = metadata.version("triton")
    if not torch.cuda.is_available():
        return Check("Triton", "off", f"{version}, needs a GPU to run on")
    return Check("Triton", "ok", version)


def _transformer_engine() -> Check:
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except Exception as error:  # a library that does not fit raises OSError
        return Check(
            "Transformer Engine",
            "off",
            f"cannot be imported ({error})",
            "use transformer_impl: local, or an NVIDIA container",
        )
    return Check("Transformer Engine", "ok", metadata.version("transformer-engine"))


def _apex() -> Check:
    remedy = "Megatron falls back to torch's optimizers; NVIDIA's containers have apex"
    if importlib.util.find_spec("apex") is None:
        return Check("NVIDIA apex", "off", "not installed", remedy)
    try:
        is_nvidias = importlib.util.find_spec("apex.multi_tensor_apply") is not None
    except Exception:  # it imports `apex`, and the other project's needs a web framework
        is_nvidias = False
    if not is_nvidias:
        return Check(
            "NVIDIA apex",
            "error",
            "the installed `apex` is broken, or another project of that name (PyPI's web toolkit)",
            "pip uninstall apex; NVIDIA's is built from its source or comes with its containers",
        )
    return Check("NVIDIA apex", "ok", "installed")


def _wandb() -> Check:
    if importlib.util.find_spec("wandb") is None:
        return Check("wandb", "off", "not installed", "pip install wandb")
    mode = os.environ.get("WANDB_MODE", "online")
    has_key = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
    detail = f"{metadata.version('wandb')}, {mode}"
    if mode == "online" and not has_key:
        return Check("wandb", "off", f"{detail}, no API key", "wandb login, or WANDB_MODE=offline")
    return Check("wandb", "ok", detail)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _writable(folder: Path) -> Check:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check("output folder", "ok", f"{folder} can be written to")
    except OSError as error:
        return Check(
            "output folder",
            "error",
            f"{place} cannot be written to: {error.strerror}",
            "choose another run.dir, or make it writable",
        )


def _space(folder: Path) -> Check:
    free = shutil.disk_usage(_existing(folder)).free
    detail = f"{free / 1024**3:.1f} GiB free"
    if free < _ENOUGH_BYTES:
        return Check("disk", "error", detail, "checkpoints need room: free some, or move run.dir")
    return Check("disk", "ok", detail)


def _experiment(config: Path, overrides: Sequence[str], folder: Path) -> list[Check]:
    """The experiment as ``--dry-run`` checks it, and its output folder."""
    from uar_megatron.experiment import load_experiment
    from uar_megatron.pretrain import output_folders, validate

    name = f"experiment {config}"
    try:
        experiment = load_experiment(config, overrides)
        folders = {Path(f) for f in output_folders(experiment).values() if f is not None}
        outputs = [check for f in sorted(folders) for check in (_writable(f), _space(f))]
    except UARError as error:
        return [_refused(name, error), _writable(folder), _space(folder)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            validate(experiment, experiment.launch.nnodes * experiment.launch.nproc_per_node)
    except UARError as error:
        return [_refused(name, error), *outputs]
    except ImportError as error:
        return [Check(name, "error", f"cannot be checked: {error}", "install it"), *outputs]
    return [Check(name, "ok", "would start"), *outputs, *_features(experiment)]


def _refused(name: str, error: UARError) -> Check:
    problem, _, rest = str(error).partition("\n")
    remedy = "; ".join(line.strip().removeprefix("remedy:").strip() for line in rest.splitlines())
    return Check(name, "error", problem, remedy)


def _features(experiment: Any) -> list[Check]:
    """What of this plugin the experiment switches on, and why the rest is off."""
    uar = experiment.uar
    features = (
        (
            "Adaptive Expansion",
            uar.policy == "uar",
            f"mode {uar.budget.mode}",
            f"uar.policy is {uar.policy}",
        ),
        (
            "Calibrated Load Balancing",
            uar.clb.enabled,
            f"from step {uar.clb.start_step}",
            "uar.clb.enabled is false",
        ),
        (
            "aux-loss-free bias",
            uar.bias.enabled,
            f"rate {uar.bias.rate}",
            "uar.bias.enabled is false",
        ),
    )
    return [
        Check(name, "ok" if is_on else "off", how if is_on else why_not)
        for name, is_on, how, why_not in features
    ]
