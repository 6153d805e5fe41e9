"""Architectures that transformers has itself: the same logits, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import trained_source
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import ConfigError
from uar_megatron.export.source import read_checkpoint
from uar_megatron.export.stock import describe_loss, export_stock
from uar_megatron.reporting.runlog import read_run

VOCABULARY = 120
MODELS = {
    "mixtral": ("moe_layer_freq=1", "untie_embeddings_and_output_weights=true", "rotary_base=5000"),
    "qwen3_moe": ("qk_layernorm=true", "moe_router_pre_softmax=true"),
}


def loaded(folder: Path) -> torch.nn.Module:
    """The model in a folder. The CPU layer, which tests of Megatron live in, keeps transformers
    from computing buffers that are not in the files; building the model anew does that."""
    saved = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(saved.config)
    model.load_state_dict(saved.state_dict())
    return model.eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand(tokens.shape).contiguous()
    with torch.no_grad():
        return model(tokens, positions, mask)[..., :VOCABULARY]


@pytest.mark.usefixtures("model_parallel")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("routing", ["topk", "uar.budget"])
def test_top_k_goes_without_loss(name: str, routing: str, tmp_path: Path) -> None:
    """Also a policy that gives every token the same number, here another than moe_router_topk."""
    constant = ("routing=uar_ae", "uar.budget.alpha=0", "uar.budget.beta=3")
    policy = ("routing=topk",) if routing == "topk" else constant
    source, megatron = trained_source(tmp_path, *policy, *MODELS[name])
    assert export_stock(source, tmp_path / "hf", name) == []
    model = loaded(tmp_path / "hf")
    assert model.config.model_type == name
    tokens = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, logits_of(megatron, tokens), rtol=1e-5, atol=1e-5)
    # A weaker check would miss the other rule for the weights, or another k.
    source.args.moe_router_pre_softmax = not source.args.moe_router_pre_softmax
    if name == "mixtral":
        with pytest.raises(ConfigError, match="weights of experts are as_they_are"):
            export_stock(source, tmp_path / "other", name)
        return
    export_stock(source, tmp_path / "other", name)
    with torch.no_grad():
        others = loaded(tmp_path / "other")(tokens).logits
    assert (others - logits).abs().max() > 1e-3


@pytest.mark.usefixtures("model_parallel")
def test_routing_that_would_change_is_refused(tmp_path: Path) -> None:
    source, _ = trained_source(tmp_path, "routing=uar_ae", *MODELS["qwen3_moe"])
    with pytest.raises(ConfigError, match="--freeze-k"):
        export_stock(source, tmp_path / "hf", "qwen3_moe")
    with pytest.raises(ConfigError, match="1 … 8"):
        export_stock(source, tmp_path / "hf", "qwen3_moe", freeze_k=9)
    (sentence,) = export_stock(source, tmp_path / "hf", "qwen3_moe", freeze_k=2)
    assert "not measured" in sentence
    frozen = loaded(tmp_path / "hf")
    assert frozen.config.num_experts_per_tok == 2


@pytest.mark.usefixtures("model_parallel")
def test_other_models_are_refused(tmp_path: Path) -> None:
    source, _ = trained_source(tmp_path, "routing=topk", *MODELS["qwen3_moe"])
    with pytest.raises(ConfigError, match="uar, mixtral, qwen3_moe"):
        export_stock(source, tmp_path / "hf", "mixtrl")
    with pytest.raises(ConfigError, match="qk_norm is True, and False there"):
        export_stock(source, tmp_path / "hf", "mixtral")
    biased, _ = trained_source(
        tmp_path, "routing=auxfree", "uar.bias.enabled=true", *MODELS["qwen3_moe"]
    )
    with pytest.raises(ConfigError, match="bias_dtype"):
        export_stock(biased, tmp_path / "hf", "qwen3_moe", freeze_k=2)
    assert not (tmp_path / "hf").exists()


def test_the_log_says_what_is_lost(text_run: Path) -> None:
    source = read_checkpoint(text_run)
    last = read_run(text_run / "run.jsonl").steps[-1]
    same = [layer.k_histogram[2] for layer in last.layers]
    share = 1 - sum(same) / len(same)
    assert 0.1 < share < 1.0
    assert f"another number for {share:.1%} of the tokens" in describe_loss(source, 2)
    assert "100.0%" in describe_loss(source, 8)


def test_what_no_freezing_mends(text_run: Path, tmp_path: Path) -> None:
    """The run has a dense layer: no Mixtral. And our own architecture freezes nothing."""
    options = ["export", str(text_run), "-o", str(tmp_path / "hf"), "--freeze-k", "2"]
    for more, message in (
        (["--architecture", "mixtral"], "dense layers is 1, and 0 there"),
        ([], "freeze_k"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, [*options, *more], catch_exceptions=False)
