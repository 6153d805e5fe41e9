"""The start-up check agrees with Megatron's reader on good datasets and names what is broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from uar_megatron.data.build import build_dataset
from uar_megatron.data.check import check_dataset
from uar_megatron.errors import DataError


def write_with_megatron(
    prefix: Path,
    documents: list[list[int]],
    dtype: type[np.number] = np.uint16,
    modes: bool = False,
) -> Path:
    """Documents, each a list of sequence lengths, written by Megatron's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for lengths in documents:
        ids = np.arange(sum(lengths), dtype=dtype)
        builder.add_document(ids, lengths, [0] * len(lengths) if modes else None)
    builder.finalize(f"{prefix}.idx")
    return prefix


def index(
    lengths: tuple[int, ...] = (3, 0, 2, 4),
    pointers: tuple[int, ...] = (0, 6, 6, 10),
    bounds: tuple[int, ...] = (0, 1, 3, 4),
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int = 8,
) -> bytes:
    """The bytes of an index: by default of three documents, the second of two sequences."""
    header = struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(bounds))
    arrays = (np.array(lengths, np.int32), np.array(pointers, np.int64), np.array(bounds, np.int64))
    return header + b"".join(array.tobytes() for array in arrays)


def refusal(prefix: Path, vocab_size: int | None = None) -> str:
    with pytest.raises(DataError) as error:
        check_dataset(prefix, vocab_size)
    return str(error.value)


@pytest.fixture
def handmade(tmp_path: Path) -> Path:
    """A good dataset without a sidecar."""
    prefix = write_with_megatron(tmp_path / "data.v1", [[3], [0, 2], [4]])
    assert Path(f"{prefix}.idx").read_bytes() == index()
    return prefix


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A good dataset of 3 documents and 14 tokens with its sidecar."""
    (tmp_path / "a.txt").write_text("one,two,three")
    build_dataset([tmp_path / "a.txt"], tmp_path / "data", "bytes", separator=",")
    return tmp_path / "data"


@given(
    documents=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=5
    ).filter(lambda documents: any(map(sum, documents))),
    dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]),
    modes=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_agrees_with_megatrons_reader(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    dtype: type[np.number],
    modes: bool,
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "agrees"
    info = check_dataset(write_with_megatron(prefix, documents, dtype, modes), vocab_size=1)
    dataset = IndexedDataset(str(prefix), multimodal=modes)
    assert info.documents == len(dataset.document_indices) - 1 == len(documents)
    assert info.sequences == len(dataset)
    assert info.tokens == int(dataset.sequence_lengths.sum())
    assert np.dtype(info.dtype) == np.dtype(dataset.index.dtype)
    assert (info.prefix, info.vocab_size, info.tokenizer_sha256) == (str(prefix), None, None)


INDEXES = {
    "empty": (b"", "0 bytes, too short for a header"),
    "cut short": (index()[:-1], f"{len(index()) - 1} bytes where its header asks for"),
    "too long": (index() + b"\0", f"{len(index()) + 1} bytes where its header asks for"),
    "another magic": (index(magic=b"TNTIDX\0\0\0"), "does not begin as a Megatron index"),
    "another version": (index(version=2), "version 2, only 1 is known"),
    "floats": (index(code=6), "type code 6 is not an integer type"),
    "another width": (index(code=4), "offsets that do not follow from the lengths"),
    "no sequences": (index((), (), bounds=(0,)), "holds no documents"),
    "no bounds": (index(bounds=()), "holds no documents"),
    "a negative length": (index((3, -1, 3, 4)), "negative length"),
    "a wrong length": (index((3, 1, 1, 4)), "offsets that do not follow"),
    "a late start": (index(pointers=(2, 8, 8, 12)), "offsets that do not follow"),
    "a sequence left out": (index(bounds=(0, 1, 3)), "bounds that do not cover the sequences"),
    "the first left out": (index(bounds=(1, 1, 3, 4)), "bounds that do not cover the sequences"),
    "bounds that go back": (index(bounds=(0, 3, 1, 4)), "document bounds out of order"),
}


@pytest.mark.parametrize("defect", INDEXES)
def test_a_broken_index_is_named(defect: str, handmade: Path) -> None:
    content, words = INDEXES[defect]
    Path(f"{handmade}.idx").write_bytes(content)
    message = refusal(handmade)
    assert message.startswith(f"{handmade}.idx: corrupt index: ")
    assert words in message
    assert "build it again" in message


def test_every_damaged_bit_is_refused_as_damage_or_cannot_be_seen(handmade: Path) -> None:
    path, good = Path(f"{handmade}.idx"), index()
    accepted = set()
    for position in range(len(good)):
        for bit in range(8):
            flipped = bytes([good[position] ^ 1 << bit])
            path.write_bytes(good[:position] + flipped + good[position + 1 :])
            try:
                check_dataset(handmade)
                accepted.add(position)
            except DataError:
                pass
        path.write_bytes(good[:position])
        assert str(path) in refusal(handmade)
    # Another type of the same width, and a document that ends at another sequence.
    assert accepted <= {17, len(good) - 24, len(good) - 16}


@pytest.mark.parametrize("change", [-1, 2])
def test_a_bin_of_the_wrong_size(change: int, built: Path) -> None:
    with built.with_suffix(".bin").open("r+b") as stream:
        stream.truncate(28 + change)
    words = f"data.bin has {28 + change} bytes, the index describes 14 tokens of uint16 = 28 bytes"
    assert words in refusal(built)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file(suffix: str, built: Path) -> None:
    built.with_suffix(suffix).unlink()
    assert f"{built}{suffix} does not exist\n  remedy:  build it again" in refusal(built)
    assert "the prefix is given without .bin/.idx" in refusal(built.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": 4}, "tells of 4 documents and 14 tokens of uint16, the index of 3 and 14"),
        ({"tokens": 13}, "tells of 3 documents and 13 tokens"),
        ({"dtype": "int16"}, "14 tokens of int16"),
        ({"tokens": "14"}, "not a sidecar written by uar-megatron"),
        ({"tokenizer": None}, "not a sidecar"),
    ],
)
def test_a_sidecar_that_disagrees_or_is_broken(
    change: dict[str, Any], words: str, built: Path
) -> None:
    path = built.with_suffix(".json")
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | change))
    message = refusal(built)
    assert message.startswith((f"dataset {built}: ", f"{path}: "))
    assert words in message
    del good[next(iter(change))]
    for broken in (json.dumps(good).encode(), b"[]", b'{"vocab_size"', b"\xff"):
        path.write_bytes(broken)
        assert refusal(built).startswith(f"{path}: not a sidecar")
    path.unlink()
    assert check_dataset(built, 1).vocab_size is None


def test_a_model_with_too_few_ids(built: Path) -> None:
    assert check_dataset(built, 257).vocab_size == check_dataset(built, 300).vocab_size == 257
    words = f"dataset {built}: made with a vocabulary of 257 ids, the model has 256"
    assert words in refusal(built, 256)
