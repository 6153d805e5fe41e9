"""What was built is what was encoded, whatever the workers; a failed build changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import TIMEOUT, environment
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, processors

from uar_megatron.data.build import build_dataset
from uar_megatron.data.check import check_dataset
from uar_megatron.data.cli import prepare, run_command
from uar_megatron.data.tokenizers import build_encoder
from uar_megatron.errors import DataError

Tiktoken = Callable[[Iterable[str]], Path]


def put_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def as_megatron_reads(prefix: Path) -> list[list[int]]:
    """The documents, one sequence each."""
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; a folder counts as one, so that a forgotten one shows."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


@given(
    texts=st.lists(st.text() | st.sampled_from(["", " \n\t", "\u3000"]), max_size=6),
    append_eod=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_megatron_reads_the_bytes_of_every_document_that_is_not_empty(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], append_eod: bool
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    source = put_lines(folder / "a.jsonl", texts)
    kept = [text for text in texts if text.strip()]
    if not kept:
        with pytest.raises(DataError, match=f"no documents: 1 input files .* {len(texts)} empty"):
            build_dataset([source], folder / "data", "bytes", append_eod=append_eod)
        assert list(contents(folder)) == ["a.jsonl"]
        return
    summary = build_dataset([source], folder / "data", "bytes", append_eod=append_eod)
    expected = [[*text.encode(), *[256] * append_eod] for text in kept]
    assert as_megatron_reads(folder / "data") == expected
    assert (summary.documents, summary.empty_documents) == (len(kept), len(texts) - len(kept))
    assert summary.text_bytes == sum(len(text.encode()) for text in kept)
    assert summary.tokens == sum(map(len, expected))


def test_several_sources_and_a_tokenizer_that_ends_texts_itself(bpe: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "ends.json"))
    sources = [tmp_path / "a.txt", put_lines(tmp_path / "b.jsonl", ["2nd <|endoftext|>.", "3rd"])]
    sources[0].write_text("first\n--\n\n--\nno end")
    spec, prefix = f"hf:{tmp_path / 'ends.json'}", tmp_path / "new" / "data"
    summary = build_dataset(sources, prefix, spec, separator="--")
    plain, encoder = build_encoder(f"hf:{bpe}"), build_encoder(spec)
    texts = ["first\n", "\nno end", "2nd <|endoftext|>.", "3rd"]
    assert as_megatron_reads(prefix) == [[*plain.encode(text), 0] for text in texts]
    info = check_dataset(prefix, encoder.vocab_size)
    assert (info.documents, info.tokens, info.dtype) == (4, summary.tokens, summary.dtype)
    assert (info.vocab_size, info.tokenizer_sha256) == (encoder.vocab_size, encoder.sha256)
    sidecar = json.loads((tmp_path / "new" / "data.json").read_text())
    paths = [entry["path"] for entry in (*sidecar["sources"], sidecar["tokenizer"])]
    assert paths == ["../a.txt", "../b.jsonl", "../ends.json"]


def test_workers_do_not_change_a_byte(tiktoken: Tiktoken, tmp_path: Path) -> None:
    # The first batch is by far the slowest: with two workers, later ones are ready before it.
    texts = ["the fox " * 100_000, *(f"document {i}" for i in range(12_000)), "", "the last"]
    source = put_lines(tmp_path / "a.jsonl", texts)
    spec = f"tiktoken:{tiktoken([' fox', 'fo', ' the'])}"
    for workers in (1, 2):
        build_dataset([source], tmp_path / f"{workers}" / "data", spec, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert list(contents(tmp_path / "1")) == ["data.bin", "data.idx", "data.json"]
    encoder, documents = build_encoder(spec), as_megatron_reads(tmp_path / "2" / "data")
    assert documents == [[*encoder.encode(text), encoder.eod] for text in texts if text]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_the_token_type_holds_the_largest_id(
    vocabulary: int, dtype: str, tiktoken: Tiktoken, tmp_path: Path
) -> None:
    words = [*(f"{i:06}" for i in range(vocabulary - 1000 - 256 - 1)), " zebra"]
    (tmp_path / "a.txt").write_text(" zebra zebra")
    summary = build_dataset([tmp_path / "a.txt"], tmp_path / "data", f"tiktoken:{tiktoken(words)}")
    assert (summary.vocab_size, summary.dtype) == (vocabulary, dtype)
    assert IndexedDataset(str(tmp_path / "data")).index.dtype == np.dtype(dtype)
    assert as_megatron_reads(tmp_path / "data") == [[vocabulary - 1, vocabulary - 1, 2]]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_on_the_last_line_changes_nothing(workers: int, tmp_path: Path) -> None:
    source = put_lines(tmp_path / "a.jsonl", ["old"])
    build_dataset([source], tmp_path / "data", "bytes")
    put_lines(source, [f"new {i}" for i in range(3000)])
    with source.open("a") as stream:
        stream.write('{"text": "broken')
    before = contents(tmp_path)
    for name in ("data", "other"):
        with pytest.raises(DataError, match=r"a\.jsonl, line 3001: broken JSON"):
            build_dataset([source], tmp_path / name, "bytes", workers=workers)
    assert contents(tmp_path) == before
    build_dataset([put_lines(source, ["new"])], tmp_path / "data", "bytes")
    assert as_megatron_reads(tmp_path / "data") == [[*b"new", 256]]


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    source = put_lines(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(DataError, match="0 is not a number of processes"):
        build_dataset([source], tmp_path / "data", "bytes", workers=0)
    with pytest.raises(DataError, match=r"data: cannot be written: .*a\.jsonl"):
        build_dataset([source], source / "data", "bytes")
    with pytest.raises(DataError, match="fields are: 'text'"):
        build_dataset([source], tmp_path / "data", "bytes", json_field="body")
    assert list(contents(tmp_path)) == ["a.jsonl"]


def test_the_command_refuses_with_code_2_and_replaces_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, prefix = tmp_path / "a.txt", tmp_path / "data"
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # leave this process's handler alone

    def run(*options: str) -> tuple[int, str, str]:
        words = ["prepare_data.py", str(source), "-o", str(prefix), "-t", "bytes", *options]
        monkeypatch.setattr(sys, "argv", [*words, "--workers", "1"])
        with pytest.raises(SystemExit) as stop:
            run_command(prepare)
        return int(stop.value.code or 0), *capsys.readouterr()

    message = f"error: {source}: no such file, folder or match for the pattern\n"
    assert run() == (2, "", message)
    source.write_text("one\n\ntwo")
    assert run()[0] == 0
    assert as_megatron_reads(prefix) == [[*b"one\n\ntwo", 256]]
    before = contents(tmp_path)
    message = f"error: {prefix}.idx is already there\n  remedy:  pass --overwrite to replace it\n"
    assert run("--separator", r"\n\n") == (2, "", message)
    assert contents(tmp_path) == before
    code, out, err = run("--separator", r"\n\n", "--no-append-eod", "--overwrite")
    assert (code, err) == (0, "")
    assert as_megatron_reads(prefix) == [list(b"one"), list(b"two")]
    assert f"{prefix}: 2 documents, 6 tokens (uint16, 1.00 bytes of text per token)" in out


@pytest.mark.slow
def test_the_script_tells_how_to_train(
    repository: Path, tiktoken: Tiktoken, tmp_path: Path
) -> None:
    put_lines(tmp_path / "a.jsonl", ["one", "", "two"])
    path = tiktoken(["on"])
    command = [sys.executable, "scripts/prepare_data.py", f"{tmp_path}/*.jsonl", "--workers", "2"]
    command += ["-o", f"{tmp_path / 'data'}", "-t", f"tiktoken:{path}"]
    result = subprocess.run(
        command, cwd=repository, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr
    described, train_with = result.stdout.splitlines()
    assert "2 documents" in described
    assert "1 empty documents skipped" in described
    arguments = f"--tokenizer-type TikTokenizer --tokenizer-model {path} --vocab-size 1257"
    assert train_with == f"train with: {arguments}"
    assert check_dataset(tmp_path / "data", 1257).documents == 2


def open_when_read(pipe: Path, reader: subprocess.Popen[bytes]) -> int:
    """Open a named pipe for writing as soon as the other process reads from it."""
    deadline = time.monotonic() + TIMEOUT
    while reader.poll() is None and time.monotonic() < deadline:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{pipe} was not read; exit code {reader.returncode}")


@pytest.mark.slow
def test_a_stopped_build_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "endless.txt"
    os.mkfifo(pipe)
    command = [sys.executable, "scripts/prepare_data.py", str(pipe), "-o", str(tmp_path / "data")]
    process = subprocess.Popen([*command, "-t", "bytes"], cwd=repository, env=environment())
    try:
        writer = open_when_read(pipe, process)
        assert len(list(tmp_path.iterdir())) == 2  # the pipe and the temporary folder
        process.terminate()
        # A signal that comes just before a read waits until that read has ended; end it.
        os.close(writer)
        assert process.wait(timeout=TIMEOUT) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == [pipe]
