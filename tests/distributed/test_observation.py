"""Observed trainings: signals against what was recorded, and not a bit of the training changed."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from jobs import UNSAVED, losses, train, train_arguments, train_stock, warm_torchrun

from uar_megatron.reporting.html import render
from uar_megatron.reporting.runlog import read_run
from uar_megatron.reporting.schema import LayerObservation
from uar_megatron.reporting.view import load_views

pytestmark = pytest.mark.slow

OBSERVED = (
    *("uar.observe.interval=2", "uar.observe.probe_interval=3", "uar.observe.probe_sequences=2"),
    "uar.observe.segment=8",
)
ROUTING = ("uar.policy=uar", "uar.budget.alpha=1.5", "uar.budget.k_max=5", "uar.budget.k_min=0")
# The evaluation at the end is counted to the step after the last probe.
SHORT = ("train_iters=7", *UNSAVED)
EXPERTS = 8


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two data sets whose token ids tell them apart: below 50, and from 50 on."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("blend")
    generator = np.random.default_rng(3)
    for name, (low, high) in {"a": (0, 50), "b": (50, 128)}.items():
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for _ in range(40):
            ids = low + ((high - low) * generator.random(200) ** 1.5).astype(int)
            builder.add_document(torch.from_numpy(ids), [len(ids)])
        builder.finalize(str(folder / f"{name}.idx"))
    return f"data_path=[0.3,{folder}/a,0.7,{folder}/b]"


def recorded(nproc: int, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train and return what each rank has recorded."""
    run_dir.mkdir()
    arguments = train_arguments(nproc, run_dir, *SHORT, *ROUTING, *OBSERVED, *overrides)
    script = str(Path(__file__).parents[1] / "recorded_pretrain.py")
    job = warm_torchrun(nproc, script, *arguments[2:])
    assert job.returncode == 0, job.stderr[-6000:]
    return [torch.load(run_dir / f"rank_{r}.pt", weights_only=False) for r in range(nproc)]


