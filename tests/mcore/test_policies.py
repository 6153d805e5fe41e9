"""The MoE layer with each policy: slots, weights, padding, recomputation, losses, state, log."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from moe_cases import (
    HIDDEN,
    assert_bit_equal,
    hidden_states,
    run,
    stock_layer,
    transformer_config,
    uar_layer,
)
from policy_cases import CASES, NO_LOSS, section

from uar_megatron.config import UARConfig
from uar_megatron.mcore import step as step_module
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.policies import layer_policies
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.step import StepBoundary, commit
from uar_megatron.metrics import _INDEX, POLICY_LOSS, LayerMetrics, describe
from uar_megatron.policies import POLICIES
from uar_megatron.policies.base import PolicyState

pytestmark = pytest.mark.usefixtures("model_parallel")


def policy_layer(
    name: str, uar: dict[str, Any] | None = None, steps: int = 1, **options: Any
) -> UARMoELayer:
    """A layer with the policy's settings of ``CASES``, after some steps; logits that differ."""
    config = transformer_config(**CASES[name][1], **options)
    layer = uar_layer(config, {**section(name), **(uar or {})}, like=stock_layer(config))
    with torch.no_grad():
        layer.router.weight.mul_(20)
    for step in range(steps):
        layer(hidden_states(64, seed=9 + step))
        commit([layer.router])
    layer.router.metrics.clear()
    return layer


