"""Text to Megatron ``.bin/.idx``: tokenize in parallel, write atomically, read back, describe."""

import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.progress import Progress, TaskID

from uar_megatron.data.check import check_dataset
from uar_megatron.data.encoding import Encoded, batches, encode_documents
from uar_megatron.data.files import publish_dataset, write_json
from uar_megatron.data.progress import progress_bar
from uar_megatron.data.readback import read_back
from uar_megatron.data.readers import DocumentReader
from uar_megatron.data.sidecar import sidecar
from uar_megatron.data.tokenizers import Encoder, build_encoder
from uar_megatron.data.workers import worker_pool
from uar_megatron.errors import DataError

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
            with progress_bar(progress) as bar:
                totals = _write(job, encoder, reader, draft, bar)
            eod = encoder.eod if append_eod else None
            read_back(draft, totals.documents, totals.tokens, encoder.vocab_size, eod)
            files = [(path, path.stat().st_size) for path in reader.files]
            content = sidecar(prefix, encoder, files, totals, append_eod)
            write_json(Path(f"{draft}.json"), content)
            check_dataset(draft, encoder.vocab_size)
            publish_dataset(draft, prefix)
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
        for encoded in _encoded_batches(job, encoder, batches(reader)):
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


def _count(totals: _Totals, encoded: Encoded, bar: Progress, task: TaskID, read: int) -> None:
    totals.documents += len(encoded.lengths)
    totals.tokens += len(encoded.ids)
    totals.empty += encoded.empty
    totals.text_bytes += sum(encoded.sizes)
    bar.update(task, completed=read, documents=totals.documents, tokens=totals.tokens)


def _encoded_batches(job: _Job, encoder: Encoder, groups: Iterator[list[str]]) -> Iterator[Encoded]:
    """Tokenize batches and yield them in the order they came, whatever order they finish in."""
    if job.workers == 1:
        for batch in groups:
            yield encode_documents(encoder, batch, job.append_eod)
        return
    pending: deque[Future[Encoded]] = deque()
    with worker_pool(job.workers, _start_worker, job) as pool:
        for batch in groups:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= _IN_FLIGHT_PER_WORKER * job.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_encoder: Encoder
_worker_job: _Job


def _start_worker(job: _Job) -> None:
    global _worker_encoder, _worker_job
    _worker_encoder, _worker_job = build_encoder(job.encoder_spec), job


def _encode_in_worker(batch: list[str]) -> Encoded:
    return encode_documents(_worker_encoder, batch, _worker_job.append_eod)


def _import_indexed_dataset() -> ModuleType:
    """Megatron's module, imported late: it brings torch with it, which takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Transformer Engine and Apex, not needed here
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset  # type: ignore[no-any-return]
