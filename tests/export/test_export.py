"""A run's checkpoint through `uar export` and back, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluated_run import CONFIG
from export_cases import opened
from jobs import checkpoint_tensors, environment, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.export.back import import_model
from uar_megatron.export.hf.routing_uar_moe import budget_groups
from uar_megatron.export.source import read_checkpoint
from uar_megatron.export.write import export_model

STEP = 8
TEXT = "Uncertain tokens get more experts and confident ones fewer."


def run(*arguments: object) -> str:
    """Run a `uar` command in this process; return what it prints."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def exported(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert run("export", text_run, "-o", folder) == f"{folder}\n"
    return folder


@pytest.mark.usefixtures("model_parallel")
def test_the_run_in_transformers(text_run: Path, exported: Path) -> None:
    """Tokens, logits and k of a text are those of the checkpoint in Megatron."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    exported_model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :30]
    with opened(text_run) as model:
        assert ids[0].tolist() == model.text.encode(TEXT)[:30]
        assert exported_model.config.vocab_size == model.text.vocab_size < 384
        assert exported_model.config.eos_token_id == model.text.eod
        expected = model.forward(ids, [ids.shape[1]])
    with torch.no_grad():
        output = exported_model(ids, output_routing=True)
    logits = expected.logits[..., : output.logits.shape[-1]]
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    k_LBS = torch.stack(output.experts_per_token)
    assert torch.equal(k_LBS, torch.from_numpy(expected.signals.k_LBS).long())
    assert len(k_LBS.unique()) > 2
    energy_LBS = torch.from_numpy(expected.signals.energy_LBS)
    torch.testing.assert_close(torch.stack(output.router_energy), energy_LBS, rtol=1e-5, atol=1e-5)


def test_it_stands_alone(exported: Path) -> None:
    """Another process, in which uar_megatron and megatron cannot be imported, generates text."""
    code = f"""
