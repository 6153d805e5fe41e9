"""Files that appear whole or not at all, and their checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as this package does everywhere; not atomic."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def put_text(path: Path, text: str) -> None:
    """Write a small file, whole and on the disk, or leave what was there."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def put_json(path: Path, content: Any) -> None:
    """As :func:`put_text`."""
    put_text(path, json.dumps(content, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish_dataset(draft: Path, prefix: Path) -> None:
    """Move a dataset's files to their names, the index last: without it there is no dataset.

    Args:
        draft: prefix of the finished files, on the same file system.
        prefix: the name; a dataset that has it is replaced.
    """
    suffixes = (".bin", ".json", ".idx")
    for suffix in suffixes:
        fsync(Path(f"{draft}{suffix}"))
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    try:
        for suffix in suffixes:
            Path(f"{draft}{suffix}").replace(f"{prefix}{suffix}")
        fsync(prefix.parent)
    except BaseException:
        for suffix in suffixes:
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        raise
