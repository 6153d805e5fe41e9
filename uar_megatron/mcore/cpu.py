"""Run the unmodified Megatron training loop on CPU with gloo.

Megatron 0.19 asserts CUDA and names it in hundreds of places. :func:`enable` puts stand-ins for
those names into ``torch`` so that ``megatron.training.pretrain`` itself needs no change. It is
asked for by ``launch.device: cpu``, refuses to start where CUDA works, and says so in the log once.

What is replaced, and why:

=====================================================  ============================================
replaced                                               because Megatron
=====================================================  ============================================
``device=`` of torch's tensor factories and            writes ``device="cuda"``, ``device=
``Tensor.to/cuda/new_*``, ``Module.to/cuda``           torch.cuda.current_device()``, ``.cuda()``;
                                                       a CUDA device is read as the CPU
``torch.cuda``: ``device_count``, ``current_device``,  sets the device, synchronises, empties the
``set_device``, ``synchronize``, ``empty_cache``,      cache and reports memory around its timers
memory queries, ``get_device_properties/capability``
``torch.cuda.Stream/Event``, ``stream``,               overlaps copies and collectives on side
``current_stream``, ``default_stream``, ``nvtx``       streams; on a CPU everything is in order
``torch.cuda`` RNG: ``get/set_rng_state``,             keeps tensor-parallel RNG states; on a CPU
``manual_seed(_all)`` and Megatron's own               the default generator is the device's, so
``_get/_set_cuda_rng_state``                           these read and write that one
``iter(DataLoader)``                                   resumes exactly on GPU because drawing the
                                                       loader's seed leaves the *device* generator
                                                       alone; here both are one, so it is restored
``Tensor.type()``                                      asserts ``torch.cuda.FloatTensor`` in its
                                                       optimizers and gradient clipping
``torch.distributed``: ``all_reduce`` and              uses ReduceOp.AVG, tensors as split sizes and
``reduce_scatter_tensor`` with AVG,                    uneven splits, which NCCL takes and gloo
``all_to_all_single`` splits, uneven ``all_gather``    does not
and ``reduce_scatter``
``torch.compile``                                      fuses small functions with it, which would
                                                       need a C++ compiler and minutes on a CPU
``initialize_megatron`` gets ``allow_no_cuda=True``    asserts CUDA (its own switch for CPU work)
``compile_helpers``                                    runs ``make``, but its wheel ships the
                                                       compiled helpers and no Makefile
``DistributedOptimizer.state_dict`` and                expects FusedAdam's layout (one step count
``load_state_dict``, without apex and TE               per group) when it loads
``WrappedTorchNorm`` with sequence parallelism          asserts it is off; its own norms for it are
                                                       TE's and apex's
the worker of asynchronous saves and                   asks in a new process for CUDA's device;
``FileSystemWriterAsync.preload_tensors``              copies from the GPU before training goes on,
                                                       and a tensor on the CPU is not copied
a warning of ``megatron.core.tensor_parallel.random``  warns when the CPU generator moves while the
                                                       GPU's is in use; here both are one
=====================================================  ============================================
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from uar_megatron.errors import UnsupportedEnvironmentError

logger = logging.getLogger(__name__)

_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
    "zeros_like",
]
_TENSOR_METHODS = ["to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"]

_enabled = False


def is_enabled() -> bool:
    """Whether :func:`enable` has run in this process."""
    return _enabled


def enable() -> None:
    """Install the stand-ins; a second call does nothing. Call it before importing Megatron.

    Raises:
        UnsupportedEnvironmentError: CUDA works here, or Megatron has already been imported
            (some of its modules copy ``torch.distributed`` functions at import).
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise UnsupportedEnvironmentError(
            "launch.device: the CPU layer was asked for, but CUDA works on this machine.\n"
            "  remedy:  use a parallel/ configuration with launch.device=cuda, or hide the GPUs "
            "with CUDA_VISIBLE_DEVICES='' if a CPU run is really what you want."
        )
    if "megatron.core.tensor_parallel" in sys.modules:
        raise UnsupportedEnvironmentError(
            "the CPU layer must be enabled before megatron.core is imported.\n"
            "  remedy:  call uar_megatron.mcore.cpu.enable() at the top of your script."
        )
    torch.compile = _leave_uncompiled  # type: ignore[assignment]
    _replace_devices()
    _replace_cuda_namespace()
    _replace_rng()
    _replace_collectives()
    from uar_megatron.mcore.cpu_megatron import replace_in_megatron

    replace_in_megatron(_checkpoint_worker)
    _enabled = True
    logger.warning("CPU layer on: no CUDA device, Megatron runs on the CPU with gloo")


def _cpu_if_cuda(device: Any) -> Any:
    """Return the CPU for anything that names a CUDA device, else ``device`` itself."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return "cpu"
    if isinstance(device, str):
        return "cpu" if device.split(":")[0] == "cuda" else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    return device


def _replace_devices() -> None:
    def with_cpu_device(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _cpu_if_cuda(kwargs["device"])
            kwargs.pop("pin_memory", None)
            return original(*args, **kwargs)

        return wrapper

    for name in _FACTORIES:
        setattr(torch, name, with_cpu_device(getattr(torch, name)))
    for name in _TENSOR_METHODS[1:]:
        setattr(torch.Tensor, name, with_cpu_device(getattr(torch.Tensor, name)))

    original_to = torch.Tensor.to

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu_if_cuda(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _cpu_if_cuda(kwargs["device"])
        return original_to(self, *args, **kwargs)

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original_type(self, *args, **kwargs)
        if args or kwargs or not isinstance(name, str):
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = tensor_to  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = stay  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = stay  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = stay  # type: ignore[method-assign,assignment]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign,assignment]


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """An event that has already been recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


