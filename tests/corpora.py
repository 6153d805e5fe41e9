"""Small corpora of several sources and shards, and what became of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from uar_megatron.data.pipeline.manifest import build_corpus
from uar_megatron.data.pipeline.plan import open_plan
from uar_megatron.data.pipeline.recipe import Recipe

EOD = 256  # of the tokenizer `bytes`
WORDS = ("the fox", "dog", "über", "42", "\n", "def f(x):", "☯", "  ")


def random_texts(seed: int, count: int, length: int = 40) -> list[str]:
    """Random documents, some of them empty or white space."""
    rng = random.Random(seed)
    made = [
        f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randint(0, length)))
        for i in range(count)
    ]
    for i in range(0, count, 17):
        made[i] = " \n" * (i % 3)
    return made


def put_shard(path: Path, documents: Sequence[str]) -> Path:
    """Write documents as JSON lines, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def put_sources(
    root: Path, documents: int = 40, shards: tuple[int, int] = (5, 3)
) -> dict[str, list[str]]:
    """Two sources of text in all compressions; returns the documents that are not empty."""
    kept: dict[str, list[str]] = {}
    suffixes = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")
    for number, (name, count) in enumerate(zip(("web", "code"), shards, strict=True)):
        for i in range(count):
            made = random_texts(100 * number + i, documents * (1 + i % 3))
            put_shard(root / name / f"{i}{suffixes[i % 4]}", made)
            kept.setdefault(name, []).extend(text for text in made if text.strip())
    return kept


def recipe(root: Path, **values: Any) -> Recipe:
    """A recipe for ``put_sources``, with other values where given."""
    sources = [{"name": name, "paths": [name]} for name in ("web", "code")]
    defaults = {"tokenizer": "bytes", "root": str(root), "sources": sources}
    return Recipe.model_validate(defaults | values)


def build(recipe: Recipe, out: Path, workers: int = 1) -> dict[str, Any]:
    """Build a corpus to its end, or go on with it."""
    return build_corpus(open_plan(recipe, out), out, workers, progress=False)


def documents(prefix: Path, dtype: str = "uint16") -> list[list[int]]:
    """The documents of a dataset, from its two files alone."""
    index = (prefix.with_name(f"{prefix.name}.idx")).read_bytes()
    count = int.from_bytes(index[18:26], "little")
    lengths = np.frombuffer(index, "<i4", count, 34)
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def as_text(prefix: Path) -> list[str]:
    """The documents of a dataset of bytes, without their ends."""
    found = documents(prefix)
    assert all(ids[-1] == EOD for ids in found)
    return [bytes(ids[:-1]).decode() for ids in found]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a corpus; what names the folder itself says OUT instead."""
    here = str(out.resolve()).encode()
    return {
        str(p.relative_to(out)): p.read_bytes().replace(here, b"OUT") if p.is_file() else b""
        for p in sorted(out.rglob("*"))
    }
