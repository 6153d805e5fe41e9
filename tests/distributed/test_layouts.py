"""The layout of the cluster does not change what is learned.

Every layout starts from one checkpoint (Megatron draws initial weights per layout) and takes 20
steps on the same global batches as a single rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import UNSAVED, losses, train

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

TP2 = ("tensor_model_parallel_size=2", "sequence_parallel=true")
EP2 = ("expert_model_parallel_size=2",)
PP2 = ("pipeline_model_parallel_size=2",)
# Megatron pads the vocabulary to a multiple of the divisor × TP, and the loss sees the padding.
VOCABULARY = "make_vocab_size_divisible_by=32"
MODEL = (
    VOCABULARY,
    *("num_layers=4", 'moe_layer_freq="[0]+[1]*3"', "moe_z_loss_coeff=0.001", "uar.policy=uar"),
    *("uar.budget.alpha=1.5", "uar.budget.k_max=6", "uar.bias.enabled=true"),
    *("uar.clb.enabled=true", "uar.clb.start_step=5", "uar.clb.warmup_steps=10"),
)
# Each micro-batch of each data-parallel rank is balanced by itself, and so is each sequence.
LOSSES = (
    "moe_router_load_balancing_type=[aux_loss,seq_aux_loss]",
    "moe_aux_loss_coeff=[0.01,0.02]",
)
PER_SEQUENCE = ("moe_router_load_balancing_type=seq_aux_loss", "moe_aux_loss_coeff=0.02")
MEAN = ("uar.budget.mode=mean", "uar.budget.target_mean_k=2.5", *LOSSES)
BUDGETS = {
    "mean": MEAN,
    "exact": ("uar.budget.mode=exact", "uar.budget.segment=8", *PER_SEQUENCE),
    "bounded": (
        *("uar.budget.mode=free", "uar.budget.max_rows_factor=1.1", "uar.budget.beta=2.5"),
        *("uar.budget.segment=16", *PER_SEQUENCE),
    ),
    "batch": ("uar.statistics.mode=batch", "micro_batch_size=4", *PER_SEQUENCE),
    "top_p": ("uar.policy=top_p", "uar.top_p.p=0.5", "uar.top_p.entropy_coeff=0.01", *LOSSES),
    "seq_topk": (
        *("uar.policy=seq_topk", "uar.budget.segment=8", "uar.budget.target_mean_k=2.5"),
        *PER_SEQUENCE,
    ),
    # λ is one for all layers, so all stages of a pipeline must agree on it.
    "relu": (
        *("uar.policy=relu", "uar.relu.initial_coeff=0.01", "uar.budget.target_mean_k=3"),
        *("moe_router_pre_softmax=true", "moe_router_load_balancing_type=none"),
        *("uar.bias.enabled=false", "uar.clb.enabled=false"),
    ),
}
LAYOUTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "DP4, distributed optimizer": ("mean", 4, ("use_distributed_optimizer=true",)),
    "EP2, allgather, grouped GEMM": (
        *("mean", 2),
        (*EP2, "moe_token_dispatcher_type=allgather", "moe_grouped_gemm=true"),
    ),
    "EP4": ("mean", 4, ("expert_model_parallel_size=4",)),
    "TP2, expert TP2": ("mean", 2, TP2),
    "TP2, EP2": ("mean", 2, (*TP2, *EP2, "expert_tensor_parallel_size=1")),
    "PP2 in 2 virtual stages": ("mean", 2, (*PP2, "num_layers_per_virtual_pipeline_stage=1")),
    "EP2 × DP2": ("mean", 4, EP2),
    "TP2 × EP2, distributed optimizer": (
        *("mean", 4),
        (*TP2, *EP2, "use_distributed_optimizer=true"),
    ),
    "PP2 × EP2": ("mean", 4, (*PP2, *EP2)),
    "exact, TP2 × EP2, micro-batch 4": ("exact", 4, (*TP2, *EP2, "micro_batch_size=4")),
    "bounded, TP2, micro-batch 1": ("bounded", 2, (*TP2, "micro_batch_size=1")),
    # The batch's own statistics are those of micro_batch_size × data-parallel ranks.
    "batch, EP2": ("batch", 2, (*EP2, "micro_batch_size=2")),
    "top_p, TP2 × EP2": ("top_p", 4, (*TP2, *EP2)),
    "seq_topk, TP2, EP2": ("seq_topk", 2, (*TP2, *EP2, "expert_tensor_parallel_size=1")),
    "relu, PP2 × EP2": ("relu", 4, (*PP2, *EP2)),
}
FROM = ("no_load_optim=true", "no_load_rng=true", "train_iters=23")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of step 3, written by a single rank."""
    run_dir = tmp_path_factory.mktemp("start")
    train(1, run_dir, *MODEL, *MEAN, "train_iters=3", "save_interval=3")
    return f"load={run_dir}/checkpoints"


