"""With UAR on: which experts, which weights, how many rows, which loss, which gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from moe_cases import HIDDEN, hidden_states, stock_layer, transformer_config, uar_layer

from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.step import commit
from uar_megatron.metrics import _INDEX

pytestmark = pytest.mark.usefixtures("model_parallel")

AE = {"policy": "uar", "budget": {"alpha": 1.0, "beta": 2.0, "k_min": 1, "k_max": 5}}


def layer_with_statistics(uar: dict[str, Any], **options: Any) -> UARMoELayer:
    """A layer that has seen one step, so that tokens differ in k."""
    config = transformer_config(**options)
    layer = uar_layer(config, uar, like=stock_layer(config))
    with torch.no_grad():
        layer.router.weight.mul_(20)
    layer(hidden_states(64, seed=9))
    commit([layer.router])
    layer.router.metrics.clear()
    return layer


def reference_output(layer: UARMoELayer, inputs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Σ_e p_e·expert_e(x), token by token."""
    flat = inputs.view(-1, HIDDEN)
    rows = []
    for token, weights in zip(flat, probs, strict=True):
        total = torch.zeros(HIDDEN)
        for e in weights.nonzero().flatten().tolist():
            out, _ = layer.experts.local_experts[e](token[None], torch.ones(1))
            total = total + weights[e] * out[0]
        rows.append(total)
    return torch.stack(rows).view_as(inputs)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("k_min", [0, 1])
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_every_slot_is_computed_once_with_its_own_weight(
    dispatcher: str, k_min: int, pre_softmax: bool
) -> None:
    uar = {**AE, "budget": {**AE["budget"], "k_min": k_min, "alpha": 2.0}}
    layer = layer_with_statistics(
        uar,
        moe_token_dispatcher_type=dispatcher,
        moe_router_pre_softmax=pre_softmax,
        moe_aux_loss_coeff=0.0,
    )
    with torch.no_grad():
        for expert in layer.experts.parameters():
            expert.mul_(20)
    inputs = hidden_states(37, seed=1)
    probs, routing_map = layer.router(inputs)
    layer.router.metrics.clear()
    output, _ = layer(inputs)
    expected = reference_output(layer, inputs, probs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for wanted in (inputs, layer.router.weight):
        (ours,) = torch.autograd.grad(output.square().sum(), wanted, retain_graph=True)
        (reference,) = torch.autograd.grad(expected.square().sum(), wanted, retain_graph=True)
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)
    metrics = layer.router.metrics.flat(5)
    assert metrics[_INDEX["rows"]] == routing_map.sum() == metrics[_INDEX["k"]]
    assert len(set(routing_map.sum(dim=1).tolist())) > 2


@pytest.mark.parametrize("uncertainty", ["energy", "entropy"])
def test_k_follows_equation_5(uncertainty: str) -> None:
    layer = layer_with_statistics({**AE, "uncertainty": uncertainty})
    inputs = hidden_states(50, seed=2)
    _, routing_map = layer.router(inputs)
    logits = (inputs.view(-1, HIDDEN) @ layer.router.weight.T).detach().double().numpy()
    partition = np.log(np.exp(logits).sum(axis=1))
    probs = np.exp(logits - partition[:, None])
    u = -partition if uncertainty == "energy" else -(probs * np.log(probs)).sum(axis=1)
    statistics = layer.router.uar_statistics
    z = (u - float(statistics.mean)) / float(statistics.var) ** 0.5
    exact = z + 2.0
    expected = np.clip(np.floor(exact), 1, 5)
    borderline = np.abs(exact - np.round(exact)) < 1e-4
    got = routing_map.sum(dim=1).numpy()
    assert (got == expected)[~borderline].all()
    best = np.argsort(-logits, axis=1, kind="stable")
    for row, order, k in zip(routing_map.numpy(), best, got, strict=True):
        assert set(np.flatnonzero(row)) == set(order[:k])


@pytest.mark.parametrize(
    ("score_function", "pre_softmax"),
    [("softmax", True), ("softmax", False), ("sigmoid", False), ("sqrtsoftplus", False)],
)
def test_weights_are_megatrons_for_the_same_number_of_experts(
    score_function: str, pre_softmax: bool
) -> None:
    layer = layer_with_statistics(
        AE,
        moe_router_score_function=score_function,
        moe_router_pre_softmax=pre_softmax,
        moe_router_topk_scaling_factor=1.5,
        moe_aux_loss_coeff=0.0,
    )
    logits = torch.randn(40, 8)
    uncertainty = layer.router.uar_statistics.measure(logits)
    decision = layer.router.policy.route(logits, uncertainty, None, step=1)
    for k in range(2, 6):
        fixed, fixed_map = layer.router._fixed_topk(logits, k)
        same = decision.k_T == k
        assert torch.equal(decision.routing_map_TE[same], fixed_map[same])
        torch.testing.assert_close(decision.probs_TE[same], fixed[same])


