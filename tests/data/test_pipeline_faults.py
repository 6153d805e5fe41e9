"""Kills, damaged shards and full disks: what is finished is kept, what is wrong is named."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
import zstandard
from corpora import EOD, as_text, build, contents, put_shard, put_sources, random_texts, recipe
from jobs import TIMEOUT, environment
from typer.testing import CliRunner

from uar_megatron.cli import app
from uar_megatron.data.pipeline.manifest import merge_corpus
from uar_megatron.data.pipeline.part import DiskFullError, build_part, open_encoder, part_prefix
from uar_megatron.data.pipeline.plan import open_plan
from uar_megatron.data.pipeline.recipe import Recipe
from uar_megatron.data.pipeline.share import tokenize_share
from uar_megatron.errors import DataError

KILLS = 20
_TOUCHES_FILES = ("open", "os.", "shutil.", "fcntl.")


def in_child(work: Callable[[], object]) -> int:
    """Run something in a process group of its own, forked from this process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(event: int, made: Recipe, out: Path, count: Path | None = None) -> bool:
    """Build until the file system is used for the ``event``-th time; whether it came to that."""

    def work() -> None:
        seen = 0

        def hook(name: str, arguments: object) -> None:
            nonlocal seen
            if name.startswith(_TOUCHES_FILES):
                seen += 1
                if seen == event:
                    os.killpg(0, signal.SIGKILL)

        sys.addaudithook(hook)
        build(made, out)
        if count is not None:
            count.write_text(str(seen))

    return os.WIFSIGNALED(in_child(work))


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is one: the pipeline waits for the disk all the time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_killed_at_20_random_points_and_resumed_it_gives_the_same_bytes(quick_disk: Path) -> None:
    put_sources(quick_disk / "in", documents=20, shards=(3, 1))
    made = recipe(quick_disk / "in", validation={"tokens": 1500})
    assert not killed_at(0, made, quick_disk / "whole", quick_disk / "count")
    expected = contents(quick_disk / "whole")
    events = int((quick_disk / "count").read_text())
    assert events > 150
    rng = random.Random(8)
    # One in each twentieth, so that no phase goes without; every other one is killed again.
    for i in range(KILLS):
        out = quick_disk / f"{i}"
        at = rng.randint(1 + i * events // KILLS, (i + 1) * events // KILLS)
        assert killed_at(at, made, out), at
        if i % 2:
            killed_at(rng.randint(1, events), made, out)
        build(made, out)
        assert contents(out) == expected, f"killed at {at} of {events}"
        shutil.rmtree(out)


def test_drafts_of_a_call_that_was_killed_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sources(tmp_path / "in", documents=5)
    made = recipe(tmp_path / "in")
    build(made, tmp_path / "whole")
    with monkeypatch.context() as killed:
        for owner, name in ((Path, "replace"), (Path, "unlink")):
            killed.setattr(owner, name, lambda *arguments, **options: None)
        killed.setattr(os, "link", lambda *arguments: None)
        killed.setattr(os, "getpid", lambda: 1)
        with pytest.raises(DataError):
            open_plan(made, tmp_path / "out")
    assert list((tmp_path / "out").glob(".*"))
    build(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def kill_group(process: subprocess.Popen[bytes], after: float) -> None:
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_the_command_with_two_workers_killed_as_a_group(tmp_path: Path) -> None:
    put_sources(tmp_path / "in", documents=6000)
    sources = [{"name": name, "paths": [name]} for name in ("web", "code")]
    values = {"tokenizer": "bytes", "root": str(tmp_path / "in"), "sources": sources}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "uar_megatron.cli",
        "corpus",
        "build",
        str(tmp_path / "r.yaml"),
    ]
    command += ["-o", str(tmp_path / "out"), "--workers", "2"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment(), start_new_session=True)

    build(Recipe.model_validate(values), tmp_path / "whole")
    parts = tmp_path / "out" / "parts"
    process = start()
    deadline = time.monotonic() + TIMEOUT
    while not list(parts.glob("*/*.done")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_group(process, 0.01)
    assert 0 < len(list(parts.glob("*/*.done"))) < 8
    assert start().wait(timeout=TIMEOUT) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(2000))
DAMAGES: dict[str, tuple[str, bytes, str]] = {
    "zst cut short": ("x.jsonl.zst", cut(zstandard.compress(LINES)), "damaged or cut short after"),
    "gz cut short": ("x.jsonl.gz", cut(gzip.compress(LINES)), "damaged or cut short after line"),
    "gz damaged": (
        "x.jsonl.gz",
        gzip.compress(LINES)[:900] + b"\0" * 99 + gzip.compress(LINES)[999:],
        "damaged or cut short after line",
    ),
    "not utf-8": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "line 2: not valid UTF-8 at byte",
    ),
    "text not utf-8": ("x.txt", b"ab\ncd\xc3", "not valid UTF-8 at byte 5"),
    "broken json": ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2: broken JSON"),
    "no field": ("x.jsonl", b'{"body": "a"}\n', "line 1: no field 'text'; the fields are: 'body'"),
    "half an id": (
        "x.npy",
        np.array([1, EOD, 2], "uint16").tobytes() + b"\0",
        "7 bytes are not",
    ),
    "id too large": (
        "x.npy",
        np.array([1, 257, EOD], "uint16").tobytes(),
        "id 257 at token 1 ",
    ),
    "no end": (
        "x.npy",
        np.array([1, 2, 3], "uint32").tobytes(),
        f"none of its 6 ids of uint16 is {EOD}, which ends a document",
    ),
    "numpy header": ("x.npy", b"\x93NUMPY\x01\0" + b"\0" * 90, "begins with numpy's header"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_the_rest_is_kept(damage: str, tmp_path: Path) -> None:
    name, data, message = DAMAGES[damage]
    good = [put_shard(tmp_path / "in" / f"{i}.jsonl", random_texts(i, 20)) for i in (0, 9)]
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    bad.write_bytes(data)
    kind = "uint16" if name.endswith(".npy") else None
    sources = [
        {"name": "good", "paths": [str(good[0])]},
        {"name": "bad", "paths": [str(bad)], "tokens": kind},
        {"name": "last", "paths": [str(good[1])]},
    ]
    made, out = recipe(tmp_path, sources=sources), tmp_path / "out"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made.model_dump()))
    words = [str(tmp_path / "r.yaml"), "-o", str(out), "--workers", "1"]
    result = CliRunner().invoke(app, ["corpus", "build", *words])
    told = str(result.exception)
    assert isinstance(result.exception, DataError)  # main() makes it exit code 2
    assert "1 of 3 shards failed; 2 are finished and kept" in told
    assert str(bad) in told
    assert message in told
    assert (out / "parts" / "good" / "000000.done").exists()
    assert (out / "parts" / "last" / "000002.done").exists()
    with pytest.raises(DataError, match="1 of 3 shards are not tokenized") as refused:
        merge_corpus(open_plan(made, out), out)
    assert message in str(refused.value)
    assert not (out / "manifest.json").exists()