_STREAM = _Stream()


@contextlib.contextmanager
def _null_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _replace_cuda_namespace() -> None:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1
    )
    stand_ins: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "device_memory_used": zero,
        "memory_stats": lambda *args, **kwargs: _ZeroStats(),
        "get_device_properties": lambda *args, **kwargs: properties,
        # Megatron wants 8.0 for grouped GEMMs (arguments.py:1340); torch's runs on CPUs too.
        "get_device_capability": lambda *args, **kwargs: (8, 0),
        "get_device_name": lambda *args, **kwargs: "cpu",
        "Stream": _Stream,
        "Event": _Event,
        "stream": _null_context,
        "device": _null_context,
        "set_stream": nothing,
        "current_stream": lambda *args, **kwargs: _STREAM,
        "default_stream": lambda *args, **kwargs: _STREAM,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.nvtx.range_push = nothing
    torch.cuda.nvtx.range_pop = nothing
    torch.cuda.nvtx.range = _null_context


class _ZeroStats(dict[str, int]):
    """``torch.cuda.memory_stats()`` of a machine without CUDA: every counter is 0."""

    def __missing__(self, key: str) -> int:
        return 0


def _replace_rng() -> None:
    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.random.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.random.set_rng_state(new_state)

    def seed_generator(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state  # type: ignore
        module.set_rng_state = set_state  # type: ignore
        module.manual_seed = seed_generator  # type: ignore
        module.manual_seed_all = seed_generator  # type: ignore

    loader = torch.utils.data.DataLoader
    original_iter = loader.__iter__

    def iter_without_drawing(self: Any) -> Any:
        state = torch.random.get_rng_state()
        iterator = original_iter(self)
        torch.random.set_rng_state(state)
        return iterator

    loader.__iter__ = iter_without_drawing  # type: ignore[method-assign]


def _replace_collectives() -> None:
    group_size = dist.get_world_size

    def averaging(original: Callable[..., Any]) -> Callable[..., Any]:
        """gloo has no AVG: sum, then divide the (first) output by the size of the group."""

        @functools.wraps(original)
        def wrapper(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            positional = list(args)
            op_index = next((i for i, a in enumerate(positional) if a == dist.ReduceOp.AVG), None)
            if op_index is not None:
                positional[op_index] = dist.ReduceOp.SUM
            elif kwargs.get("op") == dist.ReduceOp.AVG:
                kwargs["op"] = dist.ReduceOp.SUM
            else:
                return original(output, *args, **kwargs)
            is_async = kwargs.pop("async_op", False)
            original(output, *positional, **kwargs)
            output.div_(group_size(kwargs.get("group")))
            return _DoneWork() if is_async else None

        return wrapper

    original_all_to_all = dist.all_to_all_single

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return original_all_to_all(
            output,
            input,
            _as_list(output_split_sizes),
            _as_list(input_split_sizes),
            group,
            async_op,
        )

    original_all_gather = dist.all_gather

    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(t.shape == tensor.shape for t in tensor_list):
            return original_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for source, part in enumerate(tensor_list):
            _broadcast_part(part, source, group)
        return _DoneWork() if async_op else None

    original_reduce_scatter = dist.reduce_scatter

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(t.shape == output.shape for t in input_list):
            return original_reduce_scatter(output, input_list, op, group, async_op)
        summed = torch.cat(input_list)
        dist.all_reduce(summed, op=op, group=group)
        sizes = [t.shape[0] for t in input_list]
        output.copy_(summed.split(sizes)[dist.get_rank(group)])
        return _DoneWork() if async_op else None

    dist.all_reduce = averaging(dist.all_reduce)
    dist.reduce_scatter_tensor = averaging(dist.reduce_scatter_tensor)
    dist.all_to_all_single = all_to_all_single
    dist.all_gather = all_gather
    dist.reduce_scatter = reduce_scatter


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _broadcast_part(part: torch.Tensor, source: int, group: Any) -> None:
    """Broadcast a slice that may be empty or non-contiguous from group rank ``source``."""
    buffer = part.contiguous()
    if buffer.numel():
        dist.broadcast(buffer, group_src=source, group=group)
        part.copy_(buffer)


class _DoneWork:
    """The handle of a collective that finished before it returned."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _leave_uncompiled(model: Any = None, **options: Any) -> Any:
    return (lambda fn: fn) if model is None else model


def _checkpoint_worker(*args: Any) -> None:
    """Megatron's worker (async_utils.py:520) in a new process, where nothing is replaced yet."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if not _enabled:
        _replace_cuda_namespace()
    loop = getattr(PersistentAsyncCaller, "stock_async_loop", PersistentAsyncCaller.async_loop)
    loop(*args)
