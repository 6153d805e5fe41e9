"""Megatron's training loop: when it begins and ends, its data, its model run forward.

As ``compat.observe_training``: functions of ``megatron.training.training`` are called through.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]
_SEEN_BY_QK_CLIP = "current_max_attn_logits"
"""Largest attention logits since the last step (extensions/transformer_engine.py:2062)."""


def on_built_model(attach: Callable[[list[Any], argparse.Namespace], None]) -> None:
    """Have ``pretrain`` call ``attach`` with the built and loaded model and the arguments."""
    from megatron.training import get_args, training

    setup = training.setup_model_and_optimizer

    @functools.wraps(setup)
    def setup_and_attach(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        attach(built[0], get_args())
        return built

    training.setup_model_and_optimizer = setup_and_attach


def on_end_of_training(close: Callable[[str], None]) -> None:
    """Have ``pretrain`` say why it is over, after its last evaluation or when it fails.

    Its last act, in success and before it leaves early, is to close its own logger.
    """
    from megatron.training import training

    train, finish = training.train, training.one_logger_utils.finish
    reason = "exit_interval, exit_duration_in_mins, a signal, or skip_train"

    @functools.wraps(train)
    def train_and_tell(*args: Any, **kwargs: Any) -> Any:
        nonlocal reason
        try:
            result = train(*args, **kwargs)
        except SystemExit:
            raise
        except BaseException as error:
            close(f"killed by an error: {type(error).__name__}")
            raise
        reason = "finished"
        return result

    @functools.wraps(finish)
    def finish_and_close(*args: Any, **kwargs: Any) -> Any:
        close(reason)
        return finish(*args, **kwargs)

    training.train, training.one_logger_utils.finish = train_and_tell, finish_and_close


class TrainingLoop:
    """The training data and the arguments of ``train``, once they are there.

    Attributes:
        data: the training set; None on ranks that read no data.

    Args:
        on_start: called on every rank when training is about to begin.
    """

    def __init__(self, on_start: Callable[[], None]) -> None:
        from megatron.training import training

        self.data: Any = None
        self._call: dict[str, Any] = {}
        build, train = training.build_train_valid_test_datasets, training.train
        signature = inspect.signature(train)

        @functools.wraps(build)
        def build_and_keep(*args: Any, **kwargs: Any) -> Any:
            sets = build(*args, **kwargs)
            if self.data is None:  # virtual pipeline stages build theirs one after the other
                self.data = sets[0]
            return sets

        @functools.wraps(train)
        def keep_and_train(*args: Any, **kwargs: Any) -> Any:
            self._call = signature.bind(*args, **kwargs).arguments
            with _kept_random_states():  # a data set may draw when it is read
                on_start()
            return train(*args, **kwargs)

        training.build_train_valid_test_datasets = build_and_keep
        training.train = keep_and_train

    def _samples(self, indices: Sequence[int]) -> list[Batch]:
        """Micro-batches of one training sequence each; none on ranks that read no data."""
        if self.data is None:
            return []
        return [torch.utils.data.default_collate([self.data[i]]) for i in indices]

    def forward_only(self, indices: Sequence[int]) -> None:
        """Run the model on micro-batches of one training sequence, as an evaluation does.

        Training goes on as if nothing had happened: random states, timers, the overlapped
        gathering of parameters, and what QK-clipping and the search for spiky losses have seen are
        what they were. The amax history of FP8 is not: Megatron's own evaluations enter it too.

        Args:
            indices: the sequences, as many on every rank; a multiple of the pipeline's length if it
                is virtual.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.training import get_args

        args, call = get_args(), self._call
        model, config, groups = call["model"], call["config"], call.get("pg_collection")
        with (
            _evaluating(model, config, call["optimizer"]),
            _kept_random_states(),
            _micro_batches_of_one(args),
            torch.no_grad(),
        ):
            # Read anew: kept, the attention masks alone would take gigabytes of a long context.
            batches = self._samples(indices)
            iterators = [iter(batches) if batches else None for _ in model]
            get_forward_backward_func(schedule_pg_collection=groups)(
                forward_step_func=call["forward_step_func"],
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=len(indices),
                seq_length=args.seq_length,
                micro_batch_size=1,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=True,
                pg_collection=groups,
                p2p_communicator=call.get("p2p_communicator"),
            )


@contextmanager
def _evaluating(model: list[torch.nn.Module], config: Any, optimizer: Any) -> Iterator[None]:
    """What Megatron's ``train`` and ``evaluate`` do around an evaluation."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args, get_timers, training

    machine, timers = get_rerun_state_machine(), get_timers()
    mode, own_timers = machine.get_mode(), config.timers
    counts, largest = dict(machine.large_value_counts), dict(machine.max_values)
    clipped = [m for chunk in model for m in chunk.modules() if hasattr(m, _SEEN_BY_QK_CLIP)]
    attention_logits = [getattr(module, _SEEN_BY_QK_CLIP) for module in clipped]
    # Megatron hooks them at its first step that is not skipped.
    hooks = getattr(model[0], "remove_forward_pre_hook_handles", None)
    gathers = training.should_disable_forward_pre_hook(get_args()) and bool(hooks)
    timers("interval-time").stop()
    if gathers:
        training.disable_forward_pre_hook(model, optimizer=optimizer)
    machine.set_mode(RerunMode.DISABLED)
    config.timers = None
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
        config.timers = own_timers
        for module, logits in zip(clipped, attention_logits, strict=True):
            setattr(module, _SEEN_BY_QK_CLIP, logits)
        machine.large_value_counts, machine.max_values = counts, largest
        machine.set_mode(mode)
        if gathers:
            training.enable_forward_pre_hook(model)
        timers("interval-time", log_level=0).start(barrier=True)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    # States that CUDA graphs can capture are generators, which draw in place.
    generators = [state for state in states.values() if isinstance(state, torch.Generator)]
    theirs = [generator.get_state() for generator in generators]
    pythons, numpys = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            tracker.set_states(states)
            for generator, state in zip(generators, theirs, strict=True):
                generator.set_state(state)
            random.setstate(pythons)
            np.random.set_state(numpys)


@contextmanager
def _micro_batches_of_one(args: Any) -> Iterator[None]:
    """A script's ``forward_step`` reads the size of its micro-batches from the arguments."""
    names = ("micro_batch_size", "eval_micro_batch_size")
    sizes = {name: getattr(args, name) for name in names}
    try:
        for name in names:
            setattr(args, name, 1)
        yield
    finally:
        for name, size in sizes.items():
            setattr(args, name, size)
