"""Which implementation an op runs: the Triton kernels or the plain torch reference.

One rule for all ops. ``triton`` asked for by name never falls back: whoever names it wants to know
that it runs, in a benchmark as much as in a test.
"""

from importlib.util import find_spec
from typing import Literal

import torch

BACKENDS = ("auto", "triton", "torch")


def resolve(backend: str, tensor: torch.Tensor) -> Literal["triton", "torch"]:
    """Turn a requested backend into the one that runs on ``tensor``'s device.

    Args:
        backend: ``auto`` (Triton for CUDA tensors where it is installed, torch otherwise),
            ``triton`` or ``torch``.
        tensor: an input of the op; only its device matters.

    Raises:
        ValueError: ``backend`` is none of the three.
        RuntimeError: ``triton`` was asked for and cannot run on this tensor; says what to do.
    """
    # A tensor's `is_cuda`, unlike the name of the device it was asked for on, says where it lives.
    return resolve_for(backend, tensor.is_cuda)


def resolve_for(backend: str, is_cuda: bool) -> Literal["triton", "torch"]:
    """As :func:`resolve`, for tensors that are on a CUDA device or not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if is_cuda and find_spec("triton") is not None else "torch"

    if find_spec("triton") is None:
        raise RuntimeError(
            "backend 'triton' was asked for, but triton is not installed (it exists for Linux "
            "only). Install it, or use backend 'torch' or 'auto'."
        )
    if is_cuda or _interpreting():
        return "triton"
    raise RuntimeError(
        "backend 'triton' was asked for without a CUDA device: Triton compiles for GPUs only. Use "
        "a CUDA device, backend 'torch' or 'auto', or set TRITON_INTERPRET=1 in the environment "
        "before triton is imported to run the kernels in Triton's (slow) interpreter."
    )


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
