"""Whole documents: duplicates, the split, the vocabulary, the yardstick, and the demo's folder."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from uar_megatron.data.bpe import END_OF_DOCUMENT, train_bpe
from uar_megatron.data.build import build_dataset
from uar_megatron.data.corpus import Document, deduplicate, split_by_hash
from uar_megatron.data.readers import DocumentReader
from uar_megatron.data.tokenizers import build_encoder
from uar_megatron.data.unigram import token_counts, unigram_cross_entropy
from uar_megatron.errors import DataError


def lines(name: str, count: int) -> list[str]:
    return [f"{name}: a line of its own, number {i:02}" for i in range(count)]


def doc(*texts: str) -> Document:
    return Document("\n".join(texts), "source", "genre")


def test_equal_but_for_white_space_is_a_copy_and_the_first_stays() -> None:
    result = deduplicate([doc("b c"), doc(" b\t\n c "), doc("bc"), doc("b C"), doc("b c")])
    assert result.kept == [doc("b c"), doc("bc"), doc("b C")]
    assert (result.exact, result.near) == (2, 0)


def test_mostly_contained_in_one_larger_document_is_a_near_copy() -> None:
    base, other = lines("base", 20), lines("other", 20)
    short = ["import os", "}", "return x"] * 20  # says nothing about where a text is from
    at_threshold = doc(*base[:8], *lines("own", 2))
    below = doc(*base[3:10], *lines("own again", 3))
    half_of_each = doc(*base[10:15], *other[10:15])
    indented = doc(*(f"    {line}  " for line in base[5:]), "x")
    documents = [at_threshold, doc(*base[:2]), doc(*base, *short), below, half_of_each, indented]
    documents += [doc(*other), doc(*short[:50])]
    result = deduplicate(documents)
    assert result.kept == [d for d in documents if d not in (at_threshold, indented)]
    assert (result.exact, result.near) == (0, 2)
    assert below not in deduplicate(documents, near_threshold=0.7).kept


def test_a_licence_in_many_documents_does_not_make_them_copies() -> None:
    documents = [doc(*lines("licence", 9), *lines(f"file {i}", 4)) for i in range(60)]
    assert deduplicate(documents).kept == documents


@given(texts=st.sets(st.text(max_size=20), min_size=12).map(sorted), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_split_is_by_document_and_does_not_depend_on_the_order(
    texts: list[str], seed: int
) -> None:
    documents = [doc(text) for text in texts]
    train, held_out = split_by_hash(documents, 60)
    assert held_out == [d for d in documents if d in held_out]
    assert train == [d for d in documents if d not in held_out]
    sizes = [len(d.text.encode()) for d in held_out]
    assert max(sizes, default=0) <= 15
    assert sum(sizes) < 60 + 15
    if sum(sizes) < 60:
        assert all(len(d.text.encode()) > 15 for d in train)
    shuffled = random.Random(seed).sample(documents, len(documents))
    assert list(map(set, split_by_hash(shuffled, 60))) == [set(train), set(held_out)]
    assert split_by_hash([doc("x" * 16), *documents], 60) == ([doc("x" * 16), *train], held_out)


@given(text=st.text() | st.lists(st.sampled_from([END_OF_DOCUMENT, " ", "\r", "é"])).map("".join))
@settings(deadline=None)
def test_the_byte_pairs_lose_nothing(bpe: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(bpe))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_vocabulary_has_every_byte_and_the_end_at_zero(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="256 is too small\n  allowed: 257 or more"):
        train_bpe(["text"], 256, tmp_path / "none")
    texts = ["banana bandana " * 9, f"{END_OF_DOCUMENT} banana"]
    folders = [train_bpe(iter(texts), size, tmp_path / f"{size}") for size in (257, 262, 4096)]
    encoders = [build_encoder(f"hf:{folder}") for folder in folders]
    assert [(e.eod, len(e.encode("banana"))) for e in encoders] == [(0, 6), (0, 2), (0, 1)]
    assert [e.vocab_size for e in encoders][:2] == [257, 262]
    assert 262 < encoders[2].vocab_size < 300  # the texts have no more
    again = build_encoder(f"hf:{train_bpe(texts, 4096, tmp_path / 'again')}")
    assert again.sha256 == encoders[2].sha256


def test_unigram_cross_entropy_equals_a_sum_in_plain_floats(tmp_path: Path) -> None:
    ids: dict[str, list[int]] = {}
    for name, text in {"train": "the cat sat\non the mat", "valid": "the dog\nß"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
        build_dataset([tmp_path / f"{name}.txt"], tmp_path / name, "bytes", separator="\n")
        ids[name] = [i for part in text.split("\n") for i in (*part.encode(), 256)]
    size = 300  # the model's, padded
    counts = Counter(ids["train"])
    logs = [math.log((counts[i] + 1) / (len(ids["train"]) + size)) for i in ids["valid"]]
    result = unigram_cross_entropy(tmp_path / "train", tmp_path / "valid", size)
    assert result == pytest.approx(-sum(logs) / len(logs), rel=1e-12)
    assert token_counts(tmp_path / "train", size).tolist() == [counts[i] for i in range(size)]
    with pytest.raises(DataError, match="vocabulary of 257 ids, the model has 256"):
        unigram_cross_entropy(tmp_path / "train", tmp_path / "valid", 256)


@pytest.fixture(scope="module")
def demo(repository: Path) -> ModuleType:
    """The script scripts/demo_corpus.py as a module."""
    path = repository / "scripts" / "demo_corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_corpus"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_a_demo_corpus_is_replaced(demo: ModuleType, tmp_path: Path) -> None:
    demo.refuse_foreign_folder(tmp_path / "none")
    (tmp_path / "cache").mkdir()
    for name in ("manifest.json", "train.bin", "valid_in_domain.idx"):
        (tmp_path / name).touch()
    demo.refuse_foreign_folder(tmp_path)
    (tmp_path / "thesis.tex").touch()
    for path in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(DataError, match=f"{path.name}: is there already and holds other"):
            demo.refuse_foreign_folder(path)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, OSError])
def test_a_work_folder_takes_the_name_only_when_it_is_done(
    error: type[BaseException] | None, demo: ModuleType, tmp_path: Path
) -> None:
    target = tmp_path / "data" / "demo"

    def build(name: str, error: type[BaseException] | None = None) -> None:
        with demo.work_folder(target) as work:
            (work / "text").mkdir()
            (work / "text" / name).touch()
            if error:
                raise error("no space")

    build("first")
    assert names(target.parent) == ["demo", "demo/text", "demo/text/first"]
    if error is None:
        build("second")
    else:
        # What is the user's to mend is a message, anything else stays what it was.
        expected = DataError if error is OSError else error
        with pytest.raises(expected, match="no space"):
            build("second", error)
    assert names(target) == ["text", "text/first" if error else "text/second"]
    assert list(target.parent.iterdir()) == [target]


def test_two_at_once_and_what_a_killed_one_left(demo: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "demo"
    for leftover in (".demo.work/text", ".demo.old/text", "demo/text"):
        (tmp_path / leftover).mkdir(parents=True)
    with demo.work_folder(target) as work:
        assert names(work) == []
        (work / "mine").touch()
        second = demo.work_folder(target)
        with pytest.raises(DataError, match="another process is building it"):
            second.__enter__()
    assert names(tmp_path) == ["demo", "demo/mine"]
    with pytest.raises(DataError, match="cannot be written"):
        demo.work_folder(target / "mine" / "demo").__enter__()


def test_complete_means_this_recipe_and_every_file_unchanged(
    demo: ModuleType, tmp_path: Path
) -> None:
    path, manifest_path = tmp_path / "text" / "train.jsonl.zst", tmp_path / "manifest.json"
    path.parent.mkdir()
    path.write_text("good")
    digests = {"text/train.jsonl.zst": demo.sha256_of(path)}
    manifest = json.dumps({"recipe": demo.recipe(), "files": digests})
    assert not demo.is_complete(tmp_path)
    changed = {"recipe": {**demo.recipe(), "vocab_size": 1}, "files": digests}
    for text in (json.dumps(changed), "[]", "{}", "{", manifest):
        manifest_path.write_text(text)
        assert demo.is_complete(tmp_path) == (text == manifest)
    for text in ("evil", "good"):
        path.write_text(text)
        assert demo.is_complete(tmp_path) == (text == "good")
    path.unlink()
    assert not demo.is_complete(tmp_path)


@given(sizes=st.lists(st.integers(0, 1500), max_size=20), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_passages_are_whole_paragraphs_of_about_the_size(
    demo: ModuleType, sizes: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    text = "\n\n".join("".join(rng.choices("ab c\n", k=size)) for size in sizes)
    passages = demo.split_passages(Document(text, "play", "literature"), 1000)
    numbers = [int(passage.source.removeprefix("play#")) for passage in passages]
    assert numbers == sorted(set(numbers))
    position = 0
    for passage in passages:
        assert demo.SHORTEST_DOCUMENT <= len(passage.text) <= max(1002, *sizes)
        position = text.index(passage.text, position) + len(passage.text)
    # What is dropped is the separators and passages that are too short, among them the gaps.
    dropped = len(text) - sum(len(passage.text) for passage in passages)
    assert dropped <= (2 + demo.SHORTEST_DOCUMENT) * (len(sizes) + 1)


def test_the_wanted_files_of_a_source_distribution(demo: ModuleType, tmp_path: Path) -> None:
    text = "words " * 40
    members = {
        "pkg-1/docs/b.txt": text.encode() + b"\r\nend\r\n",
        "pkg-1/docs/a/c.txt": text.encode() + b"\xff",
        "pkg-1/docs/short.txt": b"too short",
        "pkg-1/docs/requirements.txt": text.encode(),
        "pkg-1/src/a.txt": text.encode(),
    }
    with tarfile.open(tmp_path / "pkg.tar.gz", "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("pkg-1/docs/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        tar.addfile(link)
    patterns = {"include": ("*/docs/*.txt",), "exclude": ("*/requirements.txt",)}
    sdist = demo.Sdist("pkg", "1", "", "MIT", "documentation", **patterns)
    documents = list(demo.sdist_documents(tmp_path / "pkg.tar.gz", sdist))
    assert documents == [
        Document(f"{text}\ufffd", "pkg/pkg-1/docs/a/c.txt", "documentation"),
        Document(f"{text}\nend\n", "pkg/pkg-1/docs/b.txt", "documentation"),
    ]
    demo.write_text(tmp_path / "text" / "train.jsonl.zst", documents)
    assert list(DocumentReader([tmp_path / "text"])) == [document.text for document in documents]
