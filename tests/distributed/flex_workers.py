"""The flex dispatcher against alltoall and against stock, on stand-ins for its libraries.

``torchrun … flex_workers.py`` runs every case with two ranks; with four, those that the layout
matters to, with expert tensor parallelism too.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

import flex_stand_in  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from moe_cases import (  # noqa: E402
    assert_bit_equal,
    hidden_states,
    run,
    stock_layer,
    transformer_config,
    uar_layer,
)

from uar_megatron.mcore.compatibility import check_compatible  # noqa: E402
from uar_megatron.mcore.flex_dispatcher import UARFlexTokenDispatcher  # noqa: E402
from uar_megatron.mcore.step import commit  # noqa: E402

BACKENDS = ("deepep", "hybridep", "ncclep")
AE = {"alpha": 2.0, "beta": 2.0, "k_min": 0, "k_max": 5}
# name: (budget, other fields of the UAR section, Megatron's options)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "from none to K_max": (AE, {}, {}),
    "exact": (AE | {"mode": "exact"}, {}, {}),
    "all experts for all": ({"alpha": 0.0, "beta": 8.0, "k_max": 8}, {}, {}),
    "none for anybody": ({"alpha": 0.0, "beta": 0.0, "k_min": 0}, {}, {}),
    "a rank without rows": (AE, {"bias": {"enabled": True}}, {}),
    "order of the bias": (
        AE,
        {"bias": {"enabled": True}},
        {"moe_router_score_function": "sigmoid"},
    ),
    "weights underflow": (AE, {}, {"moe_router_pre_softmax": True}),
    "dropping": (AE, {}, {"moe_expert_capacity_factor": 0.8}),
}
OF_LAYOUT = ("from none to K_max", "all experts for all", "a rank without rows")


def flex_options(backend: str) -> dict[str, Any]:
    """Megatron's options for the flex dispatcher with room for every row on one rank."""
    options = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    if backend == "ncclep":
        options["moe_expert_rank_capacity_factor"] = 2.0 * dist.get_world_size()
    return options


def adjust(case: str, layer: Any) -> None:
    """Give the router of a case what it is about."""
    router = layer.router
    with torch.no_grad():
        router.weight.mul_(3000 if case == "weights underflow" else 20)
        if case == "a rank without rows":
            router.uar_bias.value[-layer.num_local_experts :] = -1e3
        if case == "order of the bias":
            router.uar_bias.value.copy_(torch.linspace(-1, 1, 8))


def like_alltoall(
    on_top: Any, case: str, backend: str, parallel: dict[str, int], kernels: str
) -> None:
    """Same output, gradients, losses and number of computed rows as alltoall in plain torch."""
    budget, section, options = CASES[case]
    uar = {"policy": "uar", "budget": budget, **section, "kernel_backend": "torch"}
    plain = transformer_config(**parallel, **options)
    reference = uar_layer(plain, uar, like=stock_layer(plain))
    adjust(case, reference)
    # Only HybridEP wants the same number of tokens everywhere.
    tokens = 25 if backend == "hybridep" else 20 + 7 * dist.get_rank()
    reference(hidden_states(tokens, seed=50 + dist.get_rank()))
    commit([reference.router])

    config = transformer_config(**parallel, **options, **flex_options(backend))
    ours = uar_layer(config, uar | {"kernel_backend": kernels}, like=reference)
    check_compatible(ours.router.uar, config)
    assert isinstance(ours.token_dispatcher, UARFlexTokenDispatcher)
    inputs = hidden_states(tokens, seed=dist.get_rank())
    counts = [count_rows(layer) for layer in (reference, ours)]
    expected, got = run(reference, inputs), run(ours, inputs)

    assert got.keys() == expected.keys()
    is_compact = got["routing_map"].dtype != torch.bool
    assert is_compact == (kernels == "triton" and backend != "hybridep")
    rounding = 1e-6 if kernels == "torch" else 5e-6
    for name, value in expected.items():
        if is_compact and name in ("probs", "routing_map"):
            continue
        if value.is_floating_point():
            atol = rounding * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
            torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=f"{case} {name}")
        else:
            assert torch.equal(got[name], value), name
    assert counts[0] == counts[1], counts
    routing_map = expected["routing_map"]
    assert (got["output"].view(tokens, -1)[~routing_map.any(dim=1)] == 0).all()
    table = {"deepep": flex_stand_in.Buffer.last_table, "ncclep": on_top.te_ep.last_table}
    if backend in table:
        folded = ours.token_dispatcher.tp_size
        assert table[backend].shape[1] == folded * ours.router.policy.max_k or budget["beta"] == 0
        assert torch.equal((table[backend] >= 0).sum(1), folded * routing_map.sum(1))
    rows = torch.tensor(sum(counts[1]))
    assert case != "a rank without rows" or dist.get_rank() < dist.get_world_size() - 1 or rows == 0
    routed = routing_map.sum() * ours.token_dispatcher.tp_size
    for total in (rows, routed):
        dist.all_reduce(total)
    assert rows == routed
    if case == "from none to K_max":
        ks = routing_map.sum(dim=1).unique()
        assert len(ks) > 2
    if case == "weights underflow":
        assert (expected["probs"][routing_map] == 0).any()


