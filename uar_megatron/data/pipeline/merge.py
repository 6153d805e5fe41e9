"""Parts to the datasets of a source: joined in the recipe's order, split by document."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uar_megatron.data.check import check_dataset
from uar_megatron.data.files import publish_dataset, put_json, sha256_of, write_json
from uar_megatron.data.index_file import read_lengths, token_dtype, write_index
from uar_megatron.data.pipeline.holdout import KEY, threshold_of_fraction, threshold_of_tokens
from uar_megatron.data.pipeline.part import Part, part_prefix, read_part
from uar_megatron.data.pipeline.plan import PARTS, Plan, Shard
from uar_megatron.data.sidecar import sidecar
from uar_megatron.errors import DataError

TRAIN, VALID = "train", "valid"
_COPY_TOKENS = 1 << 24


@dataclass(frozen=True)
class Merged:
    """A dataset of a source; ``name`` is its prefix in the corpus's folder."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    files: dict[str, str]


@dataclass
class _Counts:
    """What the sidecar tells."""

    dtype: str
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    text_bytes: int = 0


def finished_parts(
    plan: Plan, out: Path, left_out: Sequence[str] = ()
) -> dict[str, list[tuple[Shard, Part]]]:
    """Every source's parts, in order.

    Raises:
        DataError: one is missing and not in ``left_out``, or a name in that is no shard's.
    """
    unknown = sorted(set(left_out) - {shard.path for shard in plan.shards})
    if unknown:
        raise DataError(
            f"--leave-out {unknown[0]}: no such shard\n"
            f"  allowed: paths as in the plan, e.g. {plan.shards[0].path}"
        )
    found: dict[str, list[tuple[Shard, Part]]] = {s.name: [] for s in plan.recipe.sources}
    missing = []
    for shard in plan.shards:
        if shard.path in left_out:
            continue
        part = read_part(out, shard)
        if part is None:
            missing.append(shard)
        else:
            found[shard.source].append((shard, part))
    if missing:
        lines = [_why(out, shard) for shard in missing[:10]]
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards are not tokenized\n"
            + "\n".join(lines)
            + "\n  remedy:  run `uar corpus tokenize` for them, or leave them out with --leave-out"
        )
    return found


def _why(out: Path, shard: Shard) -> str:
    path = Path(f"{part_prefix(out, shard)}.error")
    return path.read_text(encoding="utf-8").rstrip() if path.exists() else f"{shard.path}: not yet"


def thresholds(
    plan: Plan, out: Path, parts: Mapping[str, Sequence[tuple[Shard, Part]]]
) -> dict[str, int]:
    """For each source: documents with a key below it are held out.

    Without weights it is one for all, so that copies stay together wherever they are, and sources
    give in proportion to their tokens in expectation. Weights ask for other proportions: each
    source then has its own, and of copies in two sources one may be held out, the other not.

    Raises:
        DataError: a source has no documents, or there are too few to hold out so much.
    """
    prefixes = {
        name: [part_prefix(out, shard) for shard, part in found if part.documents]
        for name, found in parts.items()
    }
    for name, kept in prefixes.items():
        if not kept:
            raise DataError(f"source {name}: no documents in {len(parts[name])} shards")
    validation = plan.recipe.validation
    if validation is None:
        return dict.fromkeys(parts, 0)
    if validation.fraction is not None:
        return dict.fromkeys(parts, threshold_of_fraction(validation.fraction))
    assert validation.tokens is not None
    weights = {source.name: source.weight for source in plan.recipe.sources if source.weight}
    if not weights:
        everything = [prefix for kept in prefixes.values() for prefix in kept]
        return dict.fromkeys(parts, _threshold(everything, validation.tokens, "the corpus"))
    total = sum(weights.values())
    targets = {
        name: max(1, round(validation.tokens * weight / total)) for name, weight in weights.items()
    }
    return {
        name: _threshold(prefixes[name], target, f"source {name}")
        for name, target in targets.items()
    }


def _threshold(prefixes: Sequence[Path], target: int, name: str) -> int:
    def keys_and_lengths() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for prefix in prefixes:
            yield _keys(prefix)["key"], read_lengths(Path(f"{prefix}.idx"))

    return threshold_of_tokens(keys_and_lengths, target, name)


