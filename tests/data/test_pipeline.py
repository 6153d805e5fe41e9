"""A corpus of many shards: every document once, whatever the nodes, workers and resumptions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from corpora import (
    EOD,
    as_text,
    build,
    contents,
    documents,
    put_shard,
    put_sources,
    random_texts,
    recipe,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.data.build import build_dataset
from uar_megatron.data.index_file import token_dtype
from uar_megatron.data.pipeline.manifest import merge_corpus, verify_corpus
from uar_megatron.data.pipeline.plan import assign, open_plan
from uar_megatron.data.pipeline.recipe import load_recipe
from uar_megatron.data.pipeline.share import tokenize_share
from uar_megatron.errors import ConfigError, DataError
from uar_megatron.pretrain import _data_prefixes


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), nodes=st.integers(1, 9))
@settings(deadline=None)
def test_every_shard_falls_to_one_node_and_the_bytes_are_even(sizes: list[int], nodes: int) -> None:
    shares = assign(sizes, nodes)
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert len(shares) == nodes
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) <= sum(sizes) / nodes + max(sizes, default=0)
    assert all(share == sorted(share) for share in shares)


def test_the_largest_shards_are_dealt_first() -> None:
    assert assign([1, 1, 1, 1, 4], 2) == [[4], [0, 1, 2, 3]]


def test_nodes_and_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    kept = put_sources(tmp_path / "in")
    made = recipe(tmp_path / "in", validation={"fraction": 0.2})
    build(made, tmp_path / "one")
    expected = contents(tmp_path / "one")
    for nodes, workers in ((3, 1), (1, 2)):
        out = tmp_path / f"{nodes}x{workers}"
        for node in reversed(range(nodes)):
            tokenize_share(open_plan(made, out), out, node, nodes, workers, progress=False)
            if node:
                with pytest.raises(DataError, match="of 8 shards are not tokenized"):
                    merge_corpus(open_plan(made, out), out)
        merge_corpus(open_plan(made, out), out)
        assert contents(out) == expected
    for name, texts in kept.items():
        train, valid = (as_text(tmp_path / "one" / f"{name}_{s}") for s in ("train", "valid"))
        assert Counter(train + valid) == Counter(texts)
        assert [text for text in texts if text not in set(valid)] == train  # in their order
        assert 0.1 < len(valid) / len(texts) < 0.3
        assert not set(train) & set(valid)


def test_a_corpus_is_what_one_build_of_each_source_gives(bpe: Path, tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    out = tmp_path / "out"
    manifest = build(recipe(tmp_path / "in", tokenizer=f"hf:{bpe}"), out)
    for name in ("web", "code"):
        inputs = sorted((tmp_path / "in" / name).iterdir())
        build_dataset(inputs, tmp_path / "ref" / name, f"hf:{bpe}", progress=False)
        for suffix in (".bin", ".idx", ".json"):
            ours, theirs = out / f"{name}{suffix}", tmp_path / "ref" / f"{name}{suffix}"
            assert ours.read_bytes() == theirs.read_bytes()
    assert verify_corpus(out) == manifest
    tokens = {n: len(np.fromfile(out / f"{n}.bin", "uint16")) for n in ("web", "code")}
    blend = json.loads((out / "blend.json").read_text())
    shares = [tokens[name] / sum(tokens.values()) for name in tokens]
    assert blend["train"][1::2] == [str(out / name) for name in tokens]
    assert [float(word) for word in blend["train"][::2]] == pytest.approx(shares)

    class Arguments:
        mock_data = False
        data_path = data_args_path = train_data_path = valid_data_path = test_data_path = None
        per_split_data_args_path = str(out / "blend.json")

    train, *others = get_blend_and_blend_per_split(Arguments)[1]
    assert (train[0], others) == ([str(out / name) for name in tokens], [None, None])
    assert _data_prefixes(Arguments()) == [str(out / name) for name in tokens]
    Arguments.per_split_data_args_path = str(out / "no.json")
    with pytest.raises(DataError, match=r"no\.json cannot be read: .*\n  remedy:"):
        _data_prefixes(Arguments())
    group = yaml.safe_load((out / "data.yaml").read_text())
    assert group["tokenizer_model"] == str(bpe)
    assert group["train_data_path"] == blend["train"]
    damaged = bytearray((out / "code.bin").read_bytes())
    damaged[100] ^= 1
    (out / "code.bin").write_bytes(damaged)
    with pytest.raises(DataError, match=r"code\.bin: has changed since the corpus was built"):
        verify_corpus(out)


@pytest.mark.parametrize("size", [65499, 65500])
def test_the_token_type_is_megatrons(size: int) -> None:
    assert token_dtype(size) == np.dtype(DType.optimal_dtype(size)).name


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_arrays_of_ids_give_what_their_text_gives(
    dtype: str, append_eod: bool, tmp_path: Path
) -> None:
    kept = put_sources(tmp_path / "in")
    folder = tmp_path / "arrays"
    for name, texts in kept.items():
        (folder / name).mkdir(parents=True)
        ids = [[*text.encode(), EOD] for text in texts]
        half = len(ids) // 2
        flat = [i for document in ids[:half] for i in document]
        np.array([*flat, EOD, EOD], dtype).tofile(folder / name / "0.npy")  # two without a token
        flat = [i for document in ids[half:] for i in document]
        np.array(flat[:-1], dtype).tofile(folder / name / "1.npy")  # the last is not ended
    values: dict[str, Any] = {"append_eod": append_eod, "validation": {"fraction": 0.01}}
    sources = [{"name": n, "paths": [n], "tokens": dtype} for n in ("web", "code")]
    text = build(recipe(tmp_path / "in", append_eod=append_eod), tmp_path / "text")
    tokens = build(recipe(folder, **values, sources=sources), tmp_path / "tokens")
    for name in kept:
        expected = Counter(map(tuple, documents(tmp_path / "text" / name)))
        found = [
            tuple(ids)
            for volumes in tokens["sources"][name]["datasets"].values()
            for one in volumes
            for ids in documents(tmp_path / "tokens" / one["name"])
        ]
        assert Counter(found) == expected
        assert sum(shard["empty"] for shard in tokens["sources"][name]["shards"]) == 2
    assert text["sources"].keys() == tokens["sources"].keys()
    assert len(IndexedDataset(str(tmp_path / "tokens" / "web_train"))) > 100


def test_long_documents_cross_the_blocks_that_arrays_are_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uar_megatron.data.pipeline.pretokenized._BLOCK_BYTES", 7)
    made = [[1, 2, 3], [], [4] * 30, [5], []]
    np.array([i for d in made for i in (*d, EOD)], "uint16").tofile(tmp_path / "a.npy")
    sources = [{"name": "a", "paths": ["a.npy"], "tokens": "uint16"}]
    build(recipe(tmp_path, sources=sources), tmp_path / "out")
    assert documents(tmp_path / "out" / "a") == [[*d, EOD] for d in made if d]


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    plan = open_plan(made, out)
    assert tokenize_share(plan, out, 0, 2, progress=False) == len(
        assign([s.bytes for s in plan.shards], 2)[0]
    )
    done = {p: p.stat().st_mtime_ns for p in out.glob("parts/*/*")}
    assert tokenize_share(plan, out, progress=False) == 8 - sum(p.suffix == ".done" for p in done)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert tokenize_share(plan, out, progress=False) == 0
    merge_corpus(plan, out, keep_parts=True)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    build(made, out)  # complete: only the parts go
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert after == {p: t for p, t in before.items() if "parts" not in p.parts}


def test_another_recipe_tokenizer_or_input_is_refused(bpe: Path, tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    (tmp_path / "t.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    out, spec = tmp_path / "out", f"hf:{tmp_path / 't.json'}"
    made = recipe(tmp_path / "in", tokenizer=spec)
    plan = open_plan(made, out)
    tokenize_share(plan, out, 0, 2, progress=False)
    with pytest.raises(DataError, match="another recipe; different: append_eod, seed\n  remedy:"):
        open_plan(recipe(tmp_path / "in", tokenizer=spec, seed=2, append_eod=False), out)
    (tmp_path / "in" / "web" / "late.jsonl").write_text("")
    with pytest.raises(DataError, match=r"late\.jsonl: was not there when the corpus was begun"):
        tokenize_share(plan, out, progress=False)
    (tmp_path / "in" / "web" / "late.jsonl").unlink()
    (tmp_path / "t.json").write_bytes((bpe / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(DataError, match="another tokenizer than"):
        open_plan(made, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "web.idx").touch()
    with pytest.raises(DataError, match=r"web\.idx: is there already"):
        open_plan(recipe(tmp_path / "in"), tmp_path / "other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": {}}, "recipe.validation.tokens: one of tokens and fraction"),
        (
            {"validation": {"tokens": 1, "fraction": 0.1}},
            "one of tokens and fraction says how much",
        ),
        ({"sources": [{"name": "a/b", "paths": ["x"]}]}, r"recipe.sources.0.name"),
        ({"sources": [{"name": n, "paths": ["x"]} for n in "aA"]}, "a occurs twice"),
        (
            {
                "sources": [
                    {"name": "a", "paths": ["x"], "weight": 1},
                    {"name": "b", "paths": ["x"]},
                ]
            },
            "only some have a weight",
        ),
        ({"sead": 1}, "recipe.sead: no such field"),
    ],
)
def test_recipes_that_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {"tokenizer": "bytes", "sources": [{"name": "web", "paths": ["web"]}]} | values
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_file_belongs_to_one_source(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    sources = [{"name": "web", "paths": ["web"]}, {"name": "twice", "paths": ["web/0.jsonl"]}]
    with pytest.raises(DataError, match="belongs to two sources, web and twice"):
        open_plan(recipe(tmp_path / "in", sources=sources), tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    (tmp_path / "r.yaml").write_text(
        "tokenizer: bytes\nroot: nowhere\nsources: [{name: web, paths: [web]}]\n"
    )
    words = [str(tmp_path / "r.yaml"), f"root={tmp_path / 'in'}", "-o", str(tmp_path / "out")]

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["corpus", *arguments])
        return result.exit_code, result.output or str(result.exception)

    for node in "01":
        command = ["tokenize", *words, "--node", node, "--nodes", "2", "--workers", "1"]
        assert run(*command)[0] == 0
    code, printed = run("merge", *words)
    assert (code, "100.00 % of the blend" in printed) == (0, True)
    assert run("build", *words) == (0, printed)
    assert run(*command)[0] == 0  # nothing is left to do, though the parts are gone
    assert not (tmp_path / "out" / "parts").exists()
    assert run("verify", *words) == (0, f"{printed}{tmp_path / 'out'}: verified\n")
    code, printed = run("build", words[0], *words[2:])
    assert (code, "different: root" in printed) == (1, True)  # main() makes it code 2


def test_the_recipe_of_olmo_mix_on_toy_shards(repository: Path, bpe: Path, tmp_path: Path) -> None:
    path = repository / "configs" / "corpora" / "olmo_mix.yaml"
    folders = [folder for source in load_recipe(path).sources for folder in source.paths]
    for i, folder in enumerate(folders):
        deep = tmp_path / "mix" / folder / "deep"
        put_shard(deep / f"{folder[5:]}_0.{('json.gz', 'jsonl.zst')[i % 2]}", random_texts(i, 60))
        put_shard(deep / "metadata.json", ["not a shard"])
    overrides = [f"root={tmp_path / 'mix'}", f"tokenizer=hf:{bpe}", "validation.tokens=9000"]
    manifest = build(load_recipe(path, overrides), tmp_path / "out")
    assert [len(source["shards"]) for source in manifest["sources"].values()] == [1] * 7
    assert len(manifest["warnings"]) == 7  # the toy's shares are not those of the mix
    assert "source dclm: " in manifest["warnings"][0]
    assert " % of the tokens, 95.1 % expected" in manifest["warnings"][0]
    verify_corpus(tmp_path / "out")


def test_what_comes_with_the_package_agrees(repository: Path) -> None:
    mix = load_recipe(repository / "configs" / "corpora" / "olmo_mix.yaml")
    shares = [source.expected_share or 0 for source in mix.sources]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert load_recipe(repository / "configs" / "corpora" / "demo.yaml").validation is None
    group = yaml.safe_load((repository / "configs" / "data" / "olmo_mix.yaml").read_text())
    assert f"hf:{group['tokenizer_model']}" == mix.tokenizer
    assert mix.file_tokens is not None, "a source of terabytes is no single file"
