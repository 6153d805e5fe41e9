"""What the flex dispatcher's backends are told, and what is refused before a model is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flex_stand_in
import pytest
import torch
from moe_cases import hidden_states, run, stock_layer, transformer_config, uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, UnsupportedEnvironmentError
from uar_megatron.mcore.compatibility import check_compatible
from uar_megatron.mcore.flex_dispatcher import (
    SlotBounds,
    UARFlexTokenDispatcher,
    VariableKNCCLEPManager,
    expert_slots,
    slot_bounds,
)
from uar_megatron.mcore.spec import uar_layer_spec

ON, OFF = True, False


def test_table_follows_the_map_not_the_weights() -> None:
    routing_map = torch.tensor([[OFF, ON, ON, OFF], [OFF, OFF, OFF, OFF], [ON, ON, OFF, ON]])
    # An unrouted weight larger than the routed ones, and a routed weight of 0.
    probs = torch.tensor([[0.9, 0.1, 0.4, 0.0], [0.5, 0.5, 0.0, 0.0], [0.2, 0.0, 0.7, 0.3]])
    probs.requires_grad_()
    weights, index = expert_slots(routing_map, probs, 3)
    assert index.dtype == torch.int64
    assert index.tolist() == [[2, 1, -1], [-1, -1, -1], [3, 0, 1]]
    torch.testing.assert_close(
        weights.detach(), torch.tensor([[0.4, 0.1, 0.0], [0.0, 0.0, 0.0], [0.3, 0.2, 0.0]])
    )
    flex_stand_in.check_table(index, weights, experts=4)
    # A library may leave anything in the gradient of a slot without an expert.
    weights.backward(torch.full((3, 3), torch.nan).masked_fill(index >= 0, 1.0))
    torch.testing.assert_close(probs.grad, routing_map.float())


def test_table_of_a_fixed_k_is_stocks() -> None:
    probs = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.topk(probs, 4)
    routing_map = torch.zeros(50, 16, dtype=torch.bool).scatter(1, expected.indices, True)
    weights, index = expert_slots(routing_map, probs * routing_map, 4)
    assert torch.equal(index, expected.indices)
    assert torch.equal(weights, expected.values)


def test_ranks_that_share_an_expert_all_get_the_token() -> None:
    dispatcher = object.__new__(UARFlexTokenDispatcher)
    dispatcher.num_local_experts = 2
    dispatcher.tp_group = dispatcher.ep_group = SimpleNamespace(size=lambda: 2)
    dispatcher.tp_size = dispatcher.ep_size = 2
    routing_map = torch.tensor([[OFF, ON, ON, OFF], [OFF, OFF, OFF, OFF]])
    probs = torch.tensor([[0.0, 0.75, 0.25, 0.0], [0.0] * 4])
    folded_map, folded_probs = dispatcher._initialize_metadata(routing_map, probs)
    weights, index = expert_slots(folded_map.flatten(1), folded_probs.flatten(1), 6)
    # Experts 1 and 2 of 4 on ranks (ep, tp) = (0, 0), (0, 1) and (1, 0), (1, 1).
    assert index[0].sort().values.tolist() == [-1, -1, 1, 3, 4, 6]
    assert weights[0].tolist() == [0.75, 0.75, 0.25, 0.25, 0.0, 0.0]
    assert index[1].tolist() == [-1] * 6


EXACT = {"mode": "exact", "k_min": 0, "k_max": 6, "target_mean_k": 2.5}


@pytest.mark.parametrize(
    ("uar", "expected"),
    [
        ({"policy": "topk"}, SlotBounds(2, 2.0)),
        ({"policy": "uar", "budget": {"k_max": 5}}, SlotBounds(5, 5.0)),
        ({"policy": "uar", "budget": {"k_max": [3, 5]}}, SlotBounds(5, 5.0)),
        ({"policy": "uar", "budget": {"k_max": 5, "max_rows_factor": 1.5}}, SlotBounds(5, 3.0)),
        ({"policy": "uar", "budget": {"k_max": 5, "max_rows_factor": 9.0}}, SlotBounds(5, 5.0)),
        ({"policy": "uar", "budget": {"alpha": 0.0, "beta": [2.0, 3.0]}}, SlotBounds(3, 3.0)),
        ({"policy": "uar", "budget": {"k_min": 0, "k_max": 1}}, SlotBounds(1, 1.0)),
        (
            {"policy": "uar", "budget": {"alpha": 0.0, "beta": 0.0, "k_min": 0}},
            SlotBounds(1, 0.0),
        ),
        (
            {
                "policy": "uar",
                "budget": {"k_min": 0, "k_max": 1},
                "expansion": {"start_step": 9},
            },
            SlotBounds(2, 2.0),
        ),
        ({"policy": "uar", "budget": EXACT}, SlotBounds(6, 2.5)),
        (
            {
                "policy": "uar",
                "budget": EXACT | {"target_mean_k": 1.5},
                "expansion": {"ramp_steps": 9},
            },
            SlotBounds(6, 2.0),
        ),
    ],
    ids=str,
)
def test_bounds_hold_for_all_layers_and_steps(uar: dict, expected: SlotBounds) -> None:
    assert slot_bounds(UARConfig.model_validate(uar), transformer_config()) == expected


@pytest.mark.parametrize(("mean", "rows"), [(5.0, 352), (2.5, 176), (0.1, 64)])
def test_receive_buffer_is_sized_from_the_routed_slots(
    mean: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the STAND-IN for Transformer Engine's NCCL EP."""
    libraries = flex_stand_in.install(monkeypatch.setattr)
    config = transformer_config(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="ncclep",
        moe_expert_rank_capacity_factor=1.1,
    )
    manager = VariableKNCCLEPManager(
        group=SimpleNamespace(size=lambda: 2),
        num_local_experts=4,
        router_topk=5,
        num_experts=8,
        config=config,
        mean=mean,
    )
    routing_map = torch.ones(50, 2, 4, dtype=torch.bool)
    manager.setup_metadata(routing_map, torch.rand(50, 2, 4))
    manager._ensure_bootstrap()
    settings = libraries.te_ep.settings
    assert settings["max_tokens_per_rank"] == 64  # 50 tokens, in chunks
    assert settings["recv_capacity_per_rank"] == rows  # 64 · 1.1 · mean, but at least 64