def test_a_type_too_small_for_the_tokenizer_is_refused_at_once(
    tiktoken: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    np.array([1, 2, 3], "uint16").tofile(tmp_path / "a.npy")
    vocabulary = tiktoken([f"{i:05}" for i in range(2**16 - 256 - 1000 + 1)])
    sources = [{"name": "a", "paths": ["a.npy"], "tokens": "uint16"}]
    made = recipe(tmp_path, sources=sources, tokenizer=f"tiktoken:{vocabulary}")
    with pytest.raises(DataError, match="source a: tokens: uint16 does not hold the 65537 ids"):
        open_plan(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sources[0]["tokens"] = "uint32"
    open_plan(recipe(tmp_path, sources=sources, tokenizer=made.tokenizer), tmp_path / "out")


def test_a_damaged_shard_is_mended(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    made = recipe(tmp_path / "in", validation={"tokens": 1500})
    build(made, tmp_path / "whole")
    bad, out = tmp_path / "in" / "web" / "1.jsonl.zst", tmp_path / "out"
    good = bad.read_bytes()
    bad.write_bytes(cut(good))
    with pytest.raises(DataError, match="1 of 8 shards failed"):
        build(made, out)
    bad.write_bytes(good)
    manifest = build(made, out)
    assert manifest["sources"]["web"]["shards"][1]["shard_bytes"] == len(good)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("more", [b"", b'{"text": "more"}\n'])
def test_a_shard_that_changes_while_it_is_read(
    more: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sources(tmp_path / "in")
    out = tmp_path / "out"
    plan = open_plan(recipe(tmp_path / "in"), out)
    path = Path(plan.shards[0].path)

    def read(*arguments: object) -> Iterator[str]:
        yield "text"
        with path.open("ab") as file:
            file.write(more)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr("uar_megatron.data.pipeline.part.read_documents", read)
    with pytest.raises(DataError, match=r"web/0\.jsonl: has changed while it was read"):
        build_part(plan, out, plan.shards[0], open_encoder(plan, out))
    assert not Path(f"{part_prefix(out, plan.shards[0])}.done").exists()


def test_shards_are_left_out_only_by_name(tmp_path: Path) -> None:
    kept = put_sources(tmp_path / "in")
    bad = put_shard(tmp_path / "in" / "web" / "9.jsonl", ["x"])
    bad.write_bytes(b"{")
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    plan = open_plan(made, out)
    with pytest.raises(DataError, match=r"9\.jsonl, line 1: broken JSON"):
        tokenize_share(plan, out, progress=False)
    with pytest.raises(DataError, match="--leave-out other: no such shard"):
        merge_corpus(plan, out, ["other"])
    manifest = merge_corpus(plan, out, [str(bad)])
    assert manifest["left_out"] == ["../in/web/9.jsonl"]
    assert as_text(out / "web") == kept["web"]
    with pytest.raises(DataError, match="is complete, merged without"):
        merge_corpus(plan, out)


def test_a_part_that_cannot_be_written(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    plan = open_plan(made, out)
    blocked = Path(f"{part_prefix(out, plan.shards[5])}.bin")
    blocked.mkdir(parents=True)
    with pytest.raises(DataError, match=r"code/0\.jsonl: its part .*000005\.bin cannot be written"):
        tokenize_share(plan, out, progress=False)
    blocked.rmdir()
    assert tokenize_share(plan, out, progress=False) == 1
    build(made, out)
    assert not list(out.rglob("*.error"))


def test_sources_without_a_document(tmp_path: Path) -> None:
    put_shard(tmp_path / "in" / "web" / "0.jsonl", ["", " \n", "\u3000"])
    put_shard(tmp_path / "in" / "code" / "0.jsonl", ["one"])
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(DataError, match="source web: no documents in 1 shards"):
        build(made, out)
    put_shard(tmp_path / "in" / "web" / "1.jsonl", ["two"])
    shutil.rmtree(out)
    manifest = build(made, out)
    assert [shard["empty"] for shard in manifest["sources"]["web"]["shards"]] == [3, 0]
    assert as_text(out / "web") == ["two"]


def test_a_part_that_has_changed_is_found(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    made = recipe(tmp_path / "in", validation={"fraction": 0.3})
    for suffix in (".bin", ".idx", ".key"):
        out = tmp_path / suffix
        plan = open_plan(made, out)
        tokenize_share(plan, out, progress=False)
        path = Path(f"{part_prefix(out, plan.shards[1])}{suffix}")
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"000001"):
            merge_corpus(plan, out)
        assert not (out / "web_train.idx").exists()


@pytest.mark.parametrize("command", ["build", "tokenize", "merge", "verify"])
def test_a_folder_that_holds_no_corpus_or_can_hold_none(command: str, tmp_path: Path) -> None:
    put_shard(tmp_path / "in" / "web" / "0.jsonl", ["one"])
    (tmp_path / "r.yaml").write_text(
        f"tokenizer: bytes\nroot: {tmp_path / 'in'}\nsources: [{{name: web, paths: [web]}}]\n"
    )

    def refused(out: Path) -> str:
        words = ["corpus", command, str(tmp_path / "r.yaml"), "-o", str(out)]
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, DataError)  # main() makes it exit code 2
        return str(result.exception)

    (tmp_path / "file").touch()
    begins = command in ("build", "tokenize")
    words = "a corpus cannot be begun there: .*\n  remedy: " if begins else "holds no corpus .*\n"
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        assert re.match(f"{out}: {words}", refused(out))
    if not begins:
        assert "`uar corpus build` and `tokenize` begin one" in refused(tmp_path / "mistyped")
        assert not (tmp_path / "mistyped").exists()


def test_a_pattern_that_matches_a_link_to_nothing(tmp_path: Path) -> None:
    put_sources(tmp_path / "in")
    (tmp_path / "in" / "web" / "9.jsonl").symlink_to("nowhere")
    sources = [{"name": "web", "paths": ["web/*.jsonl"]}]
    with pytest.raises(DataError, match=r"9\.jsonl: a link that leads nowhere \(to nowhere\)"):
        open_plan(recipe(tmp_path / "in", sources=sources), tmp_path / "out")


def test_two_processes_on_one_shard(tmp_path: Path) -> None:
    import fcntl

    put_sources(tmp_path / "in")
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    plan = open_plan(made, out)
    shard, encoder = plan.shards[0], open_encoder(plan, out)
    path = Path(f"{part_prefix(out, shard)}.bin")
    path.parent.mkdir()
    path.write_bytes(b"theirs")
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is tokenizing it"):
            build_part(plan, out, shard, encoder)
    assert path.read_bytes() == b"theirs"
    assert build_part(plan, out, shard, encoder).documents > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB; where one may not be mounted, files of at most 60 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_what_was_finished_is_kept(
    small_disk: Path, tmp_path: Path
) -> None:
    put_shard(tmp_path / "in" / "web" / "0.jsonl", random_texts(0, 20))
    put_shard(tmp_path / "in" / "web" / "1.jsonl.zst", ["much " * 100_000])
    put_shard(tmp_path / "in" / "code" / "0.jsonl", random_texts(0, 20))
    made, out = recipe(tmp_path / "in"), small_disk / "out"
    plan = open_plan(made, out)
    pattern = r"web/1\.jsonl\.zst: its part .*000001\.bin cannot be written: .*(No space|too large)"
    with pytest.raises(DataError, match=pattern):
        tokenize_share(plan, out, progress=False)
    assert (out / "parts" / "web" / "000000.done").exists()
    assert (out / "parts" / "web" / "000001.bin").stat().st_size == 0  # its space is free again
    put_shard(tmp_path / "in" / "web" / "1.jsonl.zst", ["much"])
    shutil.rmtree(out)
    build(made, out)
    assert as_text(out / "web")[-1] == "much"


def test_no_space_stops_the_rest_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_sources(tmp_path / "in")
    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    plan = open_plan(made, out)
    tried = []

    def full(*arguments: object) -> None:
        tried.append(arguments)
        raise DiskFullError("no space")

    monkeypatch.setattr("uar_megatron.data.pipeline.share.build_part", full)
    with pytest.raises(DataError, match="1 of 8 shards failed"):
        tokenize_share(plan, out, progress=False)
    assert len(tried) == 1