def count_rows(layer: Any) -> list[int]:
    """Return a list that gets the number of rows of each call of the experts."""
    rows: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def like_stock(backend: str, parallel: dict[str, int]) -> None:
    """At a fixed k the table of any k is stock's: same bits as Megatron's own managers."""
    options = flex_options(backend) | {"moe_router_load_balancing_type": "none"}
    stock = stock_layer(transformer_config(**parallel, **options, moe_router_topk=3))
    config = transformer_config(**parallel, **options)
    uar = {"policy": "uar", "budget": {"alpha": 0.0, "beta": 3.0, "k_max": 3}}
    ours = uar_layer(config, uar, like=stock)
    assert isinstance(ours.token_dispatcher, UARFlexTokenDispatcher)
    assert not isinstance(stock.token_dispatcher, UARFlexTokenDispatcher)
    inputs = hidden_states(25, seed=dist.get_rank())
    assert_bit_equal(run(ours, inputs), run(stock, inputs))


def uneven_tokens(on_top: Any, parallel: dict[str, int]) -> None:
    """HybridEP's own padding sends tokens without experts, among ours."""
    config = transformer_config(
        **parallel, **flex_options("hybridep"), moe_hybridep_pad_uneven_dispatch_inputs=True
    )
    plain = transformer_config(**parallel)
    uar = {"policy": "uar", "budget": AE}
    reference = uar_layer(plain, uar, like=stock_layer(plain))
    adjust("", reference)
    inputs = hidden_states(20 + 7 * dist.get_rank(), seed=dist.get_rank())
    reference(inputs)
    commit([reference.router])
    ours = uar_layer(config, uar, like=reference)
    expected, got = run(reference, inputs), run(ours, inputs)
    torch.testing.assert_close(got["output"], expected["output"], rtol=0, atol=1e-6)
    torch.testing.assert_close(got["grad.input"], expected["grad.input"], rtol=1e-6, atol=1e-6)


def start(expert_tensor_size: int) -> dict[str, int]:
    """Set up process groups: experts over all ranks; return the options that say so."""
    parallel_state.destroy_model_parallel()
    parallel = {
        "expert_model_parallel_size": dist.get_world_size() // expert_tensor_size,
        "expert_tensor_parallel_size": expert_tensor_size,
    }
    parallel_state.initialize_model_parallel(**parallel)
    model_parallel_cuda_manual_seed(
        1,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
    )
    return parallel


def forget(on_top: Any) -> None:
    """What a library keeps for the life of a process."""
    on_top._buffer = on_top._hybrid_ep_buffer = None
    on_top.te_ep.ep_finalize()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    libraries = flex_stand_in.install()
    is_small = dist.get_world_size() == 2
    for size in (1,) if is_small else (1, 2):
        layout = start(size)
        for name in BACKENDS:
            for case in CASES if is_small else OF_LAYOUT:
                like_alltoall(libraries, case, name, layout, "torch")
                forget(libraries)
            for case in OF_LAYOUT:
                like_alltoall(libraries, case, name, layout, "triton")
                forget(libraries)
            like_stock(name, layout)
            forget(libraries)
        uneven_tokens(libraries, layout)
        forget(libraries)
    dist.barrier()
    dist.destroy_process_group()
