"""How a model is cut over the ranks of a job, from Megatron's arguments and the number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, the batch and the pipeline's stages.

    Attributes:
        world: ranks.
        gpus_per_node: consecutive ranks that share a node.
        tensor: ``tensor_model_parallel_size``.
        pipeline: ``pipeline_model_parallel_size``.
        virtual: model chunks of a pipeline rank, 1 without interleaving.
        context: ``context_parallel_size``.
        expert: ``expert_model_parallel_size``.
        expert_tensor: ``expert_tensor_parallel_size``.
        has_sequence_parallel: norms, dropout, routing and dispatch see 1/tensor of the tokens.
        micro_batch: sequences of a micro-batch.
        global_batch: sequences of an optimizer step.
        seq_length: tokens of a sequence.
        stages: the decoder layers, counted from 0, of each pipeline rank.
        warmup_group: ``microbatch_group_size_per_vp_stage``.
    """

    world: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    has_sequence_parallel: bool
    micro_batch: int
    global_batch: int
    seq_length: int
    stages: tuple[tuple[int, ...], ...]
    warmup_group: int

    @property
    def data(self) -> int:
        """Data-parallel size of everything but routed experts, without context parallelism."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Data-parallel size of routed experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step on each rank."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on a tensor-parallel group."""
        return self.micro_batch * self.seq_length / self.context

    @property
    def routed_tokens(self) -> float:
        """Tokens that one rank routes of a micro-batch."""
        return self.tokens / (self.tensor if self.has_sequence_parallel else 1)

    def in_flight(self, stage: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at once (schedules.py:930).

        1F1B: as many as there are stages from this one on. Interleaved: the warm-up's chunks and
        one more, in units of all chunks of the rank.
        """
        if self.virtual == 1:
            return min(self.pipeline - stage, self.micro_batches)
        warmup = (self.pipeline - stage - 1) * 2 + (self.virtual - 1) * self.warmup_group
        return min(warmup + 1, self.micro_batches * self.virtual) / self.virtual

    def chunks_of(self, stage: int) -> list[tuple[int, ...]]:
        """Decoder layers of a pipeline rank, by model chunk."""
        layers = self.stages[stage]
        size = len(layers) // self.virtual
        return [layers[i * size : (i + 1) * size] for i in range(self.virtual)]

    def layers_of(self, stage: int, mtp_layers: int) -> list[int]:
        """Layers of a pipeline rank; MTP layers, on the last, count on from the decoder's."""
        layers = list(self.stages[stage])
        if stage == self.pipeline - 1:
            count = sum(len(those) for those in self.stages)
            layers += range(count, count + mtp_layers)
        return layers

    @property
    def expert_group(self) -> list[int]:
        """Global ranks of the first expert-parallel group: its ranks lie expert_tensor apart."""
        return [i * self.expert_tensor for i in range(self.expert)]


def layout_of(args: Any, shape: ModelShape, gpus: int, gpus_per_node: int) -> Layout:
    """Return the layout that Megatron's arguments describe on ``gpus`` ranks.

    Args:
        args: Megatron's parsed arguments; what its validation would derive may be unset.
        shape: the model's.
        gpus: ranks.
        gpus_per_node: GPUs of a node.

    Raises:
        ConfigError: sizes that do not divide, or a split that is not modelled.
    """
    for option, value in {"--gpus": gpus, "--gpus-per-node": gpus_per_node}.items():
        if value < 1:
            raise ConfigError(option, f"{value} is not allowed", allowed="1 or more")
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context, expert = args.context_parallel_size, args.expert_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    _divides(
        "--gpus",
        gpus,
        tensor * pipeline * context,
        f"tensor {tensor} · pipeline {pipeline} · context {context}",
    )
    _divides(
        "--gpus",
        gpus,
        expert_tensor * expert * pipeline,
        f"expert_tensor {expert_tensor} · expert {expert} · pipeline {pipeline}",
    )
    if expert > shape.experts or shape.experts % expert:
        raise ConfigError(
            "expert_model_parallel_size",
            f"{shape.experts} experts cannot be spread evenly over {expert} ranks",
            allowed=", ".join(str(n) for n in _divisors(shape.experts)),
        )
    for name, heads in {
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
    }.items():
        _divides(name, heads, tensor, "tensor_model_parallel_size")
    if tensor > 1 and not args.sequence_parallel:
        raise ConfigError(
            "sequence_parallel",
            "Megatron trains experts with tensor parallelism only under sequence parallelism",
            remedy="set sequence_parallel: true",
        )
    data = gpus // (tensor * pipeline * context)
    micro_batch = args.micro_batch_size or 1
    global_batch = args.global_batch_size or micro_batch * data
    _divides(
        "global_batch_size",
        global_batch,
        micro_batch * data,
        f"micro_batch_size {micro_batch} · data parallel {data} on {gpus} GPUs",
    )
    stages, virtual = _stages(args, len(shape.is_moe), pipeline)
    return Layout(
        world=gpus,
        gpus_per_node=gpus_per_node,
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        context=context,
        expert=expert,
        expert_tensor=expert_tensor,
        has_sequence_parallel=bool(args.sequence_parallel),
        micro_batch=micro_batch,
        global_batch=global_batch,
        seq_length=shape.seq_length,
        stages=stages,
        warmup_group=args.microbatch_group_size_per_vp_stage or pipeline,
    )


def _divides(field: str, value: int, by: int, what: str) -> None:
    if value % by or value < by:
        raise ConfigError(
            field,
            f"{value} is not a multiple of {by} ({what})",
            allowed=f"multiples of {by}",
            remedy=f"the nearest are {max(value // by, 1) * by} and {(value // by + 1) * by}"
            if value > by
            else f"the least is {by}",
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _stages(args: Any, layers: int, pipeline: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The layers of each pipeline rank, and its number of chunks (transformer_block.py)."""
    for name in (
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    ):
        if getattr(args, name, None):
            raise ConfigError(
                name,
                "this split of layers over pipeline stages is not modelled",
                allowed="even stages, or decoder_first/last_pipeline_num_layers",
            )
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    named = {0: first, pipeline - 1: last}
    fixed = {stage: count for stage, count in named.items() if count is not None}
    rest, stages = layers - sum(fixed.values()), pipeline - len(fixed)
    if rest < 0 or (stages and rest % stages) or (not stages and rest):
        raise ConfigError(
            "pipeline_model_parallel_size",
            f"{rest} layers cannot be spread evenly over {stages} pipeline stages",
            allowed=", ".join(str(n) for n in _divisors(layers)),
            remedy="or set decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers",
        )
    counts = [fixed.get(stage, rest // stages if stages else 0) for stage in range(pipeline)]
    virtual = args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_layers_per_virtual_pipeline_stage:
        virtual = counts[0] // args.num_layers_per_virtual_pipeline_stage
    uneven = next((count for count in counts if virtual < 1 or count % virtual), None)
    if uneven is not None:
        raise ConfigError(
            "num_virtual_stages_per_pipeline_rank",
            f"{uneven} layers of a pipeline rank cannot be cut into {virtual} equal chunks",
            allowed=", ".join(str(n) for n in _divisors(uneven)),
        )
    layers_of: list[list[int]] = [[] for _ in range(pipeline)]
    layer = 0
    for _ in range(virtual):
        for stage, count in enumerate(counts):
            layers_of[stage] += range(layer, layer + count // virtual)
            layer += count // virtual
    return tuple(map(tuple, layers_of)), virtual
