"""The loaded model says what the training's model says: logits, experts, energy, entropy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_run import (
    WINDOW,
    build_tokenizer,
    forgotten_afterwards,
    padded,
    recorded,
    write_data,
)

from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.evaluation import load
from uar_megatron.evaluation.checkpoint import evaluation_experiment, locate
from uar_megatron.evaluation.identity import identity_of
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.perplexity import perplexity
from uar_megatron.evaluation.usage import Usage
from uar_megatron.mcore.step import routers_of
from uar_megatron.policies.base import KernelPolicy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("model_parallel")]


@pytest.fixture(scope="module")
def loaded(model_parallel: None) -> Iterator[None]:
    """For tests that load models of their own."""
    with forgotten_afterwards():
        yield


def compare(model: CheckpointModel, run: Path, is_left: bool = False) -> None:
    sequences, found = recorded(run)
    lengths = [len(s) for s in sequences]
    got = model.forward(padded(sequences, is_left), lengths, padding="left" if is_left else "right")
    for b, (length, want) in enumerate(zip(lengths, found, strict=True)):
        at = slice(WINDOW - length, WINDOW) if is_left else slice(0, length)
        torch.testing.assert_close(got.logits[b, at], want["logits"], atol=1e-5, rtol=1e-5)
        assert (got.signals.k_LBS[:, b, at] == want["k"].numpy()).all()
        for name in ("energy", "entropy"):
            values = getattr(got.signals, f"{name}_LBS")[:, b]
            np.testing.assert_allclose(values[:, at], want[name].numpy(), atol=1e-5)
            assert np.isfinite(values).sum() == length * len(values)
        assert got.signals.k_LBS[:, b].sum() == want["k"].sum()
    slots_LE = sum(want["slots"] for want in found).numpy()
    assert (got.signals.slots_LE == slots_LE).all()
    assert len(np.unique(got.signals.k_LBS)) > 3  # not the same k for everybody


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("is_left", [False, True])
def test_forward_is_the_trainings(
    model: CheckpointModel, run: Path, batch_size: int, is_left: bool
) -> None:
    model._ranks.batch_size = batch_size
    assert model.is_per_token
    assert model.located.iteration == 8
    compare(model, run, is_left)


def test_padding_on_the_left_needs_no_mask(
    model: CheckpointModel, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kinds of attention take none, and would see it."""
    monkeypatch.setattr(model.args, "create_attention_mask_in_dataloader", False)
    compare(model, run, is_left=True)


def test_scores_are_those_of_the_logits(model: CheckpointModel, run: Path) -> None:
    sequences, found = recorded(run)
    # More of them than the window has tokens; not in order, and one twice.
    finals = [[7, 1, 7], [], [3], [*range(299, 299 - WINDOW - 1, -1), 0], [5]]
    scored = model.score(sequences, finals)
    for s, after, want, own, last in zip(
        sequences, finals, found, scored.own, scored.finals, strict=True
    ):
        logprob_SV = torch.log_softmax(want["logits"], dim=-1)
        best = logprob_SV[:, :300].argmax(dim=-1).tolist()
        expected = [float(logprob_SV[i, token]) for i, token in enumerate(s[1:])]
        np.testing.assert_allclose(own[:, 0], expected, atol=1e-5)
        assert own[:, 1].tolist() == [best[i] == token for i, token in enumerate(s[1:])]
        np.testing.assert_allclose(last[:, 0], [float(logprob_SV[-1, t]) for t in after], atol=1e-5)
        assert last[:, 1].tolist() == [best[-1] == t for t in after]
    logits = model.last_logits(padded(sequences), [len(s) for s in sequences]).logits
    for row, want in zip(logits, found, strict=True):
        torch.testing.assert_close(row[:300], want["logits"][-1, :300], atol=1e-5, rtol=1e-5)
        assert row[300:].isinf().all()


def test_usage_counts_the_trainings_experts(model: CheckpointModel, run: Path) -> None:
    sequences, found = recorded(run)
    usage = Usage()
    signals = model.score(sequences, [[]] * len(sequences)).signals
    for b, s in enumerate(sequences):
        usage.add(signals, b, len(s))
    got = usage.describe(model.shape)
    k = torch.cat([want["k"] for want in found], dim=1).double()
    assert got["k_eff"] == pytest.approx(float(k.mean()))
    assert got["layers"]["4"]["k_eff"] == pytest.approx(float(k[2].mean()))
    energy = torch.cat([want["energy"] for want in found], dim=1)
    assert got["energy"] == pytest.approx(float(energy.mean()), abs=1e-5)
    # By hand: hidden 32, experts of width 24 with three matrices, a dense layer of 48.
    tokens = sum(map(len, sequences))
    context = sum(len(s) ** 2 for s in sequences) / tokens
    attention = 2 * 32 * 96 + 2 * context * 32 + 2 * 32 * 32
    layers = 4 * attention + 6 * 32 * 48 + 3 * 2 * 32 * 8 + float(k.mean(dim=1).sum()) * 6 * 32 * 24
    flops = layers + 2 * 32 * 384
    assert got["flops_per_token"] == pytest.approx(flops)
    stock = flops + (6.0 - float(k.mean(dim=1).sum())) * 6 * 32 * 24
    assert got["flops_ratio"] == pytest.approx(flops / stock)