@dataclass(frozen=True)
class Volume:
    """What becomes one dataset of each split.

    Attributes:
        source: it is of.
        name: of its files, before the split's.
        parts: in their order.
        threshold: documents with a key below it are held out.
    """

    source: str
    name: str
    parts: tuple[tuple[Shard, Part], ...]
    threshold: int


def volumes_of(
    plan: Plan, parts: Sequence[tuple[Shard, Part]], source: str, threshold: int
) -> list[Volume]:
    """The volumes of a source: one, or several where the recipe limits their size.

    A part is never cut; one that is larger than the limit is a volume of its own.

    Args:
        plan: of the corpus.
        parts: of the source.
        source: its name.
        threshold: documents with a key below it are held out.
    """
    limit = plan.recipe.file_tokens
    volumes: list[list[tuple[Shard, Part]]] = [[]]
    tokens = 0
    for shard, part in parts:
        if limit and tokens and tokens + part.tokens > limit:
            volumes.append([])
            tokens = 0
        volumes[-1].append((shard, part))
        tokens += part.tokens
    names = [
        f"{source}.{number:04}" if len(volumes) > 1 else source for number in range(len(volumes))
    ]
    return [
        Volume(source, name, tuple(volume), threshold)
        for name, volume in zip(names, volumes, strict=True)
    ]


def merge_volume(plan: Plan, out: Path, volume: Volume) -> dict[str, Merged]:
    """Write the datasets of a volume, unless a call before has finished them.

    Returns:
        The dataset of each split; one without documents is not written.

    Raises:
        DataError: a part is damaged, or a file cannot be written.
    """
    record = out / PARTS / f"{volume.name}.merged"
    wanted = _wanted(volume)
    drafts = out / PARTS / f"{volume.name}.draft"
    try:
        done = _read_record(record, wanted, out)
        if done is not None:
            return done
        shutil.rmtree(drafts, ignore_errors=True)  # of a merge that was killed
        drafts.mkdir(parents=True)
        merged = _join(plan, out, volume, drafts)
        splits = {split: asdict(one) for split, one in merged.items()}
        put_json(record, wanted | {"splits": splits})
    except OSError as error:
        raise DataError(f"source {volume.source}: cannot be merged: {error}") from error
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
    return merged