def reference_output(layer: UARMoELayer, inputs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Σ_e p_e·expert_e(x), slot by slot."""
    rows = []
    for token, weights in zip(inputs.view(-1, HIDDEN), probs, strict=True):
        total = 0.0 * token + 0.0 * weights.sum()  # a token may have no expert
        for e in weights.nonzero().flatten().tolist():
            out, _ = layer.experts.local_experts[e](token[None], torch.ones(1))
            total = total + weights[e] * out[0]
        rows.append(total)
    return torch.stack(rows).view_as(inputs)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing has been written to is NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``plain``, whose floating-point tensors are NaN."""

    def full_of_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return full_of_nan


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("tokens", [1, 36])
@pytest.mark.parametrize("name", POLICIES)
def test_every_slot_is_computed_once_with_its_own_weight(
    name: str, tokens: int, dispatcher: str
) -> None:
    """Output and gradients, and what the run log says of it."""
    layer = policy_layer(name, moe_token_dispatcher_type=dispatcher, moe_aux_loss_coeff=0.0)
    layer.router.policy.has_loss = False  # type: ignore[misc]  # gradients of the output alone
    with torch.no_grad():
        for expert in layer.experts.parameters():
            expert.mul_(20)
    layer.router.metrics.has_reader = True
    inputs = hidden_states(tokens, seed=1, batch=3 if tokens > 1 else 1)
    probs, routing_map = layer.router(inputs)
    layer.router.metrics.clear()
    output, _ = layer(inputs)
    expected = reference_output(layer, inputs, probs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for wanted in (inputs, layer.router.weight):
        (ours,) = torch.autograd.grad(output.square().sum(), wanted, retain_graph=True)
        (reference,) = torch.autograd.grad(expected.square().sum(), wanted, retain_graph=True)
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5 * scale)
    layer.router.metrics.end_step()
    max_k = layer.router.policy.max_k
    log = describe(layer.router.metrics.flat(max_k), 8, max_k, steps=1)
    k = routing_map.sum(dim=1)
    assert log["tokens"] == tokens
    assert log["rows"] == routing_map.sum()
    assert log["k_eff"] == pytest.approx(float(k.float().mean()))
    load = routing_map.sum(dim=0) / routing_map.sum().clamp_min(1)
    assert log["load"] == pytest.approx(load.tolist(), rel=1e-6)
    histogram = (k.bincount(minlength=max_k + 1) / tokens).tolist()
    assert log["k_histogram"] == pytest.approx(histogram)
    if tokens > 1 and layer.router.policy.fixed_k is None:
        assert len(set(k.tolist())) > 1, "the case does not vary k"


@pytest.mark.parametrize(("frequency", "layers"), [([0, 1, 1, 0], 2), ([0, 1, 0, 1], 4), (1, 6)])
def test_a_policy_knows_the_layers_with_experts(frequency: Any, layers: int) -> None:
    """MTP layers are built like the last decoder layer."""
    config = transformer_config(num_layers=4, moe_layer_freq=frequency, mtp_num_layers=2)
    (first, *_) = layer_policies(UARConfig.model_validate(section("topk")), config)
    assert first.settings.num_moe_layers == layers


@pytest.mark.parametrize("name", POLICIES)
def test_recomputation_gives_equal_results(name: str) -> None:
    """Forward of several micro-batches, then their backward in that order, as pipelines have it."""
    results = []
    for recompute in (False, True):
        layer = policy_layer(name)
        layer.router.metrics.has_reader = True
        batches = [hidden_states(24, seed=s) for s in range(3)]
        get_moe_metrics_tracker()._metrics.clear()

        def forward(x: torch.Tensor, layer: UARMoELayer = layer) -> torch.Tensor:
            return layer(x)[0]

        outputs = [checkpoint(forward, False, b) if recompute else forward(b) for b in batches]
        for output in outputs:
            output.square().sum().backward()
        found = [*outputs, *(b.grad for b in batches), layer.router.weight.grad]
        losses = [m.values for m in get_moe_metrics_tracker().metrics.values()]
        found += [layer.router.pending().clone(), *(loss.clone() for loss in losses)]
        commit([layer.router])
        found += [b.clone() for _, b in layer.router._state_buffers()]
        results.append([*found, layer.router.metrics.flat(layer.router.policy.max_k)])
    assert len(results[0]) == len(results[1])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", POLICIES)
def test_padding_counts_in_no_loss_and_no_state(name: str) -> None:
    """With any number of padding tokens whose decision does not reach the others."""
    uar = {"bias": {"enabled": True}} if name not in ("relu", "sinkhorn_selective") else {}
    if name == "seq_topk":  # padding takes part in the competition of its sequence, by definition
        uar["budget"] = {"k_min": 2, "k_max": 2}
    seen = []
    for padding in (0, 6):
        layer = policy_layer(name, uar)
        inputs = hidden_states(20, seed=5)
        inputs = torch.cat((inputs, 5 * hidden_states(6, seed=6)[:padding])).detach()
        mask = torch.zeros(20 + padding, 1, dtype=torch.bool)
        mask[20:] = True
        get_moe_metrics_tracker()._metrics.clear()
        layer.router.weight.grad = None
        probs, _ = layer.router(inputs, mask if padding else None)
        (probs * 0).sum().backward()  # only the losses' gradient is left
        losses = {n: m.values.clone() for n, m in get_moe_metrics_tracker().metrics.items()}
        seen.append(
            {
                "gradient": layer.router.weight.grad.clone(),
                "pending": layer.router.pending().clone(),
                "metrics": layer.router.metrics.flat(layer.router.policy.max_k),
                **losses,
            }
        )
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        torch.testing.assert_close(seen[1][key], value, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", POLICIES)
def test_only_a_forward_in_training_counts(name: str) -> None:
    layer = policy_layer(name)
    before = layer.router.pending().clone()
    inputs = hidden_states(10)
    get_moe_metrics_tracker()._metrics.clear()
    with torch.no_grad():
        layer(inputs)
    layer.eval()
    layer(inputs)
    assert torch.equal(layer.router.pending(), before)
    assert POLICY_LOSS not in get_moe_metrics_tracker().metrics
    layer.train()
    layer(inputs)
    assert not torch.equal(layer.router.pending(), before)
    has_loss = POLICY_LOSS in get_moe_metrics_tracker().metrics
    assert has_loss == layer.router.policy.has_loss


@pytest.mark.parametrize("name", POLICIES)
def test_a_snapshot_undoes_a_step_and_a_checkpoint_holds_everything(name: str) -> None:
    layer = policy_layer(name)
    router = layer.router
    before = {n: b.clone() for n, b in router.named_buffers() if "pending" not in n}
    snapshot = router.snapshot()
    router(hidden_states(64, seed=3))
    commit([router])
    after = {n: b.clone() for n, b in router.named_buffers() if "pending" not in n}
    saved = {n: v.clone() for n, v in layer.state_dict().items() if v is not None}
    router.restore(snapshot)
    for n, value in before.items():
        assert torch.equal(dict(router.named_buffers())[n], value), n
    fresh = policy_layer(name, steps=0)
    fresh.load_state_dict(saved)
    for n, value in after.items():
        assert torch.equal(dict(fresh.router.named_buffers())[n], value), n
    assert fresh.router.step == 2


@pytest.mark.parametrize("name", ["top_p", "relu"])
def test_the_policys_loss_is_scaled_and_logged_as_megatrons(name: str) -> None:
    """Value in both logs; gradient coeff · dL/dw; per-token averaging multiplies by the tokens."""
    gradients = []
    for per_token in (False, True):
        layer = policy_layer(
            name,
            {"top_p": {"entropy_coeff": 0.3}},
            calculate_per_token_loss=per_token,
            **({} if name == "relu" else NO_LOSS),
        )
        router = layer.router
        inputs = hidden_states(30, seed=4, batch=3)
        get_moe_metrics_tracker()._metrics.clear()
        probs, routing_map = router(inputs)
        (probs * 0).sum().backward()
        logged = get_moe_metrics_tracker().metrics[POLICY_LOSS].values[0].item()

        flat = inputs.detach().view(-1, HIDDEN).double()
        weight = router.weight.detach().double().requires_grad_()
        logits = flat @ weight.T
        if name == "top_p":
            p = torch.softmax(logits, dim=-1)
            loss, coeff = -(p * p.log()).sum(dim=1).mean(), 0.3
        else:
            fractions = 8 / (2.5 * 30) * routing_map.sum(dim=0).double()
            loss = (fractions * logits.relu()).sum() / (2 * 30)  # the model has two MoE layers
            coeff = float(router.uar_policy.coeff)
        (coeff * loss).backward()
        assert logged == pytest.approx(loss.item(), rel=1e-5)
        row = router.metrics.flat(router.policy.max_k)
        assert float(row[_INDEX[f"sum_{POLICY_LOSS}"]]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(row[_INDEX[f"terms_{POLICY_LOSS}"]]) == 1.0
        scale = 30 if per_token else 1
        torch.testing.assert_close(
            router.weight.grad.double(), scale * weight.grad, rtol=2e-4, atol=1e-7
        )
        gradients.append(router.weight.grad)
    assert gradients[0].any()


def test_the_loss_counts_its_tokens_exactly_in_bf16() -> None:
    """bf16 holds whole numbers up to 256 only."""
    counted = []
    layer = policy_layer("top_p", steps=0, moe_router_dtype=None)
    plain = layer.router.policy.loss

    def loss(*args: Any) -> Any:
        counted.append(args[3])
        return plain(*args)

    layer.router.policy.loss = loss  # type: ignore[method-assign]
    router, inputs = layer.bfloat16().router, hidden_states(1027).bfloat16()
    assert router(inputs)[0].dtype == torch.bfloat16
    assert counted[0].dtype == torch.float32
    assert counted[0] == 1027


def test_lambda_is_one_for_all_layers_and_sees_all_of_them() -> None:
    """A dense layer and a sparse one: the mean of both decides, in both."""
    layers = [policy_layer("relu", {"budget": {"target_mean_k": t}}, steps=0) for t in (3.0, 3.0)]
    routers = [layer.router for layer in layers]
    expected = float(routers[0].uar_policy.coeff)
    generator = torch.Generator().manual_seed(0)
    directions = set()
    for step in range(6):
        counts = []
        for router in routers:
            with torch.no_grad():
                router.weight.copy_(torch.randn(8, HIDDEN, generator=generator))
            for micro_batch in range(2):
                inputs = hidden_states(16, seed=10 * step + micro_batch)
                with torch.no_grad():
                    router.weight[:, 0] = 2.0 * (step % 3 - 1)
                    inputs[:, :, 0] = 1.0
                _, routing_map = router(inputs)
                counts.append(int(routing_map.sum()))
        commit(routers)
        missing = sum(counts) - 3 * 4 * 16  # denser than 1 − K/E: λ grows
        expected *= 1.2 ** ((missing > 0) - (missing < 0))
        directions.add(missing > 0)
        for router in routers:
            assert float(router.uar_policy.coeff) == pytest.approx(expected, rel=1e-12)
        assert [router.step for router in routers] == [step + 1] * 2
    assert directions == {True, False}


def test_lambda_stays_where_the_target_is_met_over_all_layers_together() -> None:
    layers = [policy_layer("relu", {"budget": {"target_mean_k": 4}}, steps=0) for _ in range(2)]
    for layer, positive in zip(layers, (7, 1), strict=True):
        with torch.no_grad():
            layer.router.weight.fill_(-1.0)
            layer.router.weight[:positive] = 1.0
        layer.router(torch.ones(5, 1, HIDDEN, requires_grad=True))
    before = float(layers[0].router.uar_policy.coeff)
    commit([layer.router for layer in layers])
    assert [float(layer.router.uar_policy.coeff) for layer in layers] == [before] * 2


def test_a_stage_without_moe_layers_joins_the_sum_with_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as the others' vector, on this rank's device, at every step."""
    joined: list[torch.Tensor] = []
    monkeypatch.setattr(step_module, "sum_over_pipeline", lambda v: joined.append(v) or v)
    monkeypatch.setattr(step_module, "current_iteration", lambda: 1)
    with_layers = policy_layer("relu", steps=0)
    with_layers.router(hidden_states(4))
    commit([with_layers.router])
    for name in POLICIES:
        state: PolicyState | None = policy_layer(name, steps=0).router.policy.state
        boundary = StepBoundary(lambda model: None, 0, state)
        boundary([torch.nn.Linear(2, 2)])
    assert len(joined) == 2, "relu's state spans layers, and nobody else's"
    assert joined[1].shape == joined[0].shape == (2,)
    assert joined[1].dtype == joined[0].dtype
    assert joined[1].device == joined[0].device
    assert not joined[1].any()


@pytest.mark.parametrize("training", [True, False])
def test_undrawn_steps_of_sinkhorn_are_megatrons_to_the_last_bit(training: bool) -> None:
    config = transformer_config(**NO_LOSS)
    stock = stock_layer(config)
    probability = 0.0 if training else 1.0
    uar = {"policy": "sinkhorn_selective", "sinkhorn": {"probability": probability}}
    layer = uar_layer(config, uar, like=stock)
    inputs = hidden_states(32, seed=2)
    for each in (layer, stock):
        each.train(training)
    assert_bit_equal(run(layer, inputs), run(stock, inputs))


def test_drawn_steps_of_sinkhorn_are_not() -> None:
    config = transformer_config(**NO_LOSS)
    stock = stock_layer(config)
    uar = {"policy": "sinkhorn_selective", "sinkhorn": {"probability": 1.0}}
    layer = uar_layer(config, uar, like=stock)
    inputs = hidden_states(32, seed=2)
    assert not torch.equal(layer.router(inputs)[0], stock.router(inputs)[0])


@pytest.mark.parametrize("name", POLICIES)
def test_token_dropping_goes_with_every_policy(name: str) -> None:
    layer = policy_layer(name, moe_expert_capacity_factor=0.5)
    inputs = hidden_states(48, seed=2)
    probs, dispatched = layer.router(inputs)
    assert dispatched.sum(dim=0).max() <= 6
    layer.router.metrics.clear()
    output, _ = layer(inputs)
    torch.testing.assert_close(output, reference_output(layer, inputs, probs), rtol=1e-4, atol=1e-6)
    assert layer.router.metrics.flat(8)[_INDEX["rows"]] == dispatched.sum()


def test_every_router_is_ours_and_logs_what_its_policy_names() -> None:
    for name in POLICIES:
        router = policy_layer(name).router
        assert isinstance(router, UARRouter)
        logged = {} if router.uar_policy is None else router.uar_policy.logged()
        assert logged.keys() <= set(router.policy.logged)
        assert isinstance(router.metrics, LayerMetrics)
    assert functools.reduce(set.union, (set(p.logged) for p in POLICIES.values()), set()) == {
        "beta",
        "l1_coeff",
    }