def test_stock_routing_is_noticed(run: Path, loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from uar_megatron.mcore import spec
    from uar_megatron.mcore.compat import default_layer_spec

    monkeypatch.setattr(spec, "uar_layer_spec", lambda uar: default_layer_spec)
    with pytest.raises(UARError, match="TopKRouter, not with UARRouter"):
        CheckpointModel(run)
    # And if nobody asked for their class, their experts would give them away.
    monkeypatch.setattr(spec, "assert_uar_routers", lambda model: None)
    with CheckpointModel(run) as model, pytest.raises(AssertionError):
        compare(model, run)


def test_an_evaluation_leaves_no_scale_of_losses_behind(run: Path, loaded: None) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    with CheckpointModel(run, batch_size=1) as model:
        model.score([[1, 2], [3], [4]], [[5], [6], [7]])
        assert MoEAuxLossAutoScaler.main_loss_backward_scale == pytest.approx(1 / 3)
    load.forget_globals()
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None


EXACT = ("uar.budget.mode=exact", "uar.budget.target_mean_k=1.5")


@pytest.mark.parametrize(
    ("overrides", "segment"),
    [
        (EXACT, None),
        ((*EXACT, "uar.budget.segment=8"), 8),
        (("uar.policy=seq_topk", "uar.budget.segment=8", "uar.budget.target_mean_k=1.5"), 8),
    ],
)
def test_what_counts_over_tokens_counts_over_one_sequence(
    run: Path, loaded: None, overrides: tuple[str, ...], segment: int | None
) -> None:
    with CheckpointModel(run, overrides) as model:
        assert not model.is_per_token
        sequences, _ = recorded(run)
        lengths = [len(s) for s in sequences]
        together = model.forward(padded(sequences), lengths)
        for b, s in enumerate(sequences):
            alone = model.forward(torch.tensor([s]), [len(s)])
            torch.testing.assert_close(alone.logits[0], together.logits[b, : len(s)])
            k_LS = together.signals.k_LBS[:, b, : len(s)]
            assert (alone.signals.k_LBS[:, 0] == k_LS).all()
            for first in range(0, len(s), segment or len(s)):
                part = k_LS[:, first : first + (segment or len(s))]
                assert (part.sum(axis=1) == round(part.shape[1] * 1.5)).all()
        for router in routers_of(model._ranks.model):
            if segment and isinstance(router.policy, KernelPolicy):  # as the kernels ask
                k_T, _ = router.policy.experts_of(torch.randn(20), router.step, 1)
                assert [int(part.sum()) for part in k_T.split(segment)] == [12, 12, 6]


def test_perplexity_is_that_of_joined_documents(model: CheckpointModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 256, n) for n in (30, 7, 100, 25)]
    write_data(tmp_path / "valid", documents)
    stream = np.concatenate(documents).tolist()
    model._ranks.batch_size = 8
    got = perplexity(model, str(tmp_path / "valid"), batch_size=2)
    total, slots_LE = 0.0, 0
    for first in range(0, len(stream) - 1, WINDOW):
        piece = stream[first : first + WINDOW + 1]
        whole = model.forward(torch.tensor([piece[:-1]]), [len(piece) - 1])
        logprob_SV = torch.log_softmax(whole.logits[0].double(), dim=-1)
        total -= sum(float(logprob_SV[i, t]) for i, t in enumerate(piece[1:]))
        slots_LE = slots_LE + whole.signals.slots_LE
    assert got["sequences"] == 4
    assert got["tokens"] == len(stream) - 1
    assert got["loss"] == pytest.approx(total / (len(stream) - 1), abs=1e-6)
    assert got["perplexity"] == pytest.approx(np.exp(total / (len(stream) - 1)), rel=1e-5)
    violations = slots_LE.max(axis=1) / slots_LE.mean(axis=1) - 1
    assert got["max_vio"] == pytest.approx(violations.mean())
    assert perplexity(model, str(tmp_path / "valid"), limit=2)["sequences"] == 2
    with pytest.raises(DataError):
        perplexity(model, str(tmp_path / "nothing"))


def test_bad_tokens(model: CheckpointModel) -> None:
    for rows, why in (
        ([[]], "1 sequences of 0"),
        ([[1] * (WINDOW + 1)], f"1 … {WINDOW} tokens"),
        ([[5000]], "ids 5000"),
        ([[-1]], "ids -1"),
    ):
        with pytest.raises(UARError, match=why):
            model.score(rows, [[]])
    with pytest.raises(UARError, match="ids 1 … 5000"):
        model.score([[1]], [[5000, 1]])


