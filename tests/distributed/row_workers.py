"""Random routings through the real dispatchers; ``torchrun … row_workers.py`` checks every row."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from moe_cases import HIDDEN, transformer_config  # noqa: E402

from uar_megatron.mcore.compat import get_default_pg_collection  # noqa: E402
from uar_megatron.mcore.token_dispatcher import VARIABLE_K_DISPATCHERS  # noqa: E402

EXAMPLES = 12
MAX_TOKENS = 20  # per rank; more than the multiple that quantization pads experts to


class Variant(NamedTuple):
    """How the dispatcher is driven.

    Attributes:
        kind: Megatron's name of the dispatcher.
        is_padded: whether it fills experts up for quantization.
        is_total_known: whether it is told the number of rows, as in mode ``exact``.
    """

    kind: str
    is_padded: bool = False
    is_total_known: bool = False

    @property
    def is_even(self) -> bool:
        """Whether all ranks have to have the same number of tokens."""
        return self.kind == "allgather"


VARIANTS = (
    Variant("alltoall"),
    Variant("alltoall", is_total_known=True),
    Variant("alltoall", is_padded=True),
    Variant("alltoall", is_padded=True, is_total_known=True),
    Variant("allgather"),  # counts from the map, and does not pad
)


class Layout(NamedTuple):
    """Sizes of the tensor-, expert- and expert-tensor-parallel groups."""

    tp: int
    ep: int
    etp: int


LAYOUTS = {
    2: [Layout(1, 1, 1), Layout(1, 2, 1), Layout(2, 1, 1), Layout(2, 2, 1), Layout(2, 1, 2)],
    4: [Layout(1, 2, 1), Layout(1, 4, 1), Layout(2, 2, 1), Layout(2, 2, 2), Layout(1, 2, 2)],
}

Pair = tuple[int, int]
"""A token's number, unique over all ranks, and an expert that it is routed to."""


class Routing(NamedTuple):
    """One routing decision on all ranks.

    Attributes:
        experts: E.
        chosen: for each rank, for each of its tokens, the chosen experts as bits.
        seed: of inputs and weights.
    """

    experts: int
    chosen: list[list[int]]
    seed: int

    def first_token(self, rank: int) -> int:
        """The number of a rank's first token; 0 is no token's number."""
        return 1 + sum(len(tokens) for tokens in self.chosen[:rank])

    def pairs(self) -> list[Pair]:
        """Every (token, expert) pair of all ranks."""
        return [
            (self.first_token(rank) + t, e)
            for rank, tokens in enumerate(self.chosen)
            for t, chosen in enumerate(tokens)
            for e in range(self.experts)
            if chosen >> e & 1
        ]


@st.composite
def routings(draw: st.DrawFn, layout: Layout, is_even: bool) -> Routing:
    """Any decision, with the extremes likely.

    Args:
        draw: hypothesis's.
        layout: bounds the number of experts.
        is_even: whether all ranks have the same number of tokens.
    """
    experts = draw(st.sampled_from([n for n in (2, 4, 8, 12) if n % layout.ep == 0]))
    local = experts // layout.ep
    everybody = 2**experts - 1
    idle_rank = ((1 << local) - 1) << local * draw(st.integers(0, layout.ep - 1))
    any_experts = st.integers(0, everybody)
    of_a_token = draw(
        st.sampled_from(
            [
                any_experts,
                any_experts.map(lambda chosen: chosen & ~idle_rank),
                st.just(everybody),
                st.just(0),
                st.just(1 << draw(st.integers(0, experts - 1))),
            ]
        )
    )
    world = dist.get_world_size()
    lengths = st.integers(0, MAX_TOKENS)
    counts = [draw(lengths)] * world if is_even else [draw(lengths) for _ in range(world)]
    return Routing(
        experts,
        [draw(st.lists(of_a_token, min_size=n, max_size=n)) for n in counts],
        seed=draw(st.integers(0, 2**16)),
    )