def test_four_ranks(blend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP2 with sequence parallelism, EP2, expert TP2, DP2, two data sets."""
    layout = (
        *("tensor_model_parallel_size=2", "sequence_parallel=true", "mock_data=false"),
        *("expert_model_parallel_size=2", "expert_tensor_parallel_size=2", blend),
    )
    monkeypatch.setenv("RECORD", str(tmp_path / "on"))
    ranks = recorded(4, tmp_path / "on", *layout)
    run = read_run(tmp_path / "on" / "run.jsonl")
    assert [o.step for o in run.observations] == [2, 3, 4, 6]
    observed = {(o.step, m.layer): m for o in run.observations for m in o.layers}
    for step, layer in product((2, 4, 6), (2, 3)):
        check_tokens(observed[step, layer], ranks, step, layer)
    for step, layer in product((3, 6), (2, 3)):
        check_probe(observed[step, layer], ranks, step, layer)
    assert len(observed[2, 2].classes) == 12
    # Steps 2, 4 and 6 and the probes' forwards have left no trace in the training.
    off = train(4, tmp_path / "off", *SHORT, *ROUTING, *layout)
    assert losses(tmp_path / "on") == off


def calls(
    rank: dict[str, Any], step: int, layer: int, training: bool = True
) -> list[dict[str, Any]]:
    """A router's calls of one step; of those that are recomputed the first passes."""
    found = [
        c
        for c in rank["calls"]
        if (c["step"], c["layer"], c["training"]) == (step, layer, training)
    ]
    first = [c for c in found if not c["grad"]]
    return first or found


def check_tokens(
    found: LayerObservation, ranks: list[dict[str, Any]], step: int, layer: int
) -> None:
    """The signals of a step's tokens against all ranks' records."""
    deciles = brute_force.deciles(ranks[0]["counts"][0].numpy())
    logits, ks, classes = [], [], []
    for rank in ranks:
        for call in calls(rank, step, layer):
            sequence, tokens = len(call["logits"]), call["tokens"]
            logits.append(call["logits"].reshape(-1, EXPERTS).numpy())
            ks.append(call["map"].sum(dim=-1).flatten().numpy())
            if tokens is None:
                classes += [[]] * len(logits[-1])
                continue
            start = rank["tp"] * sequence if tokens.shape[1] > sequence else 0
            own = tokens[:, start : start + sequence].T.flatten().tolist()
            classes += [[deciles[i], f"domain_{int(i >= 50)}"] for i in own]
    expected = brute_force.token_signals(np.concatenate(logits), np.concatenate(ks), classes)
    brute_force.assert_token_signals(found.model_dump(), expected)
    weight = next(c["weight"] for rank in ranks for c in calls(rank, step, layer))
    norms = np.linalg.norm(weight.double().numpy(), axis=1)
    np.testing.assert_allclose(found.router_row_norms, norms, rtol=1e-5)


def check_routing(
    found: LayerObservation, ranks: list[dict[str, Any]], step: int, layer: int
) -> None:
    """How the probe batch is routed against all ranks' records."""
    maps = {
        at: [c["map"] for rank in ranks for c in calls(rank, at, layer, training=False)]
        for at in (3, 6)
    }
    pieces = [m[:, b].numpy() for m in maps[step] for b in range(m.shape[1])]
    for size, rate in found.cache_hit_rates.items():
        assert math.isclose(rate, brute_force.hit_rate(pieces, 8, int(size))), size
    if step == 3:
        assert found.stability is None
    else:
        now, then = (torch.cat([m.flatten(0, 1) for m in maps[at]]).numpy() for at in (6, 3))
        assert math.isclose(found.stability, brute_force.jaccard(now, then))
        assert found.stability < 1


def check_probe(
    found: LayerObservation, ranks: list[dict[str, Any]], step: int, layer: int
) -> None:
    """The signals of the probe batch and of the experts against all ranks' records."""
    check_routing(found, ranks, step, layer)
    experts, inputs = experts_of(ranks, step, layer)
    vectors = np.stack([np.concatenate([w.flatten() for w in e]) for e in experts])
    cosine = brute_force.pair_cosine(vectors)
    assert math.isclose(found.weight_similarity, cosine, abs_tol=1e-6)
    outputs = np.stack([expert_output(*e, inputs) for e in experts])
    cosine = np.mean([brute_force.pair_cosine(outputs[:, t]) for t in range(len(inputs))])
    assert math.isclose(found.output_similarity, cosine, abs_tol=1e-5)


def experts_of(ranks: list[dict[str, Any]], step: int, layer: int) -> tuple[list[Any], np.ndarray]:
    """Whole experts ``(gate, linear, out)`` in order, and the tokens that they were given."""
    shards: dict[int, dict[int, Any]] = {}
    inputs = []
    for rank in ranks:
        (probed,) = [p for p in rank["probed"] if (p["step"], p["layer"]) == (step, layer)]
        inputs.append(probed["inputs"].double().numpy())
        for i, expert in enumerate(probed["experts"]):
            number = rank["ep"] * len(probed["experts"]) + i
            shards.setdefault(number, {})[rank["etp"]] = expert
    assert all(np.array_equal(i, inputs[0]) for i in inputs)
    whole = []
    for number in sorted(shards):
        parts = [shards[number][etp] for etp in sorted(shards[number])]
        gates, linears = zip(
            *(p["linear_fc1.weight"].double().chunk(2) for p in parts), strict=True
        )
        out = torch.cat([p["linear_fc2.weight"].double() for p in parts], dim=1)
        whole.append((torch.cat(gates).numpy(), torch.cat(linears).numpy(), out.numpy()))
    assert len(whole) == EXPERTS
    return whole, inputs[0]


def expert_output(
    gate: np.ndarray, linear: np.ndarray, out: np.ndarray, inputs: np.ndarray
) -> np.ndarray:
    """A SwiGLU expert."""
    gated = inputs @ gate.T
    return (gated / (1 + np.exp(-gated)) * (inputs @ linear.T)) @ out.T


def test_virtual_pipeline_with_recomputation(
    blend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches in flight; classes on the stage that sees token ids, the probe through all."""
    monkeypatch.setenv("RECORD", str(tmp_path / "on"))
    ranks = recorded(
        *(2, tmp_path / "on", "pipeline_model_parallel_size=2", "num_layers=4"),
        *('moe_layer_freq="[1]*4"', "num_layers_per_virtual_pipeline_stage=1", blend),
        *("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
        "mock_data=false",
    )
    run = read_run(tmp_path / "on" / "run.jsonl")
    observed = {(o.step, m.layer): m for o in run.observations for m in o.layers}
    for step, layer in product((2, 4, 6), (1, 2, 3, 4)):
        # Rank 0 holds layers 1 and 3; only the first chunk is given ids.
        check_tokens(observed[step, layer], ranks, step, layer)
        assert (observed[step, layer].classes is not None) == (layer == 1)
    for step, layer in product((3, 6), (1, 2, 3, 4)):
        check_routing(observed[step, layer], ranks, step, layer)
        assert observed[step, layer].weight_similarity is not None


def test_monitoring_stock_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own routers, its own losses to the last bit, and a run log that can be reported."""
    keys = ["expert_model_parallel_size=2", "train_iters=6", "eval_interval=3", "log_interval=2"]
    keys += UNSAVED
    stock = train_stock(2, tmp_path / "stock", keys)
    monkeypatch.setenv("WATCH", str(tmp_path / "log"))
    assert train_stock(2, tmp_path / "watched", [*keys, *OBSERVED]) == stock
    run = read_run(tmp_path / "log" / "run.jsonl")
    assert run.end.reason == "finished"
    assert [s.step for s in run.steps] == [2, 4, 6]
    assert run.steps[0].layers[0].tokens == 2 * 8 * 32
    assert run.steps[0].layers[0].rows == 2 * 8 * 32
    assert [o.step for o in run.observations] == [2, 3, 4, 6]
    assert run.validations[0].step == 3
    page = render(load_views([tmp_path / "log"]))
    assert '"output_similarity":[[' in page