def copied(run: Path, folder: Path) -> Path:
    target = folder / "run"
    shutil.copytree(run, target)
    return target / "checkpoints" / "iter_0000008"


def test_damaged_checkpoints(run: Path, tmp_path: Path, loaded: None) -> None:
    with pytest.raises(DataError, match="is no folder"):
        CheckpointModel(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no latest_checkpointed_iteration\.txt"):
        CheckpointModel(tmp_path)
    folder = copied(run, tmp_path)
    with pytest.raises(DataError, match=r"iter_0000009 does not exist|is no folder"):
        CheckpointModel(folder.with_name("iter_0000009"))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("eight")
    with pytest.raises(DataError, match="holds 'eight'"):
        CheckpointModel(folder.parent)
    data = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(DataError, match=f"is incomplete: {data.name} has"):
        CheckpointModel(folder)
    data.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"cannot be used|does not load"):
        CheckpointModel(folder)
    data.unlink()
    with pytest.raises(DataError, match=f"{data.name} is missing"):
        CheckpointModel(folder)
    (folder.parent / "config.yaml").unlink()
    (folder.parents[1] / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml that a run leaves"):
        CheckpointModel(folder)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("expert_model_parallel_size=3",), "expert_model_parallel_size: 1 ranks"),
        (("tensor_model_parallel_size=2",), "tensor_model_parallel_size: 1 ranks"),
        (("context_parallel_size=2",), "context_parallel_size: 2"),
        (("hidden_size=64",), "does not load"),
        (("no_such_key=1",), "no_such_key"),
        (("uar.policy=nothing",), "uar.policy"),
        (("launch",), "not an override"),
    ],
)
def test_bad_overrides(run: Path, loaded: None, overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(UARError, match=why):
        CheckpointModel(run, overrides)


def test_layouts_that_do_not_divide(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    experiment = evaluation_experiment(locate(run), ["expert_model_parallel_size=3"])
    with pytest.raises(ConfigError, match="8 experts cannot be divided by 3"):
        load.check_layout(experiment)
    experiment = evaluation_experiment(locate(run), ["pipeline_model_parallel_size=3"])
    with pytest.raises(ConfigError, match="4 layers cannot be divided by 3"):
        load.check_layout(experiment)


def test_identity_is_that_of_what_decides_about_answers(run: Path, tmp_path: Path) -> None:
    located = locate(copied(run, tmp_path))

    def identity(*overrides: str) -> str:
        return identity_of(located, evaluation_experiment(located, overrides))

    own = identity()
    assert identity("expert_model_parallel_size=2", "tensor_model_parallel_size=2") == own
    assert identity("uar.budget.mode=mean") != own
    assert identity_of(locate(run), evaluation_experiment(locate(run))) != own
    merges = tmp_path / "merges.txt"
    merges.write_text("a b")
    before = identity(f"merge_file={merges}")
    merges.write_text("a b c")
    assert identity(f"merge_file={merges}") != before
    for file in (located.folder / ".metadata", next(located.folder.glob("*.distcp"))):
        own = identity()
        os.utime(file, (0, 0))
        assert identity() != own


def test_another_tokenizer(run: Path, tmp_path: Path, loaded: None) -> None:
    other = build_tokenizer(tmp_path / "other", ["text"], size=500)
    with pytest.raises(DataError, match=r"has 500 tokens, which are padded to 512; .* 384 rows"):
        CheckpointModel(run, [f"tokenizer_model={other}"])
    with pytest.raises(DataError, match="does not exist"):
        CheckpointModel(run, [f"tokenizer_model={tmp_path / 'none'}"])


def test_a_checkpoint_without_statistics(
    run: Path, loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uar_megatron.evaluation import layout

    saved = layout._saved

    def stock(located: Any) -> dict[str, Any]:
        return {name: of for name, of in (saved(located) or {}).items() if ".uar_" not in name}

    monkeypatch.setattr(layout, "_saved", stock)
    with pytest.raises(DataError, match="no statistics of UAR routers"):
        CheckpointModel(run)


def test_a_group_of_settings_overrides_the_run(run: Path) -> None:
    experiment = evaluation_experiment(locate(run), ["routing=topk", "lr=1e-5"])
    assert experiment.uar.policy == "topk"
    assert experiment.megatron["lr"] == 1e-5
    assert experiment.megatron["micro_batch_size"] == 1
    assert "data_path" not in experiment.megatron
    # A group that builds upon another.
    experiment = evaluation_experiment(locate(run), ["balance=auxfree_clb"])
    assert experiment.uar.clb.enabled
    assert experiment.uar.bias.enabled
    with pytest.raises(ConfigError, match="asks for balance/none"):
        evaluation_experiment(locate(run), ["balance=none"])
