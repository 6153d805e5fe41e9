"""A real GPT model with our spec on one CPU rank, and what it really allocates."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from jobs import TINY
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from uar_megatron.experiment import Experiment, load_experiment
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.spec import uar_layer_spec
from uar_megatron.pretrain import validate


class Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns, as long as it lives.

    Args:
        apart_from: its parameters, their gradients and its buffers do not count; views of them,
            and what is added to them, are results too.
        finds_peak: keep the largest number of live bytes in ``peak`` (slow).
    """

    def __init__(
        self, apart_from: torch.nn.Module | None = None, *, finds_peak: bool = False
    ) -> None:
        super().__init__()
        self.peak = 0
        self._finds_peak = finds_peak
        owned: list[torch.Tensor] = []
        if apart_from is not None:
            owned = [*apart_from.parameters(), *apart_from.buffers()]
            owned += [p.grad for p in apart_from.parameters() if p.grad is not None]
        self._apart = {tensor.untyped_storage()._cdata for tensor in owned}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata in self._apart:
                    continue
                known = self._alive.get(storage._cdata)
                if known is None or known[0].expired():
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._finds_peak:
            self.peak = max(self.peak, self._live())
        return result

    def live_bytes(self) -> int:
        """Bytes that are allocated now."""
        gc.collect()
        return self._live()

    def _live(self) -> int:
        return sum(size for storage, size in self._alive.values() if not storage.expired())


def build(
    run_dir: Path, *overrides: str, world: int = 1
) -> tuple[Experiment, Any, torch.nn.Module]:
    """Build the tiny model with overrides, or this rank's part of it.

    Returns:
        Its experiment, its arguments and the model.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.training.arguments import core_transformer_config_from_args

    get_moe_metrics_tracker()._metrics.clear()  # its tensors have the last model's layers
    experiment = load_experiment(TINY, [f"run.dir={run_dir}", *overrides])
    args = validate(experiment, world)
    if world > 1:
        _set_layout(args)
    config = core_transformer_config_from_args(args)
    decoder = uar_layer_spec(experiment.uar)(config)
    mtp = None
    if args.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=False)
    model = GPTModel(
        config,
        decoder,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        mtp_block_spec=mtp,
    )
    return experiment, args, Float16Module(config, model) if args.bf16 or args.fp16 else model


def _set_layout(args: Any) -> None:
    """Make the process groups that the arguments ask for."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1, ep_rank=parallel_state.get_expert_model_parallel_rank())


def forward(model: torch.nn.Module, args: Any, seed: int = 0) -> torch.Tensor:
    """The mean loss of a random micro-batch."""
    size = (args.micro_batch_size, args.seq_length)
    tokens = torch.randint(
        0, args.padded_vocab_size, size, generator=torch.Generator().manual_seed(seed)
    )
    positions = torch.arange(args.seq_length).expand(size).contiguous()
    mask = torch.ones(1, 1, args.seq_length, args.seq_length, dtype=torch.bool).triu(1)
    return model(tokens, positions, mask, labels=tokens).float().mean()


def forget_score_buffer() -> None:
    """Drop the buffer that unfused attention computes its scores in, so that it counts anew."""
    from megatron.core.parallel_state import get_global_memory_buffer

    get_global_memory_buffer().buffer.clear()


def count_rows(model: torch.nn.Module) -> list[int]:
    """Return a list to which each MoE layer adds the rows of its experts in a forward."""
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, UARMoELayer):
            module.experts.register_forward_pre_hook(
                lambda experts, inputs: rows.append(inputs[0].shape[0])
            )
    return rows
