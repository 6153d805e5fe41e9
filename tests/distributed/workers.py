"""Checks that need several ranks; ``torchrun … workers.py NAME…`` runs them on every rank."""

from __future__ import annotations

import functools
import math
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from moe_cases import (  # noqa: E402
    HIDDEN,
    assert_bit_equal,
    hidden_states,
    run,
    stock_layer,
    transformer_config,
    uar_layer,
)

from uar_megatron.config import UARConfig  # noqa: E402
from uar_megatron.errors import ConfigError, TrainingError  # noqa: E402
from uar_megatron.mcore.guard import ConsistencyGuard, check_same_section  # noqa: E402
from uar_megatron.mcore.meters import UARMeter  # noqa: E402
from uar_megatron.mcore.step import commit  # noqa: E402
from uar_megatron.mcore.tracker import RoutingTracker  # noqa: E402


def collectives() -> None:
    """What Megatron does with NCCL and gloo alone cannot: averages and uneven splits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    assert torch.equal(mean, torch.full((3,), (size - 1) / 2))

    sizes = [r + 1 for r in range(size)]
    mine = torch.full((sizes[rank], 2), float(rank))
    gathered = list(torch.empty(sum(sizes), 2).split(sizes))
    dist.all_gather(gathered, mine, group=group)
    for r, part in enumerate(gathered):
        assert torch.equal(part, torch.full((r + 1, 2), float(r)))

    parts = [torch.full((n, 2), float(rank + 1)) for n in sizes]
    reduced = torch.empty(sizes[rank], 2)
    dist.reduce_scatter(reduced, parts, group=group)
    assert torch.equal(reduced, torch.full_like(reduced, sum(range(1, size + 1))))

    # Rank r sends r rows to everybody; rank 0 sends nothing at all.
    received = torch.empty(sum(range(size)), 2)
    dist.all_to_all_single(
        received,
        torch.full((rank * size, 2), float(rank)),
        torch.arange(size),
        torch.full((size,), rank),
        group=group,
    )
    assert received[:, 0].tolist() == [float(r) for r in range(size) for _ in range(r)]


def statistics() -> None:
    """Half of the batch on each of two ranks commits what one rank with all of it would."""
    uar = {"policy": "uar", "bias": {"enabled": True}, "budget": {"alpha": 1.0, "k_max": 4}}
    config = transformer_config()
    layer = uar_layer(config, uar, like=stock_layer(config))
    halves = hidden_states(40, seed=11).split(20)
    for _ in range(3):
        layer.router(halves[dist.get_rank()])
        commit([layer.router])
    logits = torch.cat(halves).view(-1, HIDDEN).double() @ layer.router.weight.detach().double().T
    energy = -torch.logsumexp(logits, dim=-1)
    stats = layer.router.uar_statistics
    torch.testing.assert_close(stats.mean, energy.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.var, energy.var(unbiased=False), rtol=1e-5, atol=1e-9)
    for value in (stats.mean, layer.router.uar_bias.value):
        everybody = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, value.contiguous())
        assert all(torch.equal(other, value) for other in everybody)


def communication() -> None:
    """What a step adds to Megatron's communication: one all-reduce of few numbers."""
    experts, reduced = 8, []
    original = dist.all_reduce

    def recording(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        reduced.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recording
    for mode in ("free", "mean", "exact"):
        for bias in (False, True):
            config = transformer_config()
            uar = {"policy": "uar", "budget": {"mode": mode}, "bias": {"enabled": bias}}
            routers = [uar_layer(config, uar, like=stock_layer(config)).router for _ in range(3)]
            reduced.clear()
            commit(routers)
            # β of mode mean needs Σk as well, which weighted loads do not tell.
            assert reduced == [3 * (4 + experts * bias + (mode == "mean"))]
            assert (bias and mode == "mean") or reduced[0] <= 3 * (experts + 4)
            losses = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}
            config = transformer_config(**losses, moe_aux_loss_coeff=[0.01, 0.01])
            stock = stock_layer(config)
            ours = uar_layer(config, {**uar, "clb": {"enabled": True}}, like=stock)
            counts = []
            for layer in (stock, ours):
                reduced.clear()
                layer(hidden_states(20))[0].sum().backward()
                counts.append(len(reduced))
            assert counts[0] == counts[1], "no collective of ours in the forward"
    dist.all_reduce = original


