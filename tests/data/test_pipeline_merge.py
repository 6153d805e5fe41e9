"""The merge of a corpus: what is held out, shares of the blend, files of limited size."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import (
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

from uar_megatron.data.pipeline.holdout import key_function, threshold_of_tokens
from uar_megatron.data.pipeline.manifest import merge_corpus, verify_corpus
from uar_megatron.data.pipeline.plan import open_plan
from uar_megatron.data.pipeline.share import tokenize_share
from uar_megatron.errors import DataError


@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=60),
    target=st.integers(1, 400),
    parts=st.integers(1, 4),
    same=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_the_threshold_holds_out_the_tokens_asked_for_and_no_document_more(
    lengths: list[int], target: int, parts: int, same: bool
) -> None:
    key = key_function(1)
    # Keys that share their upper bits, too: all in one bucket of the histogram.
    made = [i + (7 << 50) if same else key(b"%d" % i) for i in range(len(lengths))]
    keys, sizes = np.array(made, dtype=np.uint64), np.array(lengths, dtype=np.int32)
    split = list(zip(np.array_split(keys, parts), np.array_split(sizes, parts), strict=True))
    if sum(lengths) <= target:
        with pytest.raises(DataError, match="would be all that source web has"):
            threshold_of_tokens(lambda: split, target, "source web")
        return
    threshold = threshold_of_tokens(lambda: split, target, "source web")
    taken = [n for n, k in zip(lengths, made, strict=True) if k < threshold]
    last = lengths[made.index(max(k for k in made if k < threshold))]
    assert sum(taken) - last < target <= sum(taken)


def test_validation_in_tokens_follows_the_blend_and_keeps_copies_together(tmp_path: Path) -> None:
    kept = put_sources(tmp_path / "in")
    twice = [text for text in kept["web"] if len(text) > 20] * 2
    put_shard(tmp_path / "in" / "web" / "copies.jsonl", twice)
    values: dict[str, Any] = {"validation": {"tokens": 9000}}
    manifest = build(recipe(tmp_path / "in", **values), tmp_path / "out")
    held_out = {}
    for name, source in manifest["sources"].items():
        train, valid = (as_text(tmp_path / "out" / f"{name}_{s}") for s in ("train", "valid"))
        assert not set(train) & set(valid)
        assert Counter(train + valid) == Counter(kept[name] + (twice if name == "web" else []))
        (written,) = source["datasets"]["valid"]
        held_out[name] = written["tokens"]
        assert held_out[name] == len(np.fromfile(tmp_path / "out" / f"{name}_valid.bin", "uint16"))
        text_bytes = sum(d["text_bytes"] for (d,) in source["datasets"].values())
        assert text_bytes == sum(len(text.encode()) for text in train + valid)
    assert 9000 <= sum(held_out.values()) < 9000 + 3 * 400  # a document and its copies more
    total = {
        name: sum(dataset["tokens"] for (dataset,) in source["datasets"].values())
        for name, source in manifest["sources"].items()
    }
    expected = total["web"] / total["code"]
    assert held_out["web"] / held_out["code"] == pytest.approx(expected, rel=0.5)
    other = build(recipe(tmp_path / "in", **values, seed=1), tmp_path / "other")
    assert other["sources"].keys() == manifest["sources"].keys()
    assert (tmp_path / "other" / "web_valid.bin").read_bytes() != (
        tmp_path / "out" / "web_valid.bin"
    ).read_bytes()


def test_copies_in_another_source_are_on_the_same_side(tmp_path: Path) -> None:
    shared = [f"in both {i}" for i in range(200)]
    # The second source's few long documents would move a threshold of its own far.
    for name, own in (("web", random_texts(0, 40)), ("code", [f"{i}" + "x" * 2000 for i in "abc"])):
        put_shard(tmp_path / "in" / name / "0.jsonl", own + shared)
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    manifest = build(recipe(tmp_path / "in", validation={"tokens": 2000}), tmp_path / "out")
    for source in manifest["sources"].values():
        for split, (one,) in source["datasets"].items():
            sides[split] |= set(as_text(tmp_path / "out" / one["name"]))
    assert sides["valid"] & set(shared)
    assert not sides["train"] & sides["valid"]


def test_what_only_the_merge_follows_may_change_until_it_is_complete(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    begun = recipe(tmp_path / "in", validation={"tokens": 2000})
    weighted = [
        {"name": name, "paths": [name], "weight": 1.0, "expected_share": 50.0}
        for name in ("web", "code")
    ]
    final = recipe(
        tmp_path / "in", validation={"fraction": 0.2}, sources=weighted, share_tolerance=0.5,
        file_tokens=14000,
    )  # fmt: skip
    build(final, tmp_path / "straight")
    out = tmp_path / "out"
    tokenize_share(open_plan(begun, out), out, progress=False)
    merge_corpus(open_plan(begun, out), out, keep_parts=True)
    (out / "manifest.json").unlink()  # as if killed at the end of the merge
    build(final, out)
    assert contents(out) == contents(tmp_path / "straight")
    with pytest.raises(DataError, match="another recipe; different: validation"):
        open_plan(final.model_copy(update={"validation": begun.validation}), out)
    tokenize_share(open_plan(begun, tmp_path / "new"), tmp_path / "new", 0, 2, progress=False)
    with pytest.raises(DataError, match="another recipe; different: validation"):
        open_plan(recipe(tmp_path / "in"), tmp_path / "new")


def test_the_bytes_do_not_depend_on_the_folder_that_the_merge_is_called_from(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sources(tmp_path / "in")
    (tmp_path / "other").mkdir()
    tokenizer = os.path.relpath(bpe, tmp_path)
    monkeypatch.chdir(tmp_path)
    made = recipe(Path("in"), tokenizer=f"hf:{tokenizer}")
    bad = "in/code/0.jsonl"
    for out, merged_from in (("here", tmp_path), ("there", tmp_path / "other")):
        monkeypatch.chdir(tmp_path)
        plan = open_plan(made, Path(out))
        tokenize_share(plan, Path(out), progress=False)
        monkeypatch.chdir(merged_from)
        folder, shard = (Path(os.path.relpath(tmp_path / name)) for name in (out, bad))
        merge_corpus(plan, folder, [str(shard)])
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    manifest = json.loads((tmp_path / "there" / "manifest.json").read_text())
    assert manifest["left_out"] == [f"../{bad}"]
    for source in manifest["sources"].values():
        assert all((tmp_path / "there" / shard["shard"]).exists() for shard in source["shards"])
    told = json.loads((tmp_path / "there" / "web.json").read_text())
    paths = [told["tokenizer"]["path"], *(file["path"] for file in told["sources"])]
    assert all((tmp_path / "there" / path).exists() for path in paths)


def test_a_corpus_that_was_moved_is_told_where_it_is(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    made = recipe(tmp_path / "in", validation={"fraction": 0.2})
    build(made, tmp_path / "old")
    before = contents(tmp_path / "old")
    new = (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(DataError, match=r"new/blend\.json: is not the blend of .*\n  remedy:"):
        verify_corpus(new)
    merge_corpus(open_plan(made, new), new)
    verify_corpus(new)
    assert contents(new) == before
    (new / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"new/data\.yaml: is not the blend of"):
        verify_corpus(new)


def test_weights_of_the_recipe_and_shares_that_are_not_as_published(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    sources = [
        {"name": "web", "paths": ["web"], "weight": 3.0, "expected_share": 95.0},
        {"name": "code", "paths": ["code"], "weight": 1.0},
    ]
    made = recipe(tmp_path / "in", sources=sources, validation={"tokens": 4000})
    manifest = build(made, tmp_path / "out")
    for source, target in zip(manifest["sources"].values(), (3000, 1000), strict=True):
        assert target <= source["datasets"]["valid"][0]["tokens"] < target + 400
    assert [source["share"] for source in manifest["sources"].values()] == [0.75, 0.25]
    (warning,) = manifest["warnings"]
    assert warning.startswith("source web: ")
    assert warning.endswith(" % of the tokens, 95 % expected")


def test_a_large_source_gets_several_files(tmp_path: Path) -> None:
    kept = put_sources(tmp_path / "in")
    values: dict[str, Any] = {"validation": {"fraction": 0.2}}
    whole = build(recipe(tmp_path / "in", **values), tmp_path / "whole")
    out = tmp_path / "out"
    manifest = build(recipe(tmp_path / "in", **values, file_tokens=14000), out)
    parts = manifest["sources"]["web"]["shards"]
    for split in ("train", "valid"):
        volumes = manifest["sources"]["web"]["datasets"][split]
        assert [v["name"] for v in volumes] == [f"web.{i:04}_{split}" for i in range(len(volumes))]
        assert 2 < len(volumes) < len(parts)
        joined = [ids for v in volumes for ids in documents(out / v["name"])]
        assert joined == documents(tmp_path / "whole" / f"web_{split}")
    plan = open_plan(recipe(tmp_path / "in", **values, file_tokens=14000), tmp_path / "two")
    tokenize_share(plan, tmp_path / "two", progress=False)
    merge_corpus(plan, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(out)
    pairs = zip(*manifest["sources"]["web"]["datasets"].values(), strict=True)
    assert all(train["tokens"] + valid["tokens"] <= 14000 for train, valid in pairs)
    verify_corpus(out)
    blend = json.loads((out / "blend.json").read_text())["train"]
    weights = dict(zip(blend[1::2], map(float, blend[::2]), strict=True))
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(w for p, w in weights.items() if "web." in p) == pytest.approx(
        whole["sources"]["web"]["share"]
    )
    assert len(kept["web"]) == sum(part["documents"] for part in parts)
