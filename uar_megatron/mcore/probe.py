"""The probe: a fixed batch of training data, and how experts and routing look on it.

For any router and dispatcher: what is routed is seen with hooks that exist during the probe alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from uar_megatron.errors import ConfigError
from uar_megatron.mcore.compat import (
    MoELayer,
    ProcessGroupCollection,
    get_context_parallel_world_size,
)
from uar_megatron.mcore.watching import dispatched_map, moe_layers, row_of, valid_tokens
from uar_megatron.observatory import (
    cache_sizes,
    mean_pair_cosine,
    overlap,
    served_parts,
    unit_rows,
)

OUTPUT_TOKENS = 32
"""Tokens of each expert-parallel group that all its experts are given, to compare their outputs."""
_NAMES = ("weight_similarity", "output_similarity", "stability")


class Probe:
    """Measures similarity of experts, stability and local consistency of routing.

    Args:
        model: this rank's chunks.
        num_layers: of the whole model, with those for multi-token prediction.
        num_experts: E.
        topk: K.
        segment: tokens of a segment for local consistency.
        forward: runs the model on the probe batch, in evaluation mode and without gradients.

    Raises:
        ConfigError: experts are not Megatron's, so their weights cannot be told apart.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        num_layers: int,
        num_experts: int,
        topk: int,
        segment: int,
        forward: Callable[[], object],
    ) -> None:
        self.layers = [_ProbedLayer(layer, segment) for layer in moe_layers(model)]
        for layer in self.layers:
            expert_matrices(layer.moe)
        self.num_layers, self.num_experts = num_layers, num_experts
        self.sizes = cache_sizes(topk, num_experts)
        self.forward = forward
        self.device = torch.cuda.current_device()

    @torch.no_grad()
    def run(self) -> dict[int, dict[str, Any]]:
        """Run the batch and reduce what was seen; called on every rank.

        Returns:
            For each row that is a MoE layer the fields of a ``LayerObservation``.
        """
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.watched())
            self.forward()
        table = torch.zeros(
            self.num_layers,
            len(_NAMES) + len(self.sizes),
            2,  # a sum, and of how many
            dtype=torch.float64,
            device=self.device,
        )
        for layer in self.layers:
            table[row_of(layer.moe.router)] = torch.stack(
                (
                    weight_similarity(layer.moe),
                    output_similarity(layer.moe, layer.take_inputs()),
                    *layer.take_routing(self.sizes),
                )
            )
        torch.distributed.all_reduce(table)
        return {
            index: self._describe(row.tolist())
            for index, row in enumerate(table.cpu())
            if row.any()
        }

    def _describe(self, row: list[list[float]]) -> dict[str, Any]:
        means = [total / count if count else None for total, count in row]
        hits = {str(size): means[len(_NAMES) + i] for i, size in enumerate(self.sizes)}
        return {
            **dict(zip(_NAMES, means, strict=False)),
            "cache_hit_rates": None if None in hits.values() else hits,
        }


