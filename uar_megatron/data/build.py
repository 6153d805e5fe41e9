"""Text to Megatron ``.bin/.idx``: tokenize in parallel, write atomically, read back, describe."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from uar_megatron.data.check import check_dataset
from uar_megatron.data.readers import DocumentReader
from uar_megatron.data.tokenizers import Encoder, build_encoder
from uar_megatron.errors import DataError

# One batch is what a worker gets at once: large enough to hide the hand-over, small enough that
# a few in flight per worker cost little memory.
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1024
_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class DatasetSummary:
    """What ``build_dataset`` wrote; ``text_bytes`` is the UTF-8 size of the documents kept."""

    prefix: str
    documents: int
    tokens: int
    empty_documents: int
    text_bytes: int
    dtype: str
    vocab_size: int
    eod: int
    tokenizer: str
    megatron_args: tuple[str, ...]
    note: str
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """One tokenized batch: the ids of its documents end to end."""

    ids: np.ndarray
    lengths: list[int]
    empty: int
    text_bytes: int


def build_dataset(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    encoder_spec: str,
    workers: int = 1,
    append_eod: bool = True,
    json_field: str = "text",
    separator: str | None = None,
    progress: bool = True,
) -> DatasetSummary:
    """Tokenize documents and write ``PREFIX.bin``, ``PREFIX.idx`` and the sidecar ``PREFIX.json``.

    The bytes written do not depend on ``workers``. Files appear under their names only when whole
    and verified, the index last; an existing dataset of that name is replaced. An error or Ctrl-C
    leaves nothing behind.

    Args:
        inputs: files, folders and glob patterns; see ``DocumentReader``.
        output_prefix: path without suffix; missing folders are made.
        encoder_spec: see ``build_encoder``.
        workers: tokenizing processes; 1 works in this process.
        append_eod: end every document with the tokenizer's end-of-document id.
        json_field: the field of a JSON line that holds the text.
        separator: splits text files into documents.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        DataError: bad input or tokenizer, no documents, or an output that cannot be written.
    """
    started = time.monotonic()
    if workers < 1:
        raise DataError(f"workers: {workers} is not a number of processes\n  allowed: 1 or more")
    reader = DocumentReader(inputs, json_field, separator)
    encoder = build_encoder(encoder_spec)
    prefix = Path(output_prefix)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{prefix.name}.", suffix=".tmp", dir=prefix.parent
        ) as folder:
            draft = Path(folder) / prefix.name
            job = _Job(encoder_spec, workers, append_eod)
            with _progress_bar(progress) as bar:
                totals = _write(job, encoder, reader, draft, bar)
            _verify(draft, encoder, totals, append_eod)
            sidecar = _sidecar(prefix, encoder, reader, totals, append_eod)
            _write_json(Path(f"{draft}.json"), sidecar)
            check_dataset(draft, encoder.vocab_size)
            _publish(draft, prefix)
    except OSError as error:
        raise DataError(f"dataset {prefix}: cannot be written: {error}") from error
    return DatasetSummary(
        prefix=str(prefix),
        documents=totals.documents,
        tokens=totals.tokens,
        empty_documents=totals.empty,
        text_bytes=totals.text_bytes,
        dtype=totals.dtype,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        tokenizer=encoder.name,
        megatron_args=encoder.megatron_args,
        note=encoder.note,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Job:
    """What a worker needs to tokenize."""

    encoder_spec: str
    workers: int
    append_eod: bool


@dataclass
class _Totals:
    dtype: str
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    text_bytes: int = 0


def _write(
    job: _Job, encoder: Encoder, reader: DocumentReader, draft: Path, bar: Progress
) -> _Totals:
    indexed_dataset = _import_indexed_dataset()
    dtype = indexed_dataset.DType.optimal_dtype(encoder.vocab_size)
    totals = _Totals(dtype=np.dtype(dtype).name)
    task = bar.add_task("tokenizing", total=reader.bytes_total, documents=0, tokens=0)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{draft}.bin", dtype=dtype)
    try:
        for encoded in _encoded_batches(job, encoder, _batches(reader)):
            start = 0
            for length in encoded.lengths:
                builder.add_document(encoded.ids[start : start + length], [length])
                start += length
            _count(totals, encoded, bar, task, reader.bytes_read)
        if totals.documents == 0:
            raise DataError(
                f"no documents: {len(reader.files)} input files held nothing but "
                f"{totals.empty} empty documents"
            )
        builder.finalize(f"{draft}.idx")
    finally:
        builder.data_file.close()
    return totals


def _count(totals: _Totals, encoded: _Encoded, bar: Progress, task: TaskID, read: int) -> None:
    totals.documents += len(encoded.lengths)
    totals.tokens += len(encoded.ids)
    totals.empty += encoded.empty
    totals.text_bytes += encoded.text_bytes
    bar.update(task, completed=read, documents=totals.documents, tokens=totals.tokens)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded_batches(
    job: _Job, encoder: Encoder, batches: Iterator[list[str]]
) -> Iterator[_Encoded]:
    """Tokenize batches and yield them in the order they came, whatever order they finish in."""
    if job.workers == 1:
        for batch in batches:
            yield _encode(encoder, batch, job.append_eod)
        return
    # spawn: a fork would copy whatever threads and locks this process happens to hold.
    pool = ProcessPoolExecutor(
        job.workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    pending: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= _IN_FLIGHT_PER_WORKER * job.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died (out of memory?)\n  remedy:  use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: Encoder
_worker_job: _Job


def _start_worker(job: _Job) -> None:
    global _worker_encoder, _worker_job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder, _worker_job = build_encoder(job.encoder_spec), job


def _exit_with_parent() -> None:
    """Without this, workers of a parent that was killed with SIGKILL would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[str]) -> _Encoded:
    return _encode(_worker_encoder, batch, _worker_job.append_eod)


