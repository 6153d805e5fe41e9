"""Observing real MoE layers on one rank: right numbers, and nothing at steps not observed."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint
from moe_cases import HIDDEN, assert_bit_equal, hidden_states, run, stock_layer, transformer_config
from moe_cases import uar_layer as build_uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, UARError
from uar_megatron.mcore import token_classes
from uar_megatron.mcore.loop import TrainingLoop
from uar_megatron.mcore.meters import meters_of
from uar_megatron.mcore.observation import ObservedSteps
from uar_megatron.mcore.observer import Observer, check_observe, count_ids
from uar_megatron.mcore.probe import (
    Probe,
    contiguous_tokens,
    expert_matrices,
    output_similarity,
    weight_similarity,
)
from uar_megatron.mcore.token_classes import TokenClasses
from uar_megatron.mcore.tracker import RoutingTracker
from uar_megatron.monitor import watch_training
from uar_megatron.observatory import decile_of_ids

pytestmark = pytest.mark.usefixtures("model_parallel")
FREE = {"policy": "uar", "budget": {"alpha": 1.5, "beta": 2.0, "k_min": 0, "k_max": 5}}


class Model(torch.nn.Module):
    """A layer that is called with token ids, as a GPT is."""

    def __init__(self, layer: torch.nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.layer, self.recompute = layer, recompute
        self.table = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(2)) * 3

    def forward(self, input_ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table[input_ids.T.contiguous()].requires_grad_()
        if self.recompute:
            return checkpoint(lambda h: self.layer(h)[0], False, hidden)
        return self.layer(hidden, padding_mask=padding)[0]


@pytest.fixture
def layers() -> Any:
    config = transformer_config()
    stock = stock_layer(config)
    with torch.no_grad():
        stock.router.weight.mul_(20)
    build = {
        "stock": lambda: stock,
        "off": lambda: build_uar_layer(config, {"policy": "topk"}, like=stock),
        "free": lambda: build_uar_layer(config, FREE, like=stock),
        "kernels": lambda: build_uar_layer(
            config, {**FREE, "kernel_backend": "triton"}, like=stock
        ),
        "top_p": lambda: build_uar_layer(config, {"policy": "top_p"}, like=stock),
    }
    return lambda kind: build[kind]()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _domains_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_classes, "DOMAINS", token_classes.BatchDomains())


COUNTS = torch.arange(32) ** 2


@pytest.mark.parametrize("kind", ["stock", "off", "free", "kernels", "top_p"])
@pytest.mark.parametrize("recompute", [False, True])
def test_observed_step(layers: Any, kind: str, recompute: bool) -> None:
    if recompute and kind in ("kernels", "top_p"):
        pytest.skip("as the others")
    model = Model(layers(kind), recompute)
    router = model.layer.router
    observed = True
    classes = TokenClasses([model], 2, lambda: observed)
    classes.decile_V = decile_of_ids(COUNTS)
    steps = ObservedSteps([router], 2, 8, 1.0, classes, lambda: observed)
    padding = None if recompute else torch.rand(3, 8) < 0.2
    logits, ks, names = [], [], []
    outputs = []
    decile = brute_force.deciles(COUNTS.numpy())
    for micro_batch in range(3):
        tokens = ids(micro_batch)
        token_classes.DOMAINS.current = torch.tensor([0, 1, 1])
        outputs.append(model(tokens, padding))  # all forward first, as in a pipeline
        hidden = model.table[tokens.T].reshape(-1, HIDDEN)
        z = (hidden @ router.weight.T).detach()
        for t, token in enumerate(tokens.T.flatten().tolist()):
            if padding is None or not padding.T.flatten()[t]:
                logits.append(z[t].numpy())
                names.append([decile[token], f"domain_{min(t % 3, 1)}"])
        observed = False  # what follows is no part of the step
        with torch.no_grad():
            model.eval()
            mask = None if padding is None else padding.T
            _, routed = router(model.table[tokens.T.contiguous()], mask)
            model.train()
        observed = True
        # A map, or the kernels' lists of experts.
        k = (routed if routed.dtype == torch.bool else routed >= 0).sum(dim=-1).tolist()
        ks += [k[t] for t in range(24) if padding is None or not padding.T.flatten()[t]]
    for output in outputs:
        output.square().sum().backward()
    expected = brute_force.token_signals(np.array(logits), np.array(ks), names)
    found = steps.take()[0]
    brute_force.assert_token_signals(found, expected)
    weight = router.weight.detach().double().numpy()
    assert math.isclose(found["router_norm"], np.linalg.norm(weight))
    norms_E = np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(found["router_row_norms"], norms_E, rtol=1e-5)
    assert found["bias"] is None
    assert steps.take() == {}


def test_biases_are_observed() -> None:
    config = transformer_config(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    )
    stock = stock_layer(config)
    stock.router.expert_bias.copy_(torch.arange(8.0))
    model = Model(stock)
    steps = ObservedSteps(
        [stock.router], 2, 8, 1.0, TokenClasses([model], 0, lambda: True), lambda: True
    )
    model(ids(0))
    assert steps.take()[0]["bias"] == list(range(8))


@pytest.mark.parametrize("kind", ["stock", "free"])
def test_a_step_that_is_not_observed_costs_nothing(
    layers: Any, kind: str, repository: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    from bench_overhead import Counter

    layer = layers(kind)
    model = Model(layer)

    def cost() -> tuple[int, int, int]:
        with Counter() as counter:
            model(ids(0)).square().sum().backward()
        return counter.launches, counter.host_syncs, counter.collectives

    cost()
    without = cost()
    observed = False
    classes = TokenClasses([model], 0, lambda: observed)
    steps = ObservedSteps([layer.router], 2, 8, 1.0, classes, lambda: observed)
    assert cost() == without
    observed = True
    assert cost()[0] > without[0]
    assert cost()[1:] == without[1:]  # and an observed one neither waits nor talks until its end
    assert steps.take()[0]["tokens"] == 2 * 24


def test_a_stock_layer_with_a_meter_routes_the_same_bits_and_reduces_once(layers: Any) -> None:
    layer = layers("stock")
    inputs = hidden_states(37, seed=3)
    before, router = run(layer, inputs), layer.router
    meters = meters_of([layer], 1.0)
    records: list[dict[str, Any]] = []
    tracker = RoutingTracker(meters, 2, 8, (), 2, lambda: 37, records.append)
    assert_bit_equal(run(layer, inputs), before)
    assert layer.router is router
    assert type(router).__name__ == "TopKRouter"
    meters[0].metrics.clear()
    reductions = []
    # Megatron's timer waits for the device.
    timed: list[int] = []
    reduce = torch.distributed.all_reduce
    for step in range(1, 5):
        layer(hidden_states(37, seed=step))[0].sum().backward()
        reductions.append(0)

        def counting(*args: Any, **kwargs: Any) -> Any:
            reductions[-1] += 1
            return reduce(*args, **kwargs)

        torch.distributed.all_reduce = counting
        call = {"iteration": step, "loss_dict": {}, "skipped_iter": 0, "grad_norm": 1.0}
        call |= {"learning_rate": 0.1, "is_first_iteration": False}
        tracker.on_step(call, lambda step=step: timed.append(step) or 2.0)
        torch.distributed.all_reduce = reduce
    assert reductions == [0, 1, 0, 1]
    assert timed == [2, 4]
    assert records[1]["seconds_per_step"] == 1.0
    last = None
    for record in records:
        (found,) = record["layers"]
        seeds = (record["step"] - 1, record["step"])
        steps = [hidden_states(37, seed=seed).view(-1, HIDDEN) for seed in seeds]
        energy = -(torch.cat(steps) @ router.weight.T).double().logsumexp(dim=-1).detach()
        if last is not None:
            z = (energy - last.mean()) / last.std(correction=0)
            assert math.isclose(found["zscore_mean"], z.mean(), abs_tol=1e-5)
            assert math.isclose(found["zscore_std"], z.std(correction=0), rel_tol=1e-5)
        last = energy
        assert (found["tokens"], found["k_eff"], found["rows"]) == (74, 2.0, 74.0)
        assert math.isclose(found["energy_mean"], energy.mean(), rel_tol=1e-6)
        switch = [switch_loss((step @ router.weight.T).double(), 2) for step in steps]
        assert math.isclose(found["balancing_loss"]["aux_loss"], sum(switch) / 2, rel_tol=1e-5)


def switch_loss(logits_TE: torch.Tensor, topk: int) -> float:
    """E · Σ_e of an expert's part of the slots times its mean probability."""
    tokens, experts = logits_TE.shape
    slots_E = logits_TE.topk(topk).indices.flatten().bincount(minlength=experts)
    return float(experts * (slots_E / (tokens * topk) * logits_TE.softmax(-1).mean(dim=0)).sum())