import sys
sys.modules["uar_megatron"] = sys.modules["uar_kernels"] = sys.modules["megatron"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
tokenizer.pad_token = tokenizer.eos_token
for dtype in ("auto", torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(
        {str(exported)!r}, trust_remote_code=True, dtype=dtype
    )
    assert model.model.layers[1].mlp.router.frozen.mean.dtype == torch.float64
    batch = tokenizer(["Two", "texts of several tokens"], return_tensors="pt", padding=True,
                      padding_side="left")
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    cached, plain = (model.generate(**batch, **options, use_cache=c) for c in (True, False))
    assert cached.shape[1] == batch.input_ids.shape[1] + 5
    if dtype == "auto":
        alone = tokenizer("Two", return_tensors="pt")
        assert torch.equal(cached, plain)
        assert torch.equal(model.generate(**alone, **options)[0, -5:], cached[0, -5:])
model.save_pretrained({str(exported.parent / "again")!r})
"""
    job = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr[-3000:]


def test_it_learns(exported: Path) -> None:
    """Gradients reach every weight, routers included, and what was frozen stays."""
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).train()
    ids = torch.randint(0, 250, (8, 30), generator=torch.Generator().manual_seed(1))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("model_parallel")
def test_there_and_back(text_run: Path, exported: Path, tmp_path: Path) -> None:
    """Bit-equal weights and state; our entry goes on from them, in another layout."""
    run("import", exported, "-o", tmp_path / "back")
    saved = checkpoint_tensors(text_run, STEP)
    model = {n: t for n, t in saved.items() if not n.startswith("optimizer.")}
    shutil.copytree(tmp_path / "back" / "release", tmp_path / "run/checkpoints/iter_0000000")
    back = checkpoint_tensors(tmp_path / "run", 0)
    assert back.keys() == model.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in model.items())
    again, first = read_checkpoint(tmp_path / "back"), read_checkpoint(text_run)
    assert again.uar == first.uar
    left_out = {"save", "load", "data_path", "data_cache_path", "tensorboard_dir"}
    assert first.experiment.megatron.keys() - again.experiment.megatron.keys() <= left_out
    logits = []
    for checkpoint in (tmp_path / "back", text_run):
        with opened(checkpoint) as loaded:
            tokens = torch.tensor([loaded.text.encode(TEXT)[:30]])
            logits.append(loaded.forward(tokens, [tokens.shape[1]]).logits)
    assert torch.equal(*logits)
    files = (
        f"tokenizer_model={text_run.parent / 'tokenizer'}",
        f"data_path=[{text_run.parent / 'data'}]",
    )
    once = ("train_iters=1", "lr_warmup_iters=0", "expert_model_parallel_size=2", "save=null")
    ours = train(2, tmp_path / "a", *CONFIG, *files, *once, f"load={tmp_path / 'back'}")
    as_it_was = (f"load={text_run / 'checkpoints'}", "finetune=true", "no_load_optim=true")
    theirs = train(2, tmp_path / "b", *CONFIG, *files, *once, *as_it_was)
    assert ours == theirs


def test_the_way_back_of_a_model_that_transformers_saved(
    text_run: Path, exported: Path, tmp_path: Path
) -> None:
    """Trained further there: a weight that has changed arrives."""
    folder = tmp_path / "further"
    shutil.copytree(exported, folder)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[5] += 1.0
    model.save_pretrained(folder)
    import_model(folder, tmp_path / "back")
    shutil.copytree(tmp_path / "back" / "release", tmp_path / "run/checkpoints/iter_0000000")
    back, saved = checkpoint_tensors(tmp_path / "run", 0), checkpoint_tensors(text_run, STEP)
    name = "decoder.layers.2.self_attention.linear_qkv.weight"
    changed = (back[name] != saved[name]).any(dim=1).nonzero().flatten().tolist()
    assert changed == [16 + 5]  # after the queries of the first of two heads
    assert all(torch.equal(back[n], saved[n]) for n in back if n != name)


def test_segments_end_with_the_sequence() -> None:
    """Two sequences, the second padded, in segments of four tokens."""
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    found = [group.tolist() for group in budget_groups(valid, 4)]
    assert found == [[0, 1, 2, 3], [4, 5, 6], [9, 10, 11, 12], [13]]
    whole = [group.tolist() for group in budget_groups(valid, None)]
    assert whole == [list(range(7)), list(range(9, 14))]


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "another header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif how == "no weights":
        weights.unlink()
    elif how == "no state":
        (folder / "megatron_state.safetensors").unlink()
    elif how == "no manifest":
        (folder / "uar_export.json").unlink()
    elif how == "manifest":
        (folder / "uar_export.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 7}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "model.safetensors is damaged"),
        ("another header", "model.safetensors is damaged"),
        ("no weights", "does not hold what"),
        ("no state", "megatron_state.safetensors is missing"),
        ("no manifest", "has no uar_export.json"),
        ("manifest", "uar_export.json is damaged"),
        ("sizes", "does not hold what"),
    ],
)
def test_damaged_exports_are_not_imported(
    how: str, message: str, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    damage(folder, how)
    with pytest.raises(DataError, match=message):
        import_model(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_no_checkpoint(text_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        read_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="latest_checkpointed_iteration"):
        read_checkpoint(tmp_path / "empty")
    shutil.copytree(text_run, tmp_path / "run")
    data = next((tmp_path / "run/checkpoints/iter_0000008").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(DataError, match="has 1000 bytes and should have"):
        read_checkpoint(tmp_path / "run")
    (tmp_path / "run/checkpoints/iter_0000008/.metadata").unlink()
    with pytest.raises(DataError, match="metadata is missing"):
        read_checkpoint(tmp_path / "run")


def test_outputs_and_tokenizers(text_run: Path, exported: Path, tmp_path: Path) -> None:
    source = read_checkpoint(text_run)
    with pytest.raises(DataError, match="exists already"):
        export_model(source, exported)
    with pytest.raises(DataError, match="exists already"):
        import_model(exported, text_run)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        export_model(source, tmp_path / "file" / "hf")
    with pytest.raises(DataError, match="--tokenizer"):
        export_model(source, tmp_path / "hf", tmp_path / "nothing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_policy_that_cannot_be_exported(text_run: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    saved = (text_run / "config.yaml").read_text()
    config.write_text(saved.replace("policy: uar", "policy: seq_topk"))
    with pytest.raises(ConfigError, match="seq_topk cannot be exported: its experts follow from"):
        run("export", text_run, "-o", tmp_path / "hf", "--config", config)
    source = read_checkpoint(text_run)
    refused = {"window_size": (4, 0), "normalization": "L2Norm", "moe_expert_capacity_factor": 0.0}
    for name, value in refused.items():
        usual = getattr(source.args, name)
        setattr(source.args, name, value)
        with pytest.raises(ConfigError, match=name):
            export_model(source, tmp_path / "hf")
        setattr(source.args, name, usual)
    source.args.moe_expert_capacity_factor = -1.0  # Megatron's other way to say none
    export_model(source, tmp_path / "no capacity")
    shutil.rmtree(tmp_path / "no capacity")
    source.tensors["decoder.layers.1.mlp.something.weight"] = torch.zeros(1)
    with pytest.raises(UARError, match="something"):
        export_model(source, tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]