def _encode(encoder: Encoder, batch: list[str], append_eod: bool) -> _Encoded:
    parts: list[np.ndarray] = []
    text_bytes = 0
    for text in batch:
        ids = np.asarray(encoder.encode(text) if text.strip() else [], dtype=np.int32)
        if ids.size == 0:
            continue
        # Some tokenizers end every text themselves; one end is enough.
        if append_eod and ids[-1] != encoder.eod:
            ids = np.append(ids, np.int32(encoder.eod))
        parts.append(ids)
        text_bytes += len(text.encode("utf-8"))
    all_ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    if all_ids.size and not 0 <= all_ids.min() <= all_ids.max() < encoder.vocab_size:
        raise DataError(
            f"tokenizer {encoder.name}: gives ids from {all_ids.min()} to {all_ids.max()}, outside "
            f"its own vocabulary of {encoder.vocab_size}"
        )
    return _Encoded(all_ids, [len(ids) for ids in parts], len(batch) - len(parts), text_bytes)


def _verify(draft: Path, encoder: Encoder, totals: _Totals, append_eod: bool) -> None:
    """Read the dataset back as Megatron will and compare it with what was meant to be written."""
    indexed_dataset = _import_indexed_dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about there being no rank, outside torch.distributed
        dataset = indexed_dataset.IndexedDataset(str(draft))
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    documents = len(dataset.document_indices) - 1
    ids = dataset.bin_reader.read(dtype=dataset.index.dtype, count=int(lengths.sum()), offset=0)
    low, high = int(ids.min()), int(ids.max())
    ended = bool(np.all(ids[np.cumsum(lengths) - 1] == encoder.eod))
    del ids  # a view of the mapped file, which must go before the dataset closes it
    if (documents, int(lengths.sum())) != (totals.documents, totals.tokens):
        raise DataError(
            f"dataset {draft.name}: reading it back gives {documents} documents and "
            f"{lengths.sum()} tokens, {totals.documents} and {totals.tokens} were written"
        )
    if low < 0 or high >= encoder.vocab_size:
        raise DataError(f"dataset {draft.name}: reading it back gives ids from {low} to {high}")
    if append_eod and not ended:
        raise DataError(f"dataset {draft.name}: a document read back does not end with its end id")


def _sidecar(
    prefix: Path, encoder: Encoder, reader: DocumentReader, totals: _Totals, append_eod: bool
) -> dict[str, Any]:
    """Paths are relative to the sidecar, so that a corpus folder can be moved as a whole."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, prefix.parent)

    return {
        "tokenizer": {
            "name": encoder.name,
            "path": relative(encoder.path) if encoder.path else None,
            "sha256": encoder.sha256,
        },
        "vocab_size": encoder.vocab_size,
        "eod": encoder.eod,
        "append_eod": append_eod,
        "dtype": totals.dtype,
        "documents": totals.documents,
        "tokens": totals.tokens,
        "empty_documents": totals.empty,
        "text_bytes": totals.text_bytes,
        "sources": [{"path": relative(f), "bytes": f.stat().st_size} for f in reader.files],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _publish(draft: Path, prefix: Path) -> None:
    """Move the files to their names, the index last: without an index there is no dataset."""
    suffixes = (".bin", ".json", ".idx")
    for suffix in suffixes:
        _fsync(Path(f"{draft}{suffix}"))
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    try:
        for suffix in suffixes:
            Path(f"{draft}{suffix}").replace(f"{prefix}{suffix}")
        _fsync(prefix.parent)
    except BaseException:
        for suffix in suffixes:
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _import_indexed_dataset() -> ModuleType:
    """Megatron's module, imported late: it brings torch with it, which takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Transformer Engine and Apex, not needed here
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset  # type: ignore[no-any-return]


def _progress_bar(wanted: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[documents]:,} documents"),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (wanted and sys.stderr.isatty()),
    )