@pytest.mark.parametrize(("grouped", "dead"), [(False, False), (True, False), (False, True)])
def test_similarities_of_experts(grouped: bool, dead: bool) -> None:
    config = transformer_config(moe_grouped_gemm=grouped)
    layer = build_uar_layer(config, FREE, like=stock_layer(transformer_config()))
    shared = torch.randn(2 * 12, HIDDEN)
    with torch.no_grad():
        for expert in layer.experts.local_experts:
            expert.linear_fc1.weight.mul_(5).add_(shared)
        if dead:  # similar to none
            for weight in layer.experts.local_experts[3].parameters():
                weight.zero_()
    experts = layer.experts.local_experts
    vectors = [torch.cat([w.flatten() for w in expert.parameters()]) for expert in experts]
    cosine, count = weight_similarity(layer).tolist()
    expected = brute_force.pair_cosine(torch.stack(vectors).detach().numpy())
    assert count == 1
    assert math.isclose(cosine, expected, rel_tol=1e-5)
    inputs = hidden_states(11).detach().view(-1, HIDDEN)
    with torch.no_grad():
        outputs = torch.stack([expert(inputs, torch.ones(11))[0] for expert in experts])
        total, tokens = output_similarity(layer, inputs).tolist()
    expected = np.mean([brute_force.pair_cosine(outputs[:, t].numpy()) for t in range(11)])
    assert tokens == 11
    assert math.isclose(total / tokens, expected, rel_tol=1e-4)