def build_dispatcher(variant: Variant, layout: Layout, routing: Routing) -> Any:
    """The dispatcher under test, as the MoE layer builds it."""
    config = transformer_config(
        num_moe_experts=routing.experts,
        moe_token_dispatcher_type=variant.kind,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    if variant.is_padded:
        # TransformerConfig asks for Transformer Engine here; the dispatcher does without it.
        config.moe_router_padding_for_quantization = True
        config.fp8, config.fp8_recipe = "e4m3", "tensorwise"
    groups = get_default_pg_collection()
    local = routing.experts // layout.ep
    first = groups.ep.rank() * local
    indices = list(range(first, first + local))
    dispatcher = VARIABLE_K_DISPATCHERS[variant.kind](
        local, indices, config=config, pg_collection=groups
    )
    if variant.is_total_known:
        total = sum(chosen.bit_count() for chosen in routing.chosen[dist.get_rank()])
        dispatcher.total_slots = lambda tokens: total
    return dispatcher


def expert_outputs(expert_R: torch.Tensor, rows_RH: torch.Tensor) -> torch.Tensor:
    """A function of the row that no two experts share."""
    number_R1 = expert_R.unsqueeze(-1) + 1.0
    return torch.sin(number_R1 * rows_RH) + number_R1


def check_rows(variant: Variant, layout: Layout, routing: Routing) -> None:
    """Send one routing through the dispatcher, and compare with Σ_e p_e·f_e(x) in float64.

    Raises:
        AssertionError: on every rank, if any rank's outputs, gradients or rows are wrong.
    """
    dispatcher = build_dispatcher(variant, layout, routing)
    rank = dist.get_rank()
    chosen = routing.chosen[rank]
    bits = [[chosen_t >> e & 1 for e in range(routing.experts)] for chosen_t in chosen]
    map_TE = torch.tensor(bits, dtype=torch.bool).view(-1, routing.experts)
    generator = torch.Generator().manual_seed(routing.seed + rank)
    inputs = torch.randn(len(chosen), 1, HIDDEN, dtype=torch.float64, generator=generator)
    direction = torch.randn(inputs.shape, dtype=torch.float64, generator=generator)
    weights_TE = 0.1 + torch.rand(map_TE.shape, dtype=torch.float64, generator=generator)
    # The tag by which experts tell rows apart.
    inputs[:, 0, 0] = routing.first_token(rank) + torch.arange(len(chosen))
    inputs.requires_grad_()
    weights_TE.requires_grad_()

    # Padding for quantization changes the map in place.
    hidden, probs = dispatcher.dispatch_preprocess(inputs, map_TE.clone(), weights_TE * map_TE)
    hidden, probs = dispatcher.token_dispatch(hidden, probs)
    rows_RH, tokens_per_expert, probs_R = dispatcher.dispatch_postprocess(hidden, probs)
    expert_R = torch.tensor(dispatcher.local_expert_indices).repeat_interleave(tokens_per_expert)
    # Ranks that share an expert's matrices each compute a summand of its output.
    shard = 2.0 * (dispatcher.tp_rank + 1) / (dispatcher.tp_size * (dispatcher.tp_size + 1))
    output = shard * probs_R.unsqueeze(-1) * expert_outputs(expert_R, rows_RH)
    output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
    output = dispatcher.combine_postprocess(output)

    expected = torch.zeros_like(inputs)
    for e in range(routing.experts):
        expert_T = torch.full((len(chosen),), e)
        weight_T11 = (weights_TE[:, e] * map_TE[:, e]).view(-1, 1, 1)
        expected = expected + weight_T11 * expert_outputs(expert_T, inputs[:, 0]).unsqueeze(1)
    leaves = (inputs, weights_TE)
    problems = [
        name
        for name, got, wanted in zip(
            ("output", "gradient of inputs", "gradient of probs"),
            (output, *torch.autograd.grad((output * direction).sum(), leaves)),
            (expected, *torch.autograd.grad((expected * direction).sum(), leaves)),
            strict=True,
        )
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)
    ]
    computed = zip(rows_RH[:, 0].tolist(), expert_R.tolist(), probs_R.tolist(), strict=True)
    # Rows that only fill an expert up have no weight; those of the map have at least 0.1.
    pairs = Counter(
        (int(token), expert)
        for token, expert, prob in computed
        if prob > 0 or not variant.is_padded
    )
    if any(count > 1 for count in pairs.values()):
        problems.append("rows computed twice")

    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (problems, pairs))
    assert not any(problems for problems, _ in reports), [problems for problems, _ in reports]
    total = sum((pairs for _, pairs in reports), Counter())
    assert total == Counter(dict.fromkeys(routing.pairs(), layout.etp))


def check_layout(variant: Variant, layout: Layout) -> None:
    """Check many routings; all ranks draw the same ones, and fail together."""

    @seed(str((variant, layout)))
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(routings(layout, variant.is_even))
    def check(routing: Routing) -> None:
        try:
            check_rows(variant, layout, routing)
        except AssertionError:
            raise
        except Exception:
            # The other ranks wait in a collective that this one will not join: end the job.
            print(f"{variant}, {layout}, {routing}", flush=True)
            traceback.print_exc()
            os._exit(1)

    check()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    for layout in LAYOUTS[dist.get_world_size()]:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            distributed_timeout_minutes=1,
        )
        for variant in VARIANTS:
            check_layout(variant, layout)
        parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()
