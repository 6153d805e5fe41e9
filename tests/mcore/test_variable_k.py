"""With UAR on: which experts, which weights, how many rows, which loss, which gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from moe_cases import HIDDEN, hidden_states, stock_layer, transformer_config, uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.mcore.experts import TorchGroupedMLP
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.spec import with_uar_routers
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
    assert metrics[_INDEX["rows"]] == routing_map.sum() == layer.router.metrics._step_slots_E.sum()
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
    decision = layer.router.policy.route(logits, uncertainty, None, step=1, batch_size=1)
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
        assert layer.router.metrics._step_slots_E.sum() == 7 * expected
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
# Policies that leave balancing to auxiliary losses; top_p without a loss of its own.
BALANCED = ("topk", "uar", "top_p", "seq_topk")
NO_ENTROPY = {"top_p": {"p": 0.7, "entropy_coeff": 0.0}}


@pytest.mark.parametrize("policy", BALANCED)
@pytest.mark.parametrize("masked", [True, False])
def test_masked_loss_is_equation_6(policy: str, masked: bool) -> None:
    """Value and gradient of the loss that reaches Megatron, against autograd in float64."""
    uar = {**AE, **NO_ENTROPY, "policy": policy, "clb": {**CLB, "start_step": 1 if masked else 99}}
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


SEQUENCES, BATCH = 10, 3
LOSS_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def losses_by_hand(layer: UARMoELayer, batches: list[torch.Tensor], masked: bool) -> torch.Tensor:
    """Sum of coeff · loss over loss types and micro-batches, float64, with gradient to ``weight``.

    One rank, so groups do not matter; ``global_aux_loss`` has the loads of all batches so far.
    """
    router = layer.router
    weight = router.weight.detach().double().requires_grad_()
    seen = torch.zeros(8, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logits = batch.detach().double() @ weight.T  # [s, b, E]
        p = torch.softmax(logits, dim=-1)
        energy = -torch.logsumexp(logits.detach(), dim=-1)
        z = (energy - router.uar_statistics.mean) / router.uar_statistics.var.sqrt()
        omega = torch.sigmoid((z + 3.0) / 0.25) if masked else torch.ones_like(z)
        with torch.no_grad():
            _, routing_map = router.eval()(batch)
            router.train()
        slots = routing_map.view(*z.shape, 8).double()
        seen += slots.sum(dim=(0, 1))
        shares = {
            "aux_loss": slots.sum(dim=(0, 1)).expand(z.shape[1], 8) / slots.sum(),
            "seq_aux_loss": slots.sum(dim=0) / slots.sum(dim=(0, 2)).unsqueeze(-1),
            "global_aux_loss": seen.expand(z.shape[1], 8) / seen.sum(),
        }
        for name, coeff in zip(LOSS_TYPES, (0.5, 0.3, 0.2), strict=True):
            token_losses = 8 * (shares[name] * p).sum(dim=-1)  # [s, b]
            if name == "seq_aux_loss":
                loss = ((omega * token_losses).sum(dim=0) / omega.sum(dim=0)).mean()
            else:
                loss = (omega * token_losses).sum() / omega.sum()
            total = total + coeff * loss
    total.backward()
    return weight.grad


@pytest.mark.parametrize("policy", BALANCED)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_all_losses_at_once(policy: str, masked: bool, per_token: bool) -> None:
    """Gradients of two micro-batches against autograd in float64; Megatron's scales apply."""
    uar = {**AE, **NO_ENTROPY, "policy": policy, "clb": {**CLB, "start_step": 1 if masked else 99}}
    layer = layer_with_statistics(
        uar,
        moe_router_load_balancing_type=list(LOSS_TYPES),
        moe_aux_loss_coeff=[0.5, 0.3, 0.2],
        calculate_per_token_loss=per_token,
    )
    layer.router.reset_global_aux_loss_tracker()
    batches = [hidden_states(SEQUENCES * BATCH, seed=s, batch=BATCH) for s in (4, 5)]
    for batch in batches:
        probs, _ = layer.router(batch)
        (probs * 0).sum().backward()  # only the losses' gradient is left
    expected = losses_by_hand(layer, batches, masked)
    # Megatron multiplies by the tokens, which its per-token averaging divides out again.
    scale = SEQUENCES * BATCH if per_token else 1
    torch.testing.assert_close(
        layer.router.weight.grad.double(), scale * expected, rtol=5e-4, atol=1e-6 * scale
    )


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_without_a_mask_and_with_one_k_the_losses_are_megatrons(loss: str) -> None:
    """Through our own code, which the weights of `renormalised` over pre-softmax switch on."""
    options = {
        "moe_router_load_balancing_type": loss,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": 0.3,
    }
    config = transformer_config(**options)
    stock = stock_layer(config)
    layer = uar_layer(config, {"weights": "renormalised"}, like=stock)
    gradients = []
    for router in (layer.router, stock.router):
        for seed in (1, 2):
            probs, _ = router(hidden_states(30, seed=seed, batch=3))
            (probs * 0).sum().backward()
        gradients.append(router.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("pre_softmax", [True, False])
def test_groups_are_megatrons_and_do_not_depend_on_k(pre_softmax: bool) -> None:
    groups = {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_pre_softmax": pre_softmax,
    }
    uar = {**AE, "budget": {"alpha": 1.0, "beta": 2.0, "k_min": 0, "k_max": 4}}
    layer = layer_with_statistics(uar, **groups)
    inputs = hidden_states(60, seed=3)
    _, routing_map = layer.router(inputs)
    stock = stock_layer(transformer_config(**groups))
    stock.router.weight.data.copy_(layer.router.weight.data)
    _, stock_map = stock.router(inputs)
    k = routing_map.sum(dim=1)
    assert len(set(k.tolist())) > 2
    assert torch.equal(routing_map[k == 2], stock_map[k == 2])
    # A token with fewer experts keeps a part of Megatron's, one with more has them all.
    assert (routing_map[k < 2] <= stock_map[k < 2]).all()
    assert (routing_map[k > 2] >= stock_map[k > 2]).all()
    groups_used = routing_map.view(-1, 4, 2).any(dim=2).sum(dim=1)
    assert groups_used.max() == 2


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_token_dropping(policy: str, pad: bool, factor: float) -> None:
    layer = layer_with_statistics(
        {**AE, "bias": {"enabled": True}},
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy=policy,
        moe_pad_expert_input_to_capacity=pad,
    )
    inputs = hidden_states(48, seed=2)
    probs, dispatched = layer.router(inputs)
    capacity = math.ceil(48 * 2 / 8 * factor)
    assert dispatched.sum(dim=0).max() <= capacity
    kept = probs > 0
    slots = layer.router.uar_bias.pending()
    assert slots.max() > capacity, "nothing was dropped"
    torch.testing.assert_close(kept.sum(dim=0), slots.long().clamp_max(capacity))
    assert layer.router.metrics._step_slots_E.sum() == kept.sum()
    layer.router.metrics.clear()
    output, _ = layer(inputs)
    expected = reference_output(layer, inputs, probs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    rows = layer.router.metrics.flat(5)[_INDEX["rows"]]
    assert rows == (8 * capacity if pad else kept.sum())


def test_padding_for_quantization_adds_rows_and_changes_nothing() -> None:
    layer = layer_with_statistics(AE)
    inputs = hidden_states(30, seed=2)
    expected, _ = layer(inputs)
    layer.router.metrics.clear()
    # TransformerConfig asks for Transformer Engine here; the dispatcher does the work without it.
    layer.config.moe_router_padding_for_quantization = True
    layer.config.fp8, layer.config.fp8_recipe = "e4m3", "tensorwise"
    output, _ = layer(inputs)
    torch.testing.assert_close(output, expected)
    rows = int(layer.router.metrics.flat(5)[_INDEX["rows"]])
    assert rows % 16 == 0
    assert rows > layer.router(inputs)[1].sum()


RULES = ("softmax_all", "renormalised", "renormalised_to_K")
WEIGHTS = [
    *(("softmax", rule, pre) for rule in RULES for pre in (True, False)),
    *((score, rule, False) for score in ("sigmoid", "sqrtsoftplus") for rule in RULES[1:]),
]


@pytest.mark.parametrize(("score_function", "rule", "pre_softmax"), WEIGHTS)
def test_weights(score_function: str, rule: str, pre_softmax: bool) -> None:
    layer = layer_with_statistics(
        {**AE, "weights": rule, "budget": {**AE["budget"], "k_min": 0}},
        moe_router_score_function=score_function,
        moe_router_pre_softmax=pre_softmax,
        moe_aux_loss_coeff=0.0,
    )
    inputs = hidden_states(50, seed=2)
    probs, routing_map = layer.router(inputs)
    logits = (inputs.detach().view(-1, HIDDEN) @ layer.router.weight.detach().T).double()
    scores = {
        "softmax": torch.softmax(logits, dim=-1),
        "sigmoid": torch.sigmoid(logits),
        "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(),
    }[score_function]
    shares = scores / scores.sum(dim=-1, keepdim=True)
    chosen = scores * routing_map
    if rule != "softmax_all":
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    if rule == "renormalised_to_K":
        chosen = chosen * shares.topk(2, dim=-1).values.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(probs.double(), chosen, rtol=1e-4, atol=1e-7)
    single = routing_map.sum(dim=1) == 1
    assert single.any()
    (gradient,) = torch.autograd.grad(probs[single].sum(), layer.router.weight)
    assert torch.isfinite(gradient).all()
    has_gradient = rule != "renormalised"
    assert (gradient.abs().max() > 1e-4) == has_gradient


@pytest.mark.parametrize("mode", ["moving", "batch"])
@pytest.mark.parametrize("budget", ["free", "mean", "exact"])
def test_recomputation_sees_the_same_k(mode: str, budget: str) -> None:
    """Forward of several micro-batches, then their backward in that order, as pipelines have it."""
    uar = {**AE, "statistics": {"mode": mode}, "budget": {**AE["budget"], "mode": budget}}
    results = []
    for recompute in (False, True):
        layer = layer_with_statistics(uar)
        maps: list[torch.Tensor] = []
        layer.router.register_forward_hook(lambda *args, maps=maps: maps.append(args[-1][1]))
        batches = [hidden_states(24, seed=s) for s in range(3)]

        def forward(x: torch.Tensor, layer: UARMoELayer = layer) -> torch.Tensor:
            return layer(x)[0]

        outputs = [checkpoint(forward, False, b) if recompute else forward(b) for b in batches]
        for output in outputs:
            output.square().sum().backward()
        if recompute:
            assert len(maps) == 6
            for first, second in zip(maps[:3], maps[3:], strict=True):
                assert torch.equal(first, second)
        results.append([*(b.grad for b in batches), layer.router.pending().clone()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_batch_statistics_are_the_batchs_own_in_training_only() -> None:
    layer = layer_with_statistics({**AE, "statistics": {"mode": "batch"}})
    logits = torch.randn(64, 8, dtype=torch.float64) + 30
    valid = torch.arange(64) < 50
    statistics = layer.router.uar_statistics
    energy = -torch.logsumexp(logits, dim=-1)
    z = (energy - energy[:50].mean()) / energy[:50].std(unbiased=False)
    torch.testing.assert_close(
        statistics.measure(logits, valid).zscore_T.double(), z, rtol=1e-5, atol=1e-5
    )
    statistics.eval()
    moving = (energy - statistics.mean) / statistics.var.sqrt()
    torch.testing.assert_close(
        statistics.measure(logits, valid).zscore_T.double(), moving, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("budget", ["free", "exact"])
@pytest.mark.parametrize("gated", [True, False])
def test_grouped_experts_equal_sequential_ones(budget: str, gated: bool) -> None:
    uar = {**AE, "budget": {**AE["budget"], "mode": budget, "k_min": 0}}
    results = []
    for grouped in (False, True):
        layer = layer_with_statistics(uar, moe_grouped_gemm=grouped, gated_linear_unit=gated)
        assert isinstance(layer.experts, TorchGroupedMLP) == grouped
        inputs = hidden_states(40, seed=8)
        output, bias = layer(inputs)
        output.square().sum().backward()
        assert bias is None
        results.append({"output": output, "input": inputs.grad})
        for name, parameter in layer.named_parameters():
            results[-1][name] = torch.zeros(()) if parameter.grad is None else parameter.grad
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected.expand_as(results[1][name]), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("overlap", [True, False])
def test_shared_experts_are_added(overlap: bool) -> None:
    outputs = []
    for size in (None, 12):
        layer = layer_with_statistics(
            AE,
            moe_shared_expert_intermediate_size=size,
            moe_shared_expert_overlap=overlap and size is not None,
        )
        inputs = hidden_states(20, seed=5)
        outputs.append(layer(inputs)[0])
    assert layer.shared_experts is not None
    routed = reference_output(layer, inputs, layer.router(inputs)[0])
    torch.testing.assert_close(
        outputs[1], routed + shared_forward(layer, inputs), rtol=1e-4, atol=1e-6
    )


def shared_forward(layer: UARMoELayer, inputs: torch.Tensor) -> torch.Tensor:
    """The shared expert by its weights alone."""
    gate, linear = (inputs @ layer.shared_experts.linear_fc1.weight.T).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * linear
    return hidden @ layer.shared_experts.linear_fc2.weight.T


def test_grouped_experts_apply_weights_to_the_input_where_asked() -> None:
    options = {
        "moe_router_topk": 1,
        "moe_apply_probs_on_input": True,
        "moe_router_pre_softmax": True,
    }
    outputs = []
    for grouped in (False, True):
        config = transformer_config(moe_grouped_gemm=grouped, **options)
        layer = uar_layer(config, {}, like=stock_layer(config))
        outputs.append(layer(hidden_states(20, seed=1))[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-9)


def test_weights_of_one_expert_are_renormalised_where_asked() -> None:
    uar = {"policy": "uar", "budget": {"k_min": 1, "k_max": 1}, "weights": "renormalised"}
    layer = layer_with_statistics(uar, moe_router_score_function="sigmoid")
    probs, routing_map = layer.router(hidden_states(9))
    assert (routing_map.sum(dim=1) == 1).all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(9))


def test_steps_count_from_where_uar_is_switched_on() -> None:
    off = layer_with_statistics({"policy": "topk"})
    assert off.router.step == int(off.router.uar_step) == 0
    waiting = layer_with_statistics({**AE, "expansion": {"start_step": 5}})
    assert waiting.router.step == int(waiting.router.uar_step) == 1


def test_a_snapshot_undoes_a_step() -> None:
    uar = {**AE, "bias": {"enabled": True}, "budget": {**AE["budget"], "mode": "mean"}}
    layer = layer_with_statistics(uar)
    layer.router.metrics.has_reader = True
    before = {name: b.clone() for name, b in layer.router.named_buffers() if "pending" not in name}
    snapshot, step = layer.router.snapshot(), layer.router.step
    layer(hidden_states(64, seed=3))
    commit([layer.router])
    after = dict(layer.router.named_buffers())
    assert all(
        not torch.equal(after[f"uar_{n}"], before[f"uar_{n}"]) for n in ("bias.value", "step")
    )
    layer.router.restore(snapshot)
    assert layer.router.step == step
    for name, value in before.items():
        assert torch.equal(dict(layer.router.named_buffers())[name], value), name


def test_megatrons_expert_bias_selects_among_any_k() -> None:
    layer = layer_with_statistics(
        AE, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    )
    layer.router.expert_bias[5] = 10.0
    mask = torch.zeros(20, 1, dtype=torch.bool)
    mask[15:] = True
    layer.router.local_tokens_per_expert.zero_()
    _, routing_map = layer.router(hidden_states(20, seed=5), mask)
    assert routing_map[:, 5].all()
    assert len(set(routing_map.sum(dim=1).tolist())) > 1
    assert torch.equal(layer.router.local_tokens_per_expert.long(), routing_map[:15].sum(dim=0))


def test_depth_schedule_reaches_the_layers() -> None:
    config = transformer_config(num_layers=4, moe_layer_freq=[0, 1, 1, 1])
    uar = {"policy": "uar", "budget": {"beta": {"shape": "ascending", "low": 1.5, "high": 3.5}}}
    stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    last_stage = dataclasses.replace(stock, layer_specs=stock.layer_specs[2:])
    for block, first, expected in ((stock, 1, [1.5, 2.5, 3.5]), (last_stage, 3, [2.5, 3.5])):
        betas = []
        for spec in with_uar_routers(block, UARConfig.model_validate(uar), first).layer_specs:
            if spec.submodules.mlp.func is UARMoELayer:
                layer = spec.submodules.mlp(config=config)  # Megatron names no number here
                betas.append(layer.router.policy.budget.budget.beta)
        assert betas == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_mode_waits_for_the_device_more_often_than_stock(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's dispatcher waits once per pass; `exact` does not even need it earlier."""
    waits = []
    event = torch.cuda.Event().__class__
    monkeypatch.setattr(event, "synchronize", lambda self: waits.append(1))
    counted, points = {}, {}
    inputs = hidden_states(40, seed=4)
    stock = stock_layer(transformer_config())
    for mode in ("stock", "exact", "free"):
        budget = {**AE["budget"], "mode": mode, "target_mean_k": 2.5}
        uar = {**AE, "budget": budget, "kernel_backend": backend}
        layer = stock if mode == "stock" else layer_with_statistics(uar)
        waits.clear()
        layer(inputs)
        layer(inputs)
        counted[mode], points[mode] = len(waits), layer.token_dispatcher.cuda_sync_point
        if mode == "exact":
            assert layer.token_dispatcher.num_out_tokens == 100
    assert counted["free"] == counted["exact"] == counted["stock"] > 0
    assert points["exact"] == points["stock"] != points["free"]