@pytest.mark.parametrize("single", [False, True])
def test_matrices_of_transformer_engines_experts(single: bool) -> None:
    """By parameter names: Transformer Engine itself is not installed here."""
    shape = {"linear_fc1": (3, 4, 5), "linear_fc2": (3, 5, 4)}
    experts = torch.nn.Module()
    weights = {name: torch.randn(size) for name, size in shape.items()}
    for name, stacked in weights.items():
        linear = torch.nn.Module()
        parts = {"weight": stacked} if single else {f"weight{i}": w for i, w in enumerate(stacked)}
        for part, weight in parts.items():
            linear.register_parameter(part, torch.nn.Parameter(weight))
        linear.register_parameter("bias0", torch.nn.Parameter(torch.zeros(4)))
        experts.add_module(name, linear)
    found = expert_matrices(SimpleNamespace(experts=experts))
    for matrices, stacked in zip(found, weights.values(), strict=True):
        assert torch.equal(torch.stack(matrices), stacked)


@pytest.mark.parametrize("kind", ["stock", "kernels"])
def test_probe(layers: Any, kind: str) -> None:
    layer = layers(kind)
    batches = [hidden_states(45, seed=s, batch=3).detach() for s in range(2)]

    def forward() -> None:
        layer.eval()
        for batch in batches:
            layer(batch)
        layer.train()

    probe = Probe([layer], 2, 8, topk=2, segment=4, forward=forward)
    maps = []
    for number in range(2):
        found = probe.run()[0]
        layer.eval()
        with torch.no_grad():
            logits = [batch.view(-1, HIDDEN) @ layer.router.weight.T for batch in batches]
        layer.train()
        best = [z.argsort(dim=-1, descending=True) for z in logits]
        maps.append([torch.zeros(45, 8).scatter(1, b[:, :2], 1.0).bool() for b in best])
        if kind == "stock":
            of_sequences = [m.view(15, 3, 8)[:, b].numpy() for m in maps[-1] for b in range(3)]
            for size in (2, 4):
                expected = brute_force.hit_rate(of_sequences, 4, size)
                assert math.isclose(found["cache_hit_rates"][str(size)], expected)
        assert set(found["cache_hit_rates"]) == {"2", "4"}
        if number == 0:
            assert found["stability"] is None
        elif kind == "stock":
            expected = brute_force.jaccard(*(torch.cat(m).numpy() for m in maps))
            assert math.isclose(found["stability"], expected)
            assert 0 < expected < 1
        with torch.no_grad():
            layer.router.weight[:3].mul_(-1)
    assert not layer._forward_pre_hooks
    assert not layer.router._forward_hooks


