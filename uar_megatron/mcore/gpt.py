"""Data, batches and loss of GPT pretraining, which ``megatron.training.pretrain`` is handed.

The megatron-core wheel has the training loop but not ``pretrain_gpt.py``; this is our counterpart
for plain (unpacked) pretraining data, on Megatron's own datasets and batch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from uar_megatron.errors import TrainingError
from uar_megatron.mcore.compat import (
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    current_iteration,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_src_rank,
)
from uar_megatron.mcore.step import nonfinite_error, routers_of
from uar_megatron.mcore.token_classes import DOMAINS
from uar_megatron.observatory import DECILES, NO_CLASS

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens")


def dataset_provider(num_samples: list[int | None], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test datasets that the arguments name.

    Args:
        num_samples: samples wanted of each split.
        vp_stage: virtual pipeline stage.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_here() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and _reads_data(
            get_args(), vp_stage, args.mtp_num_layers
        )

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, config).build()


# Every rank builds its own datasets and iterators (training.py:4540).
dataset_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run the model on the next micro-batch; return its output and the loss function for it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = _next_batch(data_iterator, get_model_config(model), vp_stage)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(_loss, batch["loss_mask"], model)


def _reads_data(config: Any, vp_stage: int | None, mtp_num_layers: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _next_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]], config: Any, vp_stage: int | None
) -> dict[str, torch.Tensor | None]:
    args = get_args()
    batch: dict[str, torch.Tensor | None] = dict.fromkeys(_BATCH_KEYS)
    DOMAINS.current = None
    if not _reads_data(config, vp_stage, config.mtp_num_layers):
        return batch
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in batch.keys() & sample.keys():
            batch[key] = sample[key].cuda(non_blocking=True)
    if DOMAINS.is_wanted():
        DOMAINS.current = _domains(sample if tp_rank == 0 else {}, args.micro_batch_size)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        # Evaluation may use a micro-batch of another size.
        micro_batch_size=args.micro_batch_size
        if torch.is_grad_enabled()
        else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        ),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def _domains(sample: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """Each sequence's data set in the blend, on every tensor-parallel rank alike."""
    unknown = torch.full((size,), NO_CLASS - DECILES)
    domains = sample.get("dataset_id", unknown).long().cuda()
    if get_tensor_model_parallel_group().size() > 1:
        source, group = get_tensor_model_parallel_src_rank(), get_tensor_model_parallel_group()
        torch.distributed.broadcast(domains, source, group=group)
    return domains


def _loss(
    loss_mask: torch.Tensor | None, model: torch.nn.Module, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses, the number of tokens, and both for the report (Megatron's form)."""
    assert loss_mask is not None  # only called on the last pipeline stage, which reads data
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        _check_finite(loss, model)
    report = torch.stack((loss.detach(), tokens.float()))
    return loss, tokens.detach(), {"lm loss": report}


def _check_finite(loss: torch.Tensor, model: torch.nn.Module) -> None:
    """Megatron's check of the loss, with the first router that went wrong named in the error."""
    for is_bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        try:
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
        except RuntimeError as error:
            for router in routers_of([model]):
                tokens = router.uar_statistics.nonfinite_tokens()
                if tokens:
                    raise nonfinite_error(router, tokens, current_iteration()) from error
            raise TrainingError(
                f"step {current_iteration()}: the loss is {name}, while the energy and entropy of "
                "every router of this pipeline stage are finite\n"
                "  remedy:  resume from the last checkpoint with a lower learning rate"
            ) from error
