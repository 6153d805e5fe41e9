"""Layers in extreme or context-parallel conditions; ``torchrun … extreme_workers.py NAME``."""

from __future__ import annotations

import itertools
import sys
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
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
from uar_megatron.mcore.compat import get_default_pg_collection  # noqa: E402
from uar_megatron.mcore.experts import TorchGroupedMLP  # noqa: E402
from uar_megatron.mcore.moe_layer import UARMoELayer  # noqa: E402
from uar_megatron.mcore.router import UARRouter  # noqa: E402
from uar_megatron.mcore.step import commit  # noqa: E402

EXPERTS = 8
STEPS = 3  # the first teaches Megatron's DDP what to wait for, the second waits for it
LOSS_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


class Extreme(NamedTuple):
    """A budget, and the experts that a bias makes every token choose first."""

    beta: float
    k_max: int
    preferred: tuple[int, ...] = ()


EXTREMES = {
    "tokens differ in k": Extreme(beta=2.0, k_max=4),
    "nobody gets an expert": Extreme(beta=-99.0, k_max=4),
    "everybody gets K_max": Extreme(beta=99.0, k_max=4),
    "everybody gets all experts": Extreme(beta=99.0, k_max=EXPERTS),
    "one expert gets everybody": Extreme(beta=99.0, k_max=1, preferred=(6,)),
    "one rank gets everybody": Extreme(beta=2.0, k_max=4, preferred=(0, 1, 2, 3)),
    "an expert gets nobody": Extreme(beta=2.0, k_max=4, preferred=(0, 1, 2, 3, 4, 6, 7)),
}
# Megatron's router has no place for a rank without tokens; its dispatchers do (test_rows.py).
TOKENS = {"even": (24, 24, 24, 24), "uneven": (17, 1, 31, 5)}


