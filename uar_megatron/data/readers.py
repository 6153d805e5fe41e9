"""Documents (``str``) from text and JSON-lines files, plain or compressed with gzip or zstd.

A text file is one document, or several when a separator is given; it is held in memory whole, so
big corpora belong in JSON lines, which are streamed. Every defect of the input is a ``DataError``
that names the file and the line or byte offset.
"""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from uar_megatron.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
COMPRESSIONS = (".gz", ".zst")
_KNOWN = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
_BOM = "\ufeff"
_COPY_BYTES = 1 << 20


class DocumentReader:
    """Iterates over the documents of files, folders and glob patterns, always in the same order.

    Args:
        inputs: see :func:`find_files`.
        json_field: the field of a JSON line that holds the text.
        separator: splits each text file into several documents where it occurs, its ends of
            lines as LF or as CR LF; ``None`` keeps one document per file.

    Attributes:
        files: the files that will be read, each once.
        bytes_total: their size on disk.
        bytes_read: how much of it has been consumed so far, for a progress bar.

    Raises:
        DataError: an input does not exist, cannot be read, or matches nothing.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        json_field: str = "text",
        separator: str | None = None,
    ) -> None:
        if separator == "":
            raise DataError("the document separator is empty; leave it out to keep files whole")
        try:
            self.files = find_files(inputs)
            self.bytes_total = sum(path.stat().st_size for path in self.files)
        except OSError as error:  # a folder without permission
            raise DataError(f"an input cannot be read: {error}") from error
        self.bytes_read = 0
        self._json_field = json_field
        self._separator = separator

    def __iter__(self) -> Iterator[str]:
        done = 0
        for path in self.files:
            try:
                with path.open("rb", buffering=0) as raw:
                    for text in read_documents(path, raw, self._json_field, self._separator):
                        self.bytes_read = done + raw.tell()
                        yield text
                done += path.stat().st_size
                self.bytes_read = done
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from error


def read_documents(
    path: Path, raw: io.RawIOBase, json_field: str = "text", separator: str | None = None
) -> Iterator[str]:
    """The documents of one file.

    Args:
        path: names the file, whose suffixes say what it is.
        raw: its bytes, read to their end.
        json_field, separator: as for :class:`DocumentReader`.

    Raises:
        DataError: naming the file and the line or offset of a defect.
    """
    stream = _decompressed(path, raw)
    if _bare_suffix(path) in JSON_SUFFIXES:
        yield from _json_lines(path, stream, json_field)
        return
    text = _whole_text(path, stream)
    if separator is None:
        yield text
    else:
        yield from re.split(_pattern(separator), text)


def _pattern(separator: str) -> str:
    """Text from Windows would else be one document, without a word."""
    return r"\r?\n".join(map(re.escape, separator.replace("\r\n", "\n").split("\n")))


def find_files(inputs: Sequence[str | Path], suffix: str | None = None) -> list[Path]:
    """Expand files, folders and glob patterns to a list of files, each real file once.

    Args:
        inputs: what to look for. Folders are searched recursively, through links too. A file that
            is named itself may have any suffix.
        suffix: of the files taken from folders and patterns; ``None`` takes text and JSON lines.

    Raises:
        DataError: an input does not exist or yields no file, a link leads nowhere, or a pattern
            matches a file of another kind.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]
            if not matches:
                raise DataError(f"{given}: no such file, folder or match for the pattern")
            _refuse_other_kinds(matches, suffix, str(given))
        files = [file for match in matches for file in _files_below(match, suffix)]
        if not files:
            raise DataError(f"{given}: holds no {_wanted(JSON_SUFFIXES[:2], suffix)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError("no input files were given")
    return list(found.values())


def _refuse_other_kinds(matches: Sequence[Path], suffix: str | None, pattern: str) -> None:
    """Only who names a file can know that it is text, whatever its suffix."""
    for path in matches:
        known = path.suffix == suffix if suffix else _bare_suffix(path) in _KNOWN
        if path.is_file() and not known:
            raise DataError(
                f"{path}: matches {pattern}, and is no {_wanted(JSON_SUFFIXES, suffix)}\n"
                "  remedy:  narrow the pattern, or name the file itself"
            )


def _wanted(json_suffixes: Sequence[str], suffix: str | None) -> str:
    known = ", ".join((*TEXT_SUFFIXES, *json_suffixes))
    return suffix or f"text ({known}; each also with .gz or .zst)"


def _files_below(path: Path, suffix: str | None) -> list[Path]:
    if not path.is_dir():
        _refuse_dangling(path)
        return [path]
    found: list[Path] = []
    visited: set[Path] = set()  # links may lead back to where they are
    for folder, folders, names in path.walk(on_error=_raise, follow_symlinks=True):
        if folder.resolve() in visited:
            folders.clear()
            continue
        visited.add(folder.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (folder / name for name in names if not name.startswith(".")):
            _refuse_dangling(file)  # whatever its suffix: it may have led to a folder
            if file.is_file() and _is_corpus_file(file, suffix):
                found.append(file)
    return sorted(found)


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: a link that leads nowhere (to {path.readlink()})\n"
            "  remedy:  bring back what it leads to, or remove it"
        )


def _raise(error: OSError) -> None:
    """What cannot be searched is no empty folder."""
    raise error


def _is_corpus_file(path: Path, suffix: str | None) -> bool:
    if suffix is not None:
        return path.suffix == suffix
    # A lone .json in a folder is more often metadata (our own sidecar for one) than JSON lines.
    return path.suffix != ".json" and _bare_suffix(path) in _KNOWN


def _bare_suffix(path: Path) -> str:
    """The suffix below a compression suffix: ``.jsonl`` for ``a.jsonl.gz``."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _whole_text(path: Path, stream: BinaryIO) -> str:
    parts: list[bytes] = []
    size = 0
    try:
        while chunk := stream.read(_COPY_BYTES):
            parts.append(chunk)
            size += len(chunk)
    except _decompression_errors(path) as error:
        raise _damaged(path, f"after {size} bytes of text", error) from error
    data = b"".join(parts)
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not valid UTF-8 at byte {error.start} (line {line}): {error.reason}"
        ) from error


def _json_lines(path: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    number = 0
    try:
        for line in stream:
            number += 1
            text = _text_of_line(line, number, f"{path}, line {number}", field)
            if text is not None:
                yield text
    except _decompression_errors(path) as error:
        raise _damaged(path, f"after line {number}", error) from error


def _text_of_line(line: bytes, number: int, where: str, field: str) -> str | None:
    """The text of one JSON line; ``None`` for a blank line."""
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not valid UTF-8 at byte {error.start} of the line: {error.reason}"
        ) from error
    if number == 1:
        decoded = decoded.removeprefix(_BOM)
    if not decoded.strip():
        return None
    try:
        record: Any = json.loads(decoded.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: broken JSON: nested too deeply") from error
    except ValueError as error:  # a number of more than 4300 digits
        raise DataError(f"{where}: broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__} where a JSON object is expected")
    if field not in record:
        present = ", ".join(map(repr, list(record)[:10])) or "none"
        raise DataError(f"{where}: no field {field!r}; the fields are: {present}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise DataError(f"{where}: field {field!r} holds a lone surrogate") from error
    return text


def _decompressed(path: Path, raw: io.RawIOBase) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _COPY_BYTES)
    return io.BufferedReader(raw, _COPY_BYTES)


def _decompression_errors(path: Path) -> tuple[type[Exception], ...]:
    if path.suffix == ".gz":
        return (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix == ".zst":
        from zstandard import ZstdError

        return (EOFError, ZstdError)
    return ()


def _damaged(path: Path, where: str, error: Exception) -> DataError:
    return DataError(f"{path}: the compressed data is damaged or cut short {where}: {error}")


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames and, unlike ``zstandard``'s own reader, notices a truncated one."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._frame: Any = None
        self._unread = b""  # compressed
        self._ready = memoryview(b"")  # decompressed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._unread or self._raw.read(_COPY_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._unread = b""
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        if self._frame is None:
            from zstandard import ZstdDecompressor

            # Files made with `zstd --long=31` need this window.
            self._frame = ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        data: bytes = self._frame.decompress(chunk)
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data, None
        return data
