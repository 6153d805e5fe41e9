"""The part of the CPU layer that lies within Megatron; the table in ``cpu.py`` has it all."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch


def replace_in_megatron(checkpoint_worker: Callable[..., None]) -> None:
    """Replace the functions; called once, by :func:`uar_megatron.mcore.cpu.enable`.

    Args:
        checkpoint_worker: what a process that writes checkpoints runs, importable by its name.
    """
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.training.training as training

    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    dataset_utils.compile_helpers = lambda: None
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    _replace_adam_step_count()
    _replace_norm()
    _replace_checkpoint_worker(checkpoint_worker)


def _replace_checkpoint_worker(worker: Callable[..., None]) -> None:
    """Let ``--async-save`` write what the tensors were when it was called."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    PersistentAsyncCaller.stock_async_loop = PersistentAsyncCaller.async_loop
    PersistentAsyncCaller.async_loop = staticmethod(worker)
    FileSystemWriterAsync.preload_tensors = staticmethod(_copy_buckets)


def _copy_buckets(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """``preload_tensors`` (filesystem_async.py:227): Megatron waits for it before it trains on.

    A worker sees the trainer's own memory, which the next step changes while it is written.
    """
    return [
        (file, key, (objects, [(i, t.clone() if t.is_shared() else t) for i, t in tensors]))
        for file, key, (objects, tensors) in write_buckets
    ]


def _replace_norm() -> None:
    """Let torch's norms be used with sequence parallelism, which Megatron asserts is off.

    All they lack is the mark by which Megatron sums the gradients of weights that each
    tensor-parallel rank sees a part of the sequence with (finalize_model_grads.py:452).
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def with_sequence_parallelism(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = build(cls, whole, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = with_sequence_parallelism


def _replace_adam_step_count() -> None:
    """Let a distributed optimizer with torch's Adam save before its first step, and load exactly.

    ``DistributedOptimizer.state_dict`` (distrib_optimizer.py:837) wants one step count even from
    an optimizer that has not stepped, which is what loading starts from. ``load_state_dict``
    gives every parameter the *same* step tensor (:1032), which torch's Adam would advance once per
    parameter, and some sharding types then overwrite it with the value before loading (:1953) or
    miss it (:1223).
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    original_state_dict = distrib_optimizer.DistributedOptimizer.state_dict
    original_load = distrib_optimizer.DistributedOptimizer.load_state_dict

    def state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state[param]
                for key in self.optimizer_state_keys:
                    if key not in state:
                        state[key] = torch.zeros_like(param.data)
                state.setdefault("step", torch.tensor(0.0))
        return original_state_dict(self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(float(group["step"]))

    original_set = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()  # in fp32 what is loaded into is the parameter itself
    def set_states(self: Any, param: Any, tensors: dict[str, Any]) -> None:
        original_set(self, param, {"step": None, **tensors})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    distrib_optimizer.DistributedOptimizer.state_dict = state_dict
    distrib_optimizer.DistributedOptimizer.load_state_dict = load_state_dict