def discard_others(volumes: Sequence[Volume], out: Path) -> None:
    """Remove the datasets that a merge by another recipe has left: other files, or other splits."""
    wanted = {volume.name: _wanted(volume) for volume in volumes}
    for path in sorted((out / PARTS).glob("*.merged")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if {key: record[key] for key in ("parts", "threshold")} == wanted.get(path.stem):
            continue
        for one in record["splits"].values():
            for suffix in one["files"]:
                (out / f"{one['name']}{suffix}").unlink(missing_ok=True)
        path.unlink()


def _wanted(volume: Volume) -> dict[str, Any]:
    return {"parts": [asdict(part) for _, part in volume.parts], "threshold": volume.threshold}


def _read_record(path: Path, wanted: dict[str, object], out: Path) -> dict[str, Merged] | None:
    """What an earlier merge of the same parts left, if its files are there."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    merged = {split: Merged(**values) for split, values in record.pop("splits").items()}
    names = [out / f"{m.name}{suffix}" for m in merged.values() for suffix in m.files]
    same = record == wanted and all(name.exists() for name in names)
    return merged if same else None


def _keys(prefix: Path) -> np.ndarray:
    return np.fromfile(f"{prefix}.key", dtype=KEY)


def _join(plan: Plan, out: Path, volume: Volume, drafts: Path) -> dict[str, Merged]:
    splits = [TRAIN, VALID] if plan.recipe.validation else [TRAIN]
    suffixes = {TRAIN: "_train", VALID: "_valid"} if plan.recipe.validation else {TRAIN: ""}
    dtype = token_dtype(plan.tokenizer.vocab_size)
    writers = [_Writer(drafts / f"{volume.name}{suffixes[split]}", dtype) for split in splits]
    try:
        for shard, part in volume.parts:
            if part.documents:
                check_dataset(part_prefix(out, shard))
                _copy_part(part_prefix(out, shard), part, volume.threshold, writers)
    finally:
        for writer in writers:
            writer.stream.close()
    writers[0].counts.empty = sum(part.empty for _, part in volume.parts)
    merged = {}
    for split, writer in zip(splits, writers, strict=True):
        if writer.counts.documents:
            _finish(plan, out, volume, writer, split == VALID)
            merged[split] = _publish(out, writer)
    return merged


class _Writer:
    """The ``.bin`` of a split as it grows."""

    def __init__(self, draft: Path, dtype: str) -> None:
        self.draft = draft
        self.stream: BinaryIO = open(f"{draft}.bin", "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.counts = _Counts(dtype)

    def write(self, data: memoryview) -> None:
        self.stream.write(data)
        self.digest.update(data)


def _copy_part(prefix: Path, part: Part, threshold: int, writers: Sequence[_Writer]) -> None:
    """Give each document to its split, and see that the part is what was written."""
    lengths = read_lengths(Path(f"{prefix}.idx"))
    held_out = _held_out(prefix, threshold, len(lengths))
    tokens = np.memmap(f"{prefix}.bin", dtype=writers[0].counts.dtype, mode="r")
    ends = np.cumsum(lengths, dtype=np.int64)
    # Documents of one split that follow each other are copied together.
    bounds = np.flatnonzero(np.diff(held_out, prepend=~held_out[:1], append=~held_out[-1:]))
    seen = hashlib.sha256()
    for first, after in pairwise(bounds):
        writer = writers[int(held_out[first])]
        start, end = int(ends[first - 1]) if first else 0, int(ends[after - 1])
        for low in range(start, end, _COPY_TOKENS):
            data = tokens[low : min(low + _COPY_TOKENS, end)].data
            writer.write(data)
            seen.update(data)
        writer.counts.documents += int(after - first)
        writer.counts.tokens += end - start
    files = {
        suffix: sha256_of(Path(f"{prefix}{suffix}")) for suffix in part.files if suffix != ".bin"
    }
    if files | {".bin": seen.hexdigest()} != part.files:
        raise DataError(
            f"{prefix}.bin: has changed since {part.shard} was tokenized\n"
            f"  remedy:  remove {prefix}.done and tokenize that shard again"
        )
    if len(writers) == 1:
        writers[0].counts.text_bytes += part.text_bytes
    else:
        sizes = _keys(prefix)["bytes"].astype(np.int64)
        writers[0].counts.text_bytes += int(sizes[~held_out].sum())
        writers[1].counts.text_bytes += int(sizes[held_out].sum())


def _held_out(prefix: Path, threshold: int, documents: int) -> np.ndarray:
    if threshold == 0:
        return np.zeros(documents, dtype=bool)
    held_out: np.ndarray = _keys(prefix)["key"] < np.uint64(threshold)
    return held_out


def _finish(plan: Plan, out: Path, volume: Volume, writer: _Writer, held_out: bool) -> None:
    """Write what belongs to a ``.bin``, and check them together."""
    prefixes = [part_prefix(out, shard) for shard, part in volume.parts if part.documents]

    def lengths() -> Iterator[np.ndarray]:
        for prefix in prefixes:
            block = read_lengths(Path(f"{prefix}.idx"))
            yield block[_held_out(prefix, volume.threshold, len(block)) == held_out]

    write_index(Path(f"{writer.draft}.idx"), writer.counts.dtype, lengths)
    files = [(Path(shard.path), part.shard_bytes) for shard, part in volume.parts]
    name = out / writer.draft.name
    recipe = plan.recipe
    content = sidecar(name, plan.tokenizer, files, writer.counts, recipe.append_eod)
    write_json(Path(f"{writer.draft}.json"), content)
    check_dataset(writer.draft, plan.tokenizer.vocab_size)


def _publish(out: Path, writer: _Writer) -> Merged:
    files = {".bin": writer.digest.hexdigest()}
    for suffix in (".idx", ".json"):
        files[suffix] = sha256_of(Path(f"{writer.draft}{suffix}"))
    name, counts = writer.draft.name, writer.counts
    publish_dataset(writer.draft, out / name)
    return Merged(name, counts.documents, counts.tokens, counts.text_bytes, files)