class _ProbedLayer:
    """A MoE layer during the probe, and its routing at the last one."""

    def __init__(self, moe: MoELayer, segment: int) -> None:
        self.moe, self.segment = moe, segment
        self._inputs: torch.Tensor | None = None
        # Of each micro-batch: bool [sequence, batch, experts], and which tokens are no padding.
        self._maps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._last: torch.Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at what the layer is given and how it is routed."""
        self._inputs, self._maps = None, []
        handles = (
            self.moe.register_forward_pre_hook(self._on_input),
            self.moe.router.register_forward_hook(self._on_routing, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_input(self, moe: MoELayer, args: tuple[Any, ...]) -> None:
        if self._inputs is None:
            inputs = args[0].detach().flatten(0, -2)
            apart = max(len(inputs) // OUTPUT_TOKENS, 1)
            self._inputs = inputs[::apart][:OUTPUT_TOKENS].clone()

    def _on_routing(self, router: Any, args: Any, kwargs: Any, returned: Any) -> None:
        hidden, *rest = args
        padding_mask = rest[0] if rest else kwargs.get("padding_mask")
        map_TE = dispatched_map(router, *returned)
        valid_T = valid_tokens(padding_mask)
        if valid_T is None:
            valid_T = torch.ones_like(map_TE[:, 0])
        shape = hidden.shape[:2]
        map_SBE = (map_TE & valid_T.unsqueeze(-1)).view(*shape, -1)
        self._maps.append((map_SBE, valid_T.view(shape)))

    def take_inputs(self) -> torch.Tensor:
        """Some of the tokens that the layer was given, evenly spread, ``[tokens, hidden]``."""
        assert self._inputs is not None, "the probe's forward did not reach this layer"
        inputs, self._inputs = self._inputs, None
        return inputs

    def take_routing(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Stability and the hit rate of each cache size, as sums and counts."""
        maps, self._maps = self._maps, []
        map_TE = torch.cat([map_SBE.flatten(0, 1) for map_SBE, _ in maps])
        valid_T = torch.cat([valid_SB.flatten() for _, valid_SB in maps])
        stability = map_TE.new_zeros(2, dtype=torch.float64)
        if self._last is not None:
            overlap_T = overlap(self._last.to(map_TE.device), map_TE)
            stability = torch.stack(((overlap_T * valid_T).sum(), valid_T.sum().double()))
        self._last = map_TE.cpu()
        hits = torch.cat([self._hits(map_SBE, sizes) for map_SBE, _ in maps])
        rows = hits.new_tensor(float(len(hits)))
        return [stability, *(torch.stack((total, rows)) for total in hits.sum(dim=0))]

    def _hits(self, map_SBE: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """``[segments, sizes]`` of one micro-batch; a rest shorter than a segment is left out."""
        segments = []
        for piece_SBE in map_SBE.split(contiguous_tokens(len(map_SBE), self.moe.attn_tp_group)):
            whole = len(piece_SBE) // self.segment * self.segment
            piece_BSE = piece_SBE[:whole].transpose(0, 1)
            segments.append(piece_BSE.reshape(-1, self.segment, piece_BSE.shape[-1]))
        return served_parts(torch.cat(segments), sizes)


def contiguous_tokens(length: int, tp_group: torch.distributed.ProcessGroup) -> int:
    """Consecutive tokens of one sequence among the ``length`` of it that a router is given.

    Context parallelism gives each rank two pieces of a sequence; an even number of tensor-parallel
    ranks (each has its part under sequence parallelism) divides them among itself.
    """
    is_in_two = get_context_parallel_world_size() > 1 and tp_group.size() % 2
    return length // 2 if is_in_two else length


def output_similarity(moe: MoELayer, inputs: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of two experts' outputs: its sum over tokens, and their number.

    All experts of the expert-parallel group are given the same tokens, those of its first rank.
    One broadcast and two reductions.

    Args:
        moe: the layer.
        inputs: tokens that it was given, as many on each rank, ``[tokens, hidden]``.
    """
    if moe.config.moe_latent_size:
        inputs, _ = moe.fc1_latent_proj(inputs)
    group = _expert_groups().tp_ep
    inputs = inputs.contiguous()
    torch.distributed.broadcast(inputs, torch.distributed.get_global_rank(group, 0), group=group)
    local, tokens = moe.num_local_experts, len(inputs)
    outputs, _ = moe.experts(
        inputs.repeat(local, 1),
        torch.full((local,), tokens, dtype=torch.int64, device=inputs.device),
        torch.ones(local * tokens, device=inputs.device),
    )
    outputs_EnD = outputs.view(local, tokens, -1).float()
    if _expert_groups().expt_tp.size() > 1:  # each rank has computed a summand
        torch.distributed.all_reduce(outputs_EnD, group=_expert_groups().expt_tp)
    units_EnD = unit_rows(outputs_EnD)
    # The sum of the unit vectors, and in one column more how many there are.
    sums = torch.cat((units_EnD, (units_EnD != 0).any(dim=-1, keepdim=True)), dim=-1).sum(dim=0)
    torch.distributed.all_reduce(sums, group=_expert_groups().ep)
    squares_n = sums[:, :-1].double().square().sum(dim=-1)
    cosines_n = mean_pair_cosine(squares_n, sums[:, -1].double(), moe.config.num_moe_experts)
    return torch.stack((cosines_n.sum(), cosines_n.new_tensor(float(tokens))))


def weight_similarity(moe: MoELayer) -> torch.Tensor:
    """Mean cosine similarity of two experts' weights (all matrices as one vector), and 1.

    One reduction of a vector as long as an expert's shard, in a part per matrix.
    """
    matrices = expert_matrices(moe)
    norms_E = sum(
        torch.stack([torch.linalg.vector_norm(w, dtype=torch.float64).square() for w in weights])
        for weights in matrices
    )
    assert isinstance(norms_E, torch.Tensor)
    groups = _expert_groups()
    if groups.expt_tp.size() > 1:
        torch.distributed.all_reduce(norms_E, group=groups.expt_tp)
    norms_E = norms_E.sqrt()
    # An expert without weights is similar to none. In float32 as its summands are.
    scales_E = torch.where(norms_E > 0, 1.0 / norms_E, 0.0).float()
    square = norms_E.new_zeros(())
    for weights in matrices:
        total = torch.zeros_like(weights[0], dtype=torch.float32)
        for weight, scale in zip(weights, scales_E, strict=True):
            total += weight.float() * scale
        torch.distributed.all_reduce(total, group=groups.ep)
        square = square + torch.linalg.vector_norm(total, dtype=torch.float64).square()
    # The ranks of expert parallelism have the same square; those of tensor parallelism count alike.
    count = (norms_E > 0).sum().double() / groups.expt_tp.size()
    sums = torch.stack((square / groups.ep.size(), count))
    torch.distributed.all_reduce(sums, group=groups.tp_ep)
    cosine = mean_pair_cosine(sums[0], sums[1], moe.config.num_moe_experts)
    return torch.stack((cosine, torch.ones_like(cosine)))


def expert_matrices(moe: MoELayer) -> list[list[torch.Tensor]]:
    """Each weight matrix of an expert, for all local experts in order; biases are left out.

    By the names of Megatron's parameters: ``local_experts.<i>.linear_fc1.weight`` (SequentialMLP
    and our TorchGroupedMLP), ``linear_fc1.weight<i>`` (TEGroupedMLP), or ``linear_fc1.weight`` with
    a leading dimension of experts (TEGroupedMLP with ``moe_single_grouped_weight``).

    Raises:
        ConfigError: there are no such names.
    """
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, weight in moe.experts.named_parameters():
        each = re.fullmatch(r"(?:local_experts\.(\d+)\.)?(linear_fc\d)\.weight(\d*)", name)
        if each is None:
            continue
        number = each[1] or each[3]
        of_linear = found.setdefault(each[2], {})
        if number:
            of_linear[int(number)] = weight.detach()
        else:
            of_linear.update(enumerate(weight.detach().unbind(0)))
    if not found:
        raise ConfigError(
            "uar.observe.probe_interval",
            f"{type(moe.experts).__name__} has none of the parameter names of Megatron's experts",
            remedy="set uar.observe.probe_interval=0",
        )
    return [[weights[i] for i in sorted(weights)] for weights in found.values()]


def _expert_groups() -> Any:
    return ProcessGroupCollection.use_mpu_process_groups(["ep", "expt_tp", "tp_ep"])