@pytest.fixture(scope="module")
def alone(start: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """For each budget the run of a single rank."""

    @functools.cache
    def run_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        train(1, folder, *MODEL, *BUDGETS[name], *UNSAVED, start, *FROM)
        return folder

    return run_of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(
    layout: str, start: str, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Losses to 1e-6, decisions exactly: k, expert loads, ω, bias, β, statistics, gradient norm."""
    budget, ranks, options = LAYOUTS[layout]
    train(ranks, tmp_path, *MODEL, *BUDGETS[budget], *UNSAVED, start, *FROM, *options)
    expected = read_run(alone(budget) / "run.jsonl").steps
    found = read_run(tmp_path / "run.jsonl").steps
    assert [s.step for s in found] == [s.step for s in expected] == list(range(4, 24))
    for ours, single in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(single.loss, rel=1e-6)
        assert ours.grad_norm == pytest.approx(single.grad_norm, rel=1e-5)
        assert (ours.flops, ours.flops_ratio) == (single.flops, single.flops_ratio)
        for a, b in zip(ours.layers, single.layers, strict=True):
            assert (a.layer, a.k_histogram, a.load) == (b.layer, b.k_histogram, b.load), ours.step
            assert (a.trimmed, a.rows, a.bias_max_abs) == (b.trimmed, b.rows, b.bias_max_abs)
            assert a.policy == pytest.approx(b.policy, rel=1e-5)
            for name in ("omega_mean", "zscore_std", "energy_mean", "entropy_mean"):
                value = getattr(b, name)
                if value is not None:
                    assert getattr(a, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name
            for loss, value in b.balancing_loss.items():
                assert a.balancing_loss[loss] == pytest.approx(value, rel=1e-5)
    if budget == "exact":
        assert all(len({layer.k_eff for layer in s.layers} | {2.0}) == 1 for s in found)
    if budget == "seq_topk":
        assert all({layer.k_eff for layer in s.layers} == {2.5} for s in found)
    if budget == "relu":
        coeffs = [{layer.policy["l1_coeff"] for layer in s.layers} for s in found]
        assert all(len(c) == 1 for c in coeffs)
        assert len(set.union(*coeffs)) > 3
    if budget in ("top_p", "relu"):
        assert all(layer.balancing_loss["policy_loss"] > 0 for s in found for layer in s.layers)
    if budget == "bounded":
        assert any(layer.trimmed > 0 for s in found for layer in s.layers)


# Plain optimizers cannot pass between EP 1 and more: Megatron chains another number of them.
CHAINS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    "plain": (
        (2, EP2),
        (4, ("expert_model_parallel_size=4",)),
        (4, (*TP2, *EP2)),
        (4, (*PP2, *EP2)),
    ),
    "distributed optimizer": ((1, ()), (2, ()), (2, TP2), (2, PP2), (1, ())),
    "distributed optimizer, EP": ((2, EP2), (4, (*TP2, *EP2)), (2, EP2)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_changes_its_layout_goes_on_as_if_nothing_had_happened(
    chain: str, tmp_path: Path
) -> None:
    """Optimizer state included, against a run in the first layout."""
    links = CHAINS[chain]
    common = (*MODEL, *MEAN, "save_interval=3", f"train_iters={3 * len(links)}")
    common += ("no_load_rng=true",)
    if "distributed" in chain:
        common += ("use_distributed_optimizer=true", "dist_ckpt_optim_fully_reshardable=true")
    ranks, layout = links[0]
    straight = train(ranks, tmp_path / "straight", *common, *layout)
    for i, (ranks, layout) in enumerate(links, start=1):
        train(ranks, tmp_path / "chain", *common, *layout, f"exit_interval={3 * i}")
    found = losses(tmp_path / "chain")
    assert found == pytest.approx(straight, rel=1e-6)
    ours, single = (read_run(tmp_path / d / "run.jsonl").steps for d in ("chain", "straight"))
    for a, b in zip(ours, single, strict=True):
        assert [layer.load for layer in a.layers] == [layer.load for layer in b.layers], a.step


@pytest.mark.parametrize("policy", ["uar", "relu"])
def test_a_pipeline_stage_without_moe_layers(policy: str, tmp_path: Path) -> None:
    """Every rank takes part in the reductions of log and λ, whether it has routers or not."""
    options = BUDGETS["relu"] if policy == "relu" else ("uar.policy=uar", "uar.bias.enabled=true")
    losses = train(
        2,
        tmp_path,
        *("pipeline_model_parallel_size=2", "num_layers=2", 'moe_layer_freq="[0,1]"'),
        *(*options, "train_iters=5", *UNSAVED),
    )
    assert losses[5] < losses[1]
    expected = 0.01
    for step in read_run(tmp_path / "run.jsonl").steps:
        (metrics,) = step.layers
        assert metrics.layer == 2
        assert metrics.tokens == 8 * 32
        if policy == "relu":
            coeff, active = metrics.policy["l1_coeff"], metrics.k_eff
            expected *= 1.2 ** ((active > 3) - (active < 3))
            assert coeff == pytest.approx(expected, rel=1e-9)
        else:
            assert metrics.bias_max_abs is not None