def start(**sizes: int) -> None:
    """Set up Megatron's process groups anew; whoever waits in vain fails after a minute."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes, distributed_timeout_minutes=1)
    model_parallel_cuda_manual_seed(1, ep_rank=parallel_state.get_expert_model_parallel_rank())


def build_layer(extreme: Extreme, **options: Any) -> UARMoELayer:
    """A layer over two expert-parallel ranks, with statistics, whose experts all differ."""
    config = transformer_config(
        num_moe_experts=EXPERTS, expert_model_parallel_size=2, moe_aux_loss_coeff=0.1, **options
    )
    budget = {"alpha": 1.0, "beta": extreme.beta, "k_min": 0, "k_max": extreme.k_max}
    uar = {"policy": "uar", "bias": {"enabled": True}, "budget": budget}
    layer = uar_layer(config, uar, like=stock_layer(config))
    with torch.no_grad():
        layer.router.weight.mul_(20)
        for e, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            for parameter in expert.parameters():
                parameter.mul_(20 + e)
    layer.router(hidden_states(64, seed=9))
    commit([layer.router])
    layer.router.uar_bias.value.zero_()
    layer.router.uar_bias.value[list(extreme.preferred)] = 10.0
    return layer


def all_experts(layer: UARMoELayer, linear: str) -> torch.Tensor:
    """``[experts, out, in]`` of all expert-parallel ranks, as a leaf of its own."""
    weights = [getattr(e, linear).weight.detach() for e in layer.experts.local_experts]
    gathered = [torch.empty_like(torch.stack(weights)) for _ in range(2)]
    dist.all_gather(gathered, torch.stack(weights), group=layer.ep_group)
    return torch.cat(gathered).requires_grad_()


def check_extreme(layer: UARMoELayer, tokens: int, pads: bool) -> torch.Tensor:
    """Take steps under Megatron's DDP, which waits for a gradient of every parameter.

    Outputs and all gradients are compared with Σ_e p_e·expert_e(x) over all experts; those of an
    expert without rows have to be zeros, not None.

    Returns:
        The rows of each expert, of all ranks.
    """
    ddp = DistributedDataParallel(
        layer.config, DistributedDataParallelConfig(overlap_grad_reduce=True), layer
    )
    for step in range(STEPS):
        inputs = hidden_states(tokens, seed=10 * step + dist.get_rank())
        mask = torch.arange(tokens).unsqueeze(0) % 3 == 2 if pads else None
        ddp.zero_grad_buffer()
        output, _ = ddp(inputs, padding_mask=mask)
        output.square().sum().backward()
        ddp.finish_grad_sync()
        for bucket_group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            assert bucket_group.per_param_grad_ready_counts.keys() == bucket_group.params

        probs, routing_map = layer.router(inputs, None if mask is None else mask.T)
        fc1, fc2 = (all_experts(layer, name) for name in ("linear_fc1", "linear_fc2"))
        hidden_TEF = torch.einsum("th,efh->tef", inputs.view(-1, HIDDEN), fc1)
        gate, linear = hidden_TEF.chunk(2, dim=-1)
        hidden_TEF = torch.nn.functional.silu(gate) * linear * probs.unsqueeze(-1)
        expected = torch.einsum("tef,ehf->th", hidden_TEF, fc2).view_as(inputs)
        wanted = torch.autograd.grad(
            expected.square().sum(), (inputs, layer.router.weight, fc1, fc2)
        )
        close = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(output, expected, **close)
        torch.testing.assert_close(inputs.grad, wanted[0], **close)
        for gradient in wanted[1:]:
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG)
        torch.testing.assert_close(layer.router.weight.main_grad, wanted[1], **close)
        for e, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            torch.testing.assert_close(expert.linear_fc1.weight.main_grad, wanted[2][e], **close)
            torch.testing.assert_close(expert.linear_fc2.weight.main_grad, wanted[3][e], **close)
    slots_E = routing_map.sum(dim=0)
    dist.all_reduce(slots_E)
    return slots_E


def extremes() -> None:
    """Every extreme, with equal and with different numbers of tokens on the ranks."""
    start(expert_model_parallel_size=2)
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, counts, grouped, dispatcher in itertools.product(
        EXTREMES, TOKENS, (False, True), ("alltoall", "allgather")
    ):
        if (dispatcher, counts) == ("allgather", "uneven"):
            continue  # Megatron's all-gather takes the same number of tokens from every rank
        layer = build_layer(
            EXTREMES[name], moe_grouped_gemm=grouped, moe_token_dispatcher_type=dispatcher
        )
        assert isinstance(layer.experts, TorchGroupedMLP) == grouped
        slots = check_extreme(layer, TOKENS[counts][rank], pads=grouped).tolist()
        total, tokens = sum(slots), sum(TOKENS[counts][:world])
        match name:
            case "nobody gets an expert":
                assert total == 0
            case "everybody gets K_max":
                assert total == 4 * tokens
            case "everybody gets all experts":
                assert slots == [tokens] * EXPERTS
            case "one expert gets everybody":
                assert slots == [0] * 6 + [tokens, 0]
            case "one rank gets everybody":
                assert total > 0 == sum(slots[4:])
            case "an expert gets nobody":
                assert total > 0 == slots[5]
            case _:
                assert 0 < total < 4 * tokens


def context_parity() -> None:
    """With UAR off a context-parallel layer equals the installed Megatron's, bit for bit."""
    start(context_parallel_size=2)
    for loss_type, per_token in itertools.product(LOSS_TYPES, (False, True)):
        config = transformer_config(
            context_parallel_size=2,
            moe_router_load_balancing_type=loss_type,
            moe_aux_loss_coeff=0.3,
            moe_router_pre_softmax=True,
            calculate_per_token_loss=per_token,
        )
        stock = stock_layer(config)
        inputs = hidden_states(24, seed=dist.get_rank(), batch=2)
        expected = run(stock, inputs)
        for uar in (
            {"policy": "topk"},
            {"policy": "uar", "budget": {"alpha": 0.0, "beta": 2.0, "k_max": 6}},
        ):
            assert_bit_equal(run(uar_layer(config, uar, like=stock), inputs), expected)
        # The same losses by our own code, which other weights of the experts switch on.
        ours = uar_layer(config, {"weights": "renormalised"}, like=stock)
        # The ranks differ in padding, sequences do not: Megatron takes their mean length for each.
        padding = (torch.arange(12) % (2 + dist.get_rank()) == 0).unsqueeze(1).expand(12, 2)
        for mask in (None, padding):
            gradients = []
            for router in (ours.router, stock.router):
                router.zero_grad()
                if loss_type == "global_aux_loss":
                    router.reset_global_aux_loss_tracker()
                (router(inputs, mask)[0] * 0).sum().backward()
                gradients.append(router.weight.grad)
            # With padding Megatron multiplies by the sum of the ranks' tokens, not their mean.
            megatrons = 2 if per_token and mask is not None else 1
            torch.testing.assert_close(megatrons * gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def context() -> None:
    """A sequence cut in two is routed, balanced and counted as the whole one on one rank."""
    start(context_parallel_size=2)
    # Only the order of creation has to be the same on both ranks.
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    solo = ProcessGroupCollection(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone)
    for mode, pads, per_token in itertools.product(
        ("moving", "batch"), (False, True), (False, True)
    ):
        uar = UARConfig.model_validate(
            {
                "policy": "uar",
                "budget": {"mode": "mean", "k_min": 0},
                "statistics": {"mode": mode},
                "clb": {"enabled": True, "start_step": 1, "warmup_steps": 4, "theta_start": 0.0},
                "bias": {"enabled": True, "rate": 0.01, "update": "proportional"},
            }
        )
        options = {
            "moe_router_load_balancing_type": list(LOSS_TYPES),
            "moe_aux_loss_coeff": [0.5, 0.3, 0.2],
            "calculate_per_token_loss": per_token,
        }
        torch.manual_seed(5)
        whole = UARRouter(transformer_config(**options), pg_collection=solo, uar=uar)
        config = transformer_config(context_parallel_size=2, **options)
        half = UARRouter(config, pg_collection=get_default_pg_collection(), uar=uar)
        with torch.no_grad():
            whole.weight.mul_(20)
        half.load_state_dict(whole.state_dict())
        for router in (whole, half):
            router.set_layer_number(1)
            router.reset_global_aux_loss_tracker()
        for step in range(3):
            compare_halves(whole, half, hidden_states(48, seed=step, batch=3), pads)


def compare_halves(whole: UARRouter, half: UARRouter, inputs: torch.Tensor, pads: bool) -> None:
    """Take one step of a router with the whole sequence and of one with this rank's half of it."""
    rank = dist.get_rank()
    mask = torch.rand(inputs.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.3
    mask[11:] = True  # most of it on the second rank
    results = []
    for router, part in ((whole, slice(None)), (half, slice(8 * rank, 8 * rank + 8))):
        get_moe_metrics_tracker()._metrics.clear()
        router.zero_grad()
        probs, routing_map = router(inputs[part], mask[part] if pads else None)
        (probs * 0).sum().backward()  # only the losses' gradient is left
        logged = get_moe_metrics_tracker().metrics
        assert len(logged) == len(LOSS_TYPES)
        losses = torch.stack([logged[name].values[0] for name in sorted(logged)])
        results.append((router.weight.grad, losses, routing_map, probs))
    (grad, losses, routing_map, probs), (half_grad, half_losses, half_map, half_probs) = results
    dist.all_reduce(half_grad)
    dist.all_reduce(half_losses)
    torch.testing.assert_close(half_grad, grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item())
    torch.testing.assert_close(half_losses, losses, rtol=1e-5, atol=0.0)
    mine = slice(24 * rank, 24 * rank + 24)
    assert torch.equal(half_map, routing_map[mine])
    torch.testing.assert_close(half_probs, probs[mine], rtol=1e-5, atol=1e-7)
    for router in (whole, half):
        commit([router])
    for (name, got), (_, wanted) in zip(half._state_buffers(), whole._state_buffers(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9, msg=name)


def context_and_expert_parallel() -> None:
    """A layer whose experts are spread over the ranks that share a sequence."""
    start(context_parallel_size=2, expert_model_parallel_size=2)
    layer = build_layer(EXTREMES["tokens differ in k"], context_parallel_size=2)
    slots = check_extreme(layer, 24, pads=False)
    assert 0 < slots.sum() < 4 * 48


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    for name in sys.argv[1:]:
        globals()[name]()
    dist.barrier()
    dist.destroy_process_group()