def flex(**changes: Any) -> SimpleNamespace:
    """Arguments as Megatron parses them, before it validates them."""
    backend = changes.get("moe_flex_dispatcher_backend", "deepep")
    budget = 2.0 if backend == "ncclep" else None
    arguments = vars(transformer_config()) | {
        "num_moe_experts": 64,
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": backend,
        "moe_expert_rank_capacity_factor": budget,
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": None,
    }
    return SimpleNamespace(**arguments | changes)


WIDE = {"policy": "uar", "budget": {"k_max": 33}}
REFUSED = [
    (WIDE, {}, "uar.budget.k_max", "33 experts; deepep", "1 … 32"),
    (WIDE, {"moe_flex_dispatcher_backend": "ncclep"}, "uar.budget.k_max", "ncclep", "1 … 32"),
    (
        WIDE,
        {"moe_enable_deepep": True, "moe_flex_dispatcher_backend": "hybridep"},
        "uar.budget.k_max",
        "deepep",
        "1 … 32",
    ),
    (
        {"policy": "uar", "budget": {"k_max": 9}},
        {"tensor_model_parallel_size": 4},
        "uar.budget.k_max",
        "9 experts × 4 ranks",
        "1 … 8",
    ),
    ({}, {"moe_router_topk": 40}, "moe_router_topk", "40 experts", "1 … 32"),
    (
        {"policy": "uar"},
        {"expert_model_parallel_size": 1},
        "expert_model_parallel_size",
        "at least two ranks",
        "2 or more",
    ),
    (
        {"policy": "uar"},
        {"moe_flex_dispatcher_backend": "ncclep", "moe_expert_rank_capacity_factor": None},
        "moe_expert_rank_capacity_factor",
        "receive buffer",
        None,
    ),
    (
        {"policy": "uar"},
        {"moe_flex_dispatcher_backend": "hybridep", "moe_expert_rank_capacity_factor": 2.0},
        "moe_expert_rank_capacity_factor",
        "HybridEP drops",
        None,
    ),
]


@pytest.mark.parametrize(("uar", "changes", "field", "why", "allowed"), REFUSED, ids=str)
def test_what_a_backend_cannot_do_is_refused_at_the_start(
    uar: dict, changes: dict, field: str, why: str, allowed: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        check_compatible(UARConfig.model_validate(uar), flex(**changes))
    assert error.value.field == field
    assert why in str(error.value)
    assert allowed is None or f"allowed: {allowed}" in str(error.value)
    assert "remedy:" in str(error.value)


@pytest.mark.parametrize(
    ("backend", "library"),
    [("deepep", "DeepEP"), ("hybridep", "HybridEP"), ("ncclep", "Transformer Engine")],
)
def test_a_missing_library_is_refused_before_a_model_is_built(backend: str, library: str) -> None:
    config = transformer_config(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend=backend,
        moe_expert_rank_capacity_factor=2.0 if backend == "ncclep" else None,
        expert_model_parallel_size=2,
    )
    build = uar_layer_spec(UARConfig.model_validate({"policy": "uar"}))
    with pytest.raises(UnsupportedEnvironmentError, match=rf"{backend}.*{library}[\s\S]*remedy:"):
        build(config)


@pytest.mark.parametrize("backend", ["deepep", "hybridep", "ncclep"])
def test_a_backend_that_is_there_is_not_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex_stand_in.install(monkeypatch.setattr)
    uar = UARConfig.model_validate({"policy": "uar", "budget": {"k_max": 32}})
    check_compatible(uar, flex(moe_flex_dispatcher_backend=backend))
    if backend == "hybridep":
        uar = UARConfig.model_validate(WIDE)
        check_compatible(uar, flex(moe_flex_dispatcher_backend=backend))


def test_one_rank(model_parallel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the STAND-IN for HybridEP, the only backend that works on one rank."""
    flex_stand_in.install(monkeypatch.setattr)
    # Before the first commit every token is of average uncertainty.
    uar = {"policy": "uar", "budget": {"alpha": 2.0, "k_min": 0, "k_max": 5}}
    plain = transformer_config()
    reference = uar_layer(plain, uar, like=stock_layer(plain))
    with torch.no_grad():
        reference.router.weight.mul_(20)
    reference(hidden_states(40, seed=1))
    reference.router.commit(reference.router.pending())
    config = transformer_config(
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep"
    )
    ours = uar_layer(config, uar, like=reference)
    expected, got = run(reference, hidden_states(40)), run(ours, hidden_states(40))
    assert len(expected["routing_map"].sum(dim=1).unique()) > 2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)