def disagreement() -> None:
    """One bit of one rank's state stops every rank, with the tensor, the ranks and the values."""
    uar = {"policy": "uar", "bias": {"enabled": True}, "budget": {"mode": "mean"}}
    config = transformer_config()
    layer = uar_layer(config, uar, like=stock_layer(config))
    router = layer.router
    rank = dist.get_rank()

    def outcome(steps: int, interval: int = 2, routers: list | None = None) -> str:
        guard = ConsistencyGuard(interval)
        try:
            for step in range(1, steps + 1):
                guard.on_step(
                    [router] if routers is None else routers, functools.partial(int, step)
                )
        except TrainingError as error:
            return str(error)
        return ""

    assert outcome(5) == ""
    state = {
        "weight": router.weight.data,
        "uar_bias.value": router.uar_bias.value,
        "uar_statistics.var": router.uar_statistics.var,
        "uar_policy.beta": router.uar_policy.beta,
        "uar_step": router.uar_step,
    }
    for name, tensor in state.items():
        kept = tensor.clone()
        flat = tensor.view(-1)
        if rank == 1:
            flat[-1] = (
                flat[-1] + 1 if name == "uar_step" else torch.nextafter(flat[-1], flat[-1] + 1)
            )
        message = outcome(1)
        assert f"step 1: ranks do not agree on {name}[{len(flat) - 1}] of layer 1" in message, (
            message
        )
        assert "on rank 0; " in message
        assert "1 of 8 tensors differ" in message
        assert outcome(1, interval=0) == ""
        tensor.copy_(kept)
    # Entries that change places have the same sum, and must not have the same checksum.
    router.uar_bias.value.copy_(torch.arange(8.0).roll(rank))
    assert "uar_bias.value" in outcome(1)
    # Nor does a bias with its signs turned round: 1 - 3 - 5 + 7 + … = 0 would hide it.
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    router.uar_bias.value.copy_(torch.arange(1.0, 9.0) * signs * (-1) ** rank)
    assert "uar_bias.value" in outcome(1)
    # In the configuration null on one rank can be a schedule, with fields of its own, on another.
    schedule = {"shape": "ascending", "low": 1, "high": 3}
    for lone in (0, 1):
        target = schedule if rank == lone else None
        section = {"policy": "uar", "budget": {"mode": "mean", "target_mean_k": target}}
        with pytest.raises(ConfigError, match=r"uar\.budget\.target_mean_k\S*: differs"):
            check_same_section(UARConfig.model_validate(section))
    # A pipeline stage without routers takes part.
    alone = [dist.new_group([r]) for r in range(2)]
    router.tp_dp_cp_group = alone[rank]
    assert outcome(1, routers=[router] if rank else []) == ""


