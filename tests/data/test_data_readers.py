"""Documents come out as they went in, in a fixed order; what is broken is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from uar_megatron.data.readers import DocumentReader, find_files
from uar_megatron.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": ZstdCompressor(write_checksum=True).compress,
}
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a zstd frame without content, as pzstd writes


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def until_refused(path: Path) -> tuple[list[str], str]:
    """The documents before the error, and its message."""
    found: list[str] = []
    with pytest.raises(DataError) as error:
        found.extend(DocumentReader([path]))
    return found, str(error.value)


@given(
    texts=st.lists(st.text(), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 200), max_size=3),
    compression=st.sampled_from(sorted(COMPRESS)),
)
@settings(max_examples=150, deadline=None)
def test_json_lines_come_back_however_they_are_cut_into_frames(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cuts: list[int], compression: str
) -> None:
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=bool(cuts)) for text in texts]
    data = "\n".join(lines).encode()
    bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    frames = [COMPRESS[compression](data[low:high]) for low, high in pairwise(bounds)]
    path = tmp_path_factory.getbasetemp() / f"property.jsonl{compression}"
    put(path, (SKIPPABLE if compression == ".zst" else b"").join([*frames, b""]))
    assert list(DocumentReader([path], json_field="body")) == texts


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_is_kept_to_the_byte_but_for_the_byte_order_mark(
    compression: str, tmp_path: Path
) -> None:
    text = "\n één\r\nzwei\u2028\tdrei \n\n\ufeff"
    for mark in ("", "\ufeff"):
        data = COMPRESS[compression]((mark + text).encode())
        path = put(tmp_path / f"a.txt{compression}", data)
        assert list(DocumentReader([path])) == [text]
        assert list(DocumentReader([path], separator="\n\n")) == [text[:-3], "\ufeff"]
    line = '\ufeff{"text": "\ufeffa"}\n'.encode()
    path = put(tmp_path / f"a.jsonl{compression}", COMPRESS[compression](line))
    assert list(DocumentReader([path])) == ["\ufeffa"]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n--.\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_separator_splits_lines_however_they_end(
    end: str, separator: str, tmp_path: Path
) -> None:
    between = separator.replace("\r\n", "\n").replace("\n", end)
    parts = [f"one{end}two", f"1{end}--x{end}2", "three\r"]
    path = put(tmp_path / "a.txt", between.join(parts).encode())
    assert list(DocumentReader([path], separator=separator)) == parts


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_data_cut_short_or_damaged(compression: str, kind: str, tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    first, second = COMPRESS[compression](lines), COMPRESS[compression](b'{"text": "three"}\n')
    path = tmp_path / f"a{kind}{compression}"
    checksum = len(second) - 6 if compression == ".gz" else len(second) - 1
    damaged = second[:checksum] + bytes([second[checksum] ^ 1]) + second[checksum + 1 :]
    for data in (*(second[:n] for n in range(1, len(second))), damaged, lines):
        message = until_refused(put(path, data))[1]
        assert message.startswith(f"{path}: the compressed data is damaged or cut short after")
    found, message = until_refused(put(path, first + second[:12]))
    assert found == (["one", "two"] if kind == ".jsonl" else [])
    assert ("after line 2" if kind == ".jsonl" else "bytes of text") in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "broken JSON: Expecting ',' delimiter at column"),
        (b"{'text': 'a'}", "broken JSON: .* at column 2"),
        (b'\xef\xbb\xbf{"text": "a"}', "broken JSON: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "broken JSON: nested too deeply"),
        (b'{"text": "\xff"}', "not valid UTF-8 at byte 10 of the line"),
        (b'["text"]', "a list where a JSON object is expected"),
        (b'{"txt": "a", "id": 1}', "no field 'text'; the fields are: 'txt', 'id'"),
        (b"{}", "no field 'text'; the fields are: none"),
        (b'{"text": null}', "field 'text' is a NoneType, not a string"),
        (b'{"text": "a\\ud83d"}', "field 'text' holds a lone surrogate"),
    ],
)
def test_a_bad_json_line_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    good = b'{"text": "\\ud83d\\ude00"}'
    path = put(tmp_path / "a.ndjson.gz", gzip.compress(b"\n \r\n".join([good, line, good])))
    reader = iter(DocumentReader([path]))
    assert next(reader) == "😀"
    with pytest.raises(DataError, match=rf"a\.ndjson\.gz, line 3: {words}"):
        next(reader)


def test_text_that_is_not_utf8_or_goes_away_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", b"one\ntw\xc3\xb6\n\xff")
    assert f"{path}: not valid UTF-8 at byte 9 (line 3)" in until_refused(path)[1]
    reader = DocumentReader([path])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(reader)


def test_a_folder_is_searched_in_order_without_hidden_files_and_metadata(tmp_path: Path) -> None:
    root = tmp_path / ".work" / "corpus"  # a hidden folder above the one given does not matter
    wanted = ["B.md", "a/z.jsonl.gz", "a.txt.zst", "b/a/c.rst", "b/b.text", "b.ndjson"]
    for name in reversed(wanted):
        put(root / name)
    for name in (".hidden.txt", ".git/a.txt", "a/.b/c.txt", "train.json", "a.pdf"):
        put(root / name)
    (root / "folder.txt").mkdir()
    assert find_files([root]) == [root / name for name in wanted]
    assert find_files([root / "train.json"]) == [root / "train.json"]


def test_patterns_and_files_named_twice(tmp_path: Path) -> None:
    a, b, c = (put(tmp_path / name) for name in ("a.txt", "b/b.txt", "b/c[1].md"))
    (tmp_path / "b" / "link.txt").symlink_to(a)
    assert find_files([str(tmp_path / "**" / "*.txt")]) == [a, b]
    assert find_files([c, str(tmp_path / "b" / "b*"), tmp_path, a]) == [c, b, a]


def test_a_pattern_takes_no_file_of_another_kind(tmp_path: Path) -> None:
    root = tmp_path / "in"
    text, lines = put(root / "a.txt.gz"), put(root / "b" / "c.json")
    assert find_files([str(root / "*"), str(root / "b" / "*")]) == [text, lines]
    array, other = put(root / "a.npy"), put(root / "b.csv.gz")
    known = r"text \(\.txt, .*\.jsonl, \.ndjson, \.json; each also with \.gz or \.zst\)\n  remedy: "
    with pytest.raises(DataError, match=rf"a\.npy: matches .*/in/\*, and is no {known}"):
        find_files([str(root / "*")])
    with pytest.raises(DataError, match=r"a\.txt\.gz: matches .*, and is no \.npy\n  remedy: "):
        find_files([str(root / "*")], ".npy")
    assert find_files([str(root / "*.npy")], ".npy") == [array]
    assert find_files([other, root]) == [other, text]


def test_linked_folders_are_searched_once_and_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "in"
    files = [put(root / "a.txt"), put(tmp_path / "elsewhere" / "deep" / "b.txt")]
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "back").symlink_to(root)  # without end
    found = find_files([root])
    assert found == [root / "a.txt", root / "linked" / "deep" / "b.txt"]
    assert [file.resolve() for file in find_files([str(root / "**" / "*.txt")])] == files
    for name in ("gone.txt", "gone"):
        link = root / "linked" / name
        link.symlink_to(tmp_path / "nowhere")
        for source in (root, str(root / "linked" / "g*"), link):
            with pytest.raises(DataError, match=rf"{name}: a link that leads nowhere.*\n  remedy:"):
                find_files([source])
        link.rename(root / "linked" / ".hidden")
        assert find_files([root]) == found


def test_inputs_that_give_nothing(tmp_path: Path) -> None:
    good = put(tmp_path / "good.txt")
    put(tmp_path / "empty" / "a.pdf")
    for name, words in {
        "no.txt": r"no\.txt: no such file",
        "*.md": r"\*\.md: no such file, folder or match for the pattern",
        "empty": r"empty: holds no text \(\.txt, ",
    }.items():
        with pytest.raises(DataError, match=words):
            DocumentReader([good, tmp_path / name])
    with pytest.raises(DataError, match="no input files"):
        DocumentReader([])
    with pytest.raises(DataError, match="separator is empty"):
        DocumentReader([good], separator="")


def test_progress_grows_to_the_size_on_disk_and_json_lines_are_streamed(tmp_path: Path) -> None:
    line = b'{"text": "' + b"word " * 200 + b'"}\n'
    files = [put(tmp_path / "a.jsonl", line * 3000), put(tmp_path / "b.txt", b"a\n\nb\n\nc")]
    files += [put(tmp_path / f"c.jsonl{c}", COMPRESS[c](line * 9)) for c in (".gz", ".zst")]
    reader = DocumentReader(files, separator="\n\n")
    seen = [reader.bytes_read for _ in reader]
    assert len(seen) == 3000 + 3 + 9 + 9
    assert seen == sorted(seen)
    assert 0 < seen[0] < len(line) * 1500
    assert seen[-1] == reader.bytes_total == sum(path.stat().st_size for path in files)