def test_classes_of_a_part_of_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sequence parallelism each rank's router gets its own part."""
    model = Model(torch.nn.Identity())
    model.forward = lambda input_ids: None
    classes = TokenClasses([model], 0, lambda: True)
    classes.decile_V = torch.arange(32) // 4
    tokens = ids(3)
    model(tokens)
    router = torch.nn.Identity()
    whole = classes.of(router, 8)
    assert torch.equal(whole[0], (tokens // 4).T.flatten())
    monkeypatch.setattr(token_classes, "get_tensor_model_parallel_rank", lambda: 1)
    assert torch.equal(classes.of(router, 4), whole[:, 12:])
    assert classes.of(router, 5) is None  # cut in a way we do not know
    model(None)
    assert classes.of(router, 8) is None


def test_contiguous_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from uar_megatron.mcore import probe

    group = SimpleNamespace(size=lambda: 1)
    assert contiguous_tokens(16, group) == 16
    monkeypatch.setattr(probe, "get_context_parallel_world_size", lambda: 2)
    assert contiguous_tokens(16, group) == 8
    assert contiguous_tokens(16, SimpleNamespace(size=lambda: 2)) == 16


def test_ids_are_counted_on_spread_sequences() -> None:
    data = [{"tokens": torch.full((4,), i % 7)} for i in range(2000)]
    counts = count_ids(data, 10)
    assert counts.sum() == 4 * 512
    assert (counts[:7] > 0).all()
    assert count_ids([], 10).sum() == count_ids([{"text": 1}], 10).sum() == 0


LAYOUT = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "tensor_model_parallel_size": 1,
    "seq_length": 64,
    "microbatch_group_size_per_vp_stage": None,
    "cuda_graph_impl": "none",
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "overlap_moe_expert_parallel_comm": False,
}


def test_probes_that_a_layout_cannot_run_are_refused() -> None:
    args = SimpleNamespace(**LAYOUT)
    section = {"probe_interval": 5, "probe_sequences": 4, "segment": 16}
    check_observe(UARConfig(observe=section), args)
    with pytest.raises(ConfigError, match=r"(?s)probe_sequences: 3, but 2 .*multiple of 2"):
        check_observe(UARConfig(observe={**section, "probe_sequences": 3}), args)
    with pytest.raises(ConfigError, match=r"(?s)segment: 17, but .* into 4 pieces.*1 … 16"):
        check_observe(UARConfig(observe={**section, "segment": 17}), args)
    check_observe(UARConfig(observe={"probe_sequences": 3}), args)
    for name, value in (
        *(("cuda_graph_impl", "local"), ("use_megatron_fsdp", True), ("use_torch_fsdp2", True)),
        ("gtp_weight_remat_size", 2),
    ):
        with pytest.raises(ConfigError, match=rf"(?s)probe_interval: .*{name}.*probe_interval=0"):
            check_observe(UARConfig(observe=section), SimpleNamespace(**(LAYOUT | {name: value})))
    args.microbatch_group_size_per_vp_stage = 6
    with pytest.raises(ConfigError, match=r"(?s)probe_sequences: 4, .*groups of 6.*6 or more"):
        check_observe(UARConfig(observe=section), args)


def test_a_probe_without_data_is_refused(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    for name in ("train", "build_train_valid_test_datasets"):
        monkeypatch.setattr(training, name, getattr(training, name))
    args = SimpleNamespace(
        **(LAYOUT | {"pipeline_model_parallel_size": 1, "context_parallel_size": 1}),
        num_layers=2,
        mtp_num_layers=None,
        num_experts=8,
        moe_router_topk=2,
        padded_vocab_size=32,
        mock_data=True,
    )
    section = {"probe_interval": 5, "interval": 5}
    observer = Observer([Model(layers("stock"))], UARConfig(observe=section), args)
    for data in (None, iter([{"tokens": ids(0)[0]}]), [{"tokens": ids(0)[0]}] * 3):
        observer.loop.data = data
        there = 3 if isinstance(data, list) else 0
        with pytest.raises(ConfigError, match=f"takes 4 sequences .* there are {there}"):
            observer._on_start()
    observer.loop.data = [{"tokens": ids(i)[0]} for i in range(4)]
    observer._on_start()
    assert [b["tokens"].shape for b in observer.loop._samples(range(4))] == [(1, 8)] * 4


def test_reading_data_before_training_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set may draw when it is read; the training's own draws stay what they were."""
    from megatron.training import training

    drawn = []
    monkeypatch.setattr(training, "train", lambda: drawn.append(next_draws()))
    monkeypatch.setattr(training, "build_train_valid_test_datasets", lambda: None)
    TrainingLoop(next_draws)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    training.train()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert drawn == [next_draws()]


def next_draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_monitoring_twice_or_with_bad_values_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import training

    from uar_megatron import monitor

    monkeypatch.setattr(training, "setup_model_and_optimizer", lambda: None)
    with pytest.raises(ConfigError, match=r"uar\.observe\.intervall: no such field"):
        watch_training(tmp_path, observe={"intervall": 3})
    watch_training(tmp_path, observe={"interval": 3})
    with pytest.raises(UARError, match="watched already"):
        watch_training(tmp_path)
    monkeypatch.setattr(monitor, "_watching", False)