def expert_parallel_parity() -> None:
    """With UAR off a layer spread over two ranks equals the installed Megatron's, bit for bit."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1, ep_rank=dist.get_rank())
    for dispatcher in ("alltoall", "allgather"):
        config = transformer_config(
            expert_model_parallel_size=2, moe_token_dispatcher_type=dispatcher
        )
        stock = stock_layer(config)
        for uar in (
            {"policy": "topk"},
            {"policy": "uar", "budget": {"alpha": 0.0, "beta": 2.0, "k_max": 6}},
        ):
            ours = uar_layer(config, uar, like=stock)
            inputs = hidden_states(31, seed=dist.get_rank())
            assert_bit_equal(run(ours, inputs), run(stock, inputs))


def expert_parallel_rows() -> None:
    """Exactly Σk rows are computed over all ranks, and one reduction gathers the run log."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1, ep_rank=dist.get_rank())
    uar = {"policy": "uar", "budget": {"alpha": 2.0, "beta": 2.0, "k_min": 0, "k_max": 5}}
    # Megatron's all-gather takes the same number of tokens from every rank.
    for dispatcher, tokens in {"alltoall": (20, 31), "allgather": (25, 25)}.items():
        config = transformer_config(
            expert_model_parallel_size=2, moe_token_dispatcher_type=dispatcher
        )
        layer = uar_layer(config, uar, like=stock_layer(config))
        with torch.no_grad():
            layer.router.weight.mul_(20)
        records: list[dict] = []
        tracker = RoutingTracker(
            [UARMeter(layer.router)],
            2,
            8,
            policy_values=(),
            log_interval=3,
            tokens_per_step=functools.partial(sum, tokens),
            emit=records.append,
        )
        reductions = count_all_reduces(layer, tracker, tokens[dist.get_rank()])
        assert reductions == [1, 1, 2], reductions  # statistics each step, the log at the third
        (metrics,) = records[0]["layers"]
        assert metrics["tokens"] == 3 * sum(tokens)
        assert math.isclose(metrics["rows"], metrics["k_eff"] * sum(tokens))
        assert len({round(x, 9) for x in metrics["k_histogram"]}) > 2


def kernels() -> None:
    """Rows exchanged by the kernels are those of plain torch; they wait where Megatron does."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1, ep_rank=dist.get_rank())
    budgets = {
        "free": {"alpha": 2.0, "beta": 2.0, "k_min": 0, "k_max": 5},
        "exact": {"mode": "exact", "alpha": 2.0, "k_max": 5},
        "nothing": {"alpha": 0.0, "beta": 0.0, "k_min": 0, "k_max": 5},
    }
    points = {}
    for name, budget in budgets.items():
        for tokens in ((20, 31), (1, 12)):
            config = transformer_config(expert_model_parallel_size=2, moe_z_loss_coeff=0.1)
            found = []
            for backend in ("torch", "triton"):
                uar = {"policy": "uar", "budget": budget, "kernel_backend": backend}
                layer = uar_layer(config, uar, like=stock_layer(config))
                with torch.no_grad():
                    layer.router.weight.mul_(20)
                layer(hidden_states(24, seed=9))
                commit([layer.router])
                found.append(run(layer, hidden_states(tokens[dist.get_rank()], seed=3)))
                points[name, backend] = layer.token_dispatcher.cuda_sync_point
            expected, ours = found
            assert set(ours) == set(expected)
            for key in set(ours) - {"probs", "routing_map"}:  # these are compact
                torch.testing.assert_close(ours[key], expected[key], rtol=2e-5, atol=2e-6)
    assert points["free", "torch"] == "before_permutation_1"
    assert points["free", "triton"] == "before_ep_alltoall"
    assert points["exact", "triton"] == points["exact", "torch"] == "before_ep_alltoall"


def count_all_reduces(layer: torch.nn.Module, tracker: RoutingTracker, tokens: int) -> list[int]:
    """Take three steps with this rank's number of tokens; all-reduces of each step."""
    counts = []
    original = dist.all_reduce

    def counting(*args: object, **kwargs: object) -> object:
        counts[-1] += 1
        return original(*args, **kwargs)

    for step in range(1, 4):
        inputs = hidden_states(tokens, seed=step)
        layer(inputs)[0].sum().backward()
        counts.append(0)
        dist.all_reduce = counting
        commit([layer.router])
        tracker.on_step(
            {
                "iteration": step,
                "loss_dict": {},
                "skipped_iter": 0,
                "grad_norm": 1.0,
                "learning_rate": 0.1,
                "is_first_iteration": False,
            },
            seconds=lambda step=step: 0.1 * step,
        )
        dist.all_reduce = original
    return counts


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for check in sys.argv[1:]:
        globals()[check]()
    dist.barrier()
    dist.destroy_process_group()