def test_extreme_routings_run_forward_and_backward() -> None:
    for beta, k_min, expected in ((9.0, 1, 5), (-9.0, 0, 0), (-9.0, 1, 1)):
        layer = layer_with_statistics(
            {**AE, "budget": {"alpha": 0.1, "beta": beta, "k_min": k_min, "k_max": 5}}
        )
        inputs = hidden_states(7, seed=3)
        output, _ = layer(inputs)
        output.sum().backward()
        assert torch.isfinite(inputs.grad).all()
        assert layer.router.metrics.flat(5)[5] == 7 * expected
        assert torch.isfinite(layer.router.weight.grad).all()


def test_all_tokens_to_one_expert() -> None:
    layer = layer_with_statistics({**AE, "budget": {"alpha": 0.5, "beta": 1.0, "k_max": 1}})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[6] = 1.0
    inputs = hidden_states(9).abs().detach().requires_grad_()
    output, _ = layer(inputs)
    output.sum().backward()
    _, routing_map = layer.router(inputs)
    assert routing_map[:, 6].all()
    assert routing_map.sum() == 9
    idle = layer.experts.local_experts[0].linear_fc1.weight
    assert idle.grad is None or torch.count_nonzero(idle.grad) == 0


CLB = {"enabled": True, "start_step": 1, "warmup_steps": 4}


@pytest.mark.parametrize("policy", ["topk", "uar"])
@pytest.mark.parametrize("masked", [True, False])
def test_masked_loss_is_equation_6(policy: str, masked: bool) -> None:
    """Value and gradient of the loss that reaches Megatron, against autograd in float64."""
    uar = {**AE, "policy": policy, "clb": {**CLB, "start_step": 1 if masked else 99}}
    layer = layer_with_statistics(uar, moe_aux_loss_coeff=0.5)
    router = layer.router
    inputs = hidden_states(30, seed=4)
    get_moe_metrics_tracker()._metrics.clear()
    probs, routing_map = router(inputs)
    (probs * 0).sum().backward()  # only the loss's gradient is left
    logged = get_moe_metrics_tracker().metrics["load_balancing_loss"].values[0].item()

    flat = inputs.detach().view(-1, HIDDEN).double()
    weight = router.weight.detach().double().requires_grad_()
    logits = flat @ weight.T
    p = torch.softmax(logits, dim=-1)
    energy = -torch.logsumexp(logits.detach(), dim=-1)
    z = (energy - router.uar_statistics.mean) / router.uar_statistics.var.sqrt()
    # One step has been taken and the mask starts at step 1: θ is still at its start.
    omega = torch.sigmoid((z + 3.0) / 0.25) if masked else torch.ones_like(z)
    f = routing_map.sum(dim=0).double() / routing_map.sum()
    loss = (omega * 8 * (f * p).sum(dim=1)).sum() / omega.sum()
    (0.5 * loss).backward()
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=2e-4, atol=1e-7)


def test_padding_tokens_count_nowhere() -> None:
    uar = {**AE, "clb": {**CLB, "theta_start": 0.0}, "bias": {"enabled": True}}
    layer = layer_with_statistics(uar)
    inputs = hidden_states(20, seed=5)
    mask = torch.zeros(20, 1, dtype=torch.bool)
    mask[15:] = True
    get_moe_metrics_tracker()._metrics.clear()
    layer.router(inputs, mask)
    padded = get_moe_metrics_tracker().metrics["load_balancing_loss"].values.clone()
    pending = layer.router.pending().clone()
    layer.router.uar_statistics._pending.zero_()
    layer.router.uar_bias._pending.zero_()
    layer.router.uar_policy._pending.zero_()
    get_moe_metrics_tracker()._metrics.clear()
    layer.router(inputs[:15])
    torch.testing.assert_close(
        get_moe_metrics_tracker().metrics["load_balancing_loss"].values, padded
    )
    torch.testing.assert_close(layer.router.pending(), pending)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_bias_selects_but_does_not_weigh(score_function: str) -> None:
    layer = layer_with_statistics(
        {"policy": "topk", "bias": {"enabled": True}},
        moe_router_pre_softmax=score_function == "softmax",
        moe_router_score_function=score_function,
        moe_aux_loss_coeff=0.0,
    )
    layer.router.uar_bias.value.zero_()
    layer.router.uar_bias.value[5] = 10.0
    inputs = hidden_states(12, seed=6)
    probs, routing_map = layer.router(inputs)
    assert routing_map[:, 5].all()
    assert (routing_map.sum(dim=1) == 2).all()
    logits = inputs.view(-1, HIDDEN) @ layer.router.weight.T
    if score_function == "softmax":
        torch.testing.assert_close(probs[:, 5], torch.softmax(logits, dim=-1)[:, 5])
    else:
        chosen = torch.sigmoid(logits) * routing_map
        torch.testing.assert_close(probs, chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20))


def test_recomputation_and_evaluation_do_not_count() -> None:
    layer = layer_with_statistics({**AE, "bias": {"enabled": True}})
    inputs = hidden_states(10)
    before = layer.router.pending().clone()
    with torch.no_grad():
        layer(inputs)
    layer.eval()
    layer(inputs)
    assert torch.equal(layer.router.pending(), before)
    layer.train()
    layer(inputs)
    assert not torch.equal(layer.router.pending(), before)
