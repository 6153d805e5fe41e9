"""The corpus as a whole: merge the sources, write manifest and blend, verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from uar_megatron.data.check import check_dataset
from uar_megatron.data.files import put_json, put_text, sha256_of
from uar_megatron.data.pipeline.merge import (
    TRAIN,
    VALID,
    Merged,
    Volume,
    discard_others,
    finished_parts,
    merge_volume,
    thresholds,
    volumes_of,
)
from uar_megatron.data.pipeline.part import Part
from uar_megatron.data.pipeline.plan import MANIFEST, PARTS, Plan, Shard, read_plan, rewrite_plan
from uar_megatron.data.pipeline.share import tokenize_share
from uar_megatron.data.sidecar import relative
from uar_megatron.data.workers import worker_pool
from uar_megatron.errors import DataError

BLEND, GROUP = "blend.json", "data.yaml"


def build_corpus(plan: Plan, out: Path, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Tokenize and merge on one node; a corpus that is complete is left alone.

    Returns:
        The manifest.

    Raises:
        DataError: see :func:`tokenize_share` and :func:`merge_corpus`.
    """
    tokenize_share(plan, out, workers=workers, progress=progress)
    return merge_corpus(plan, out, workers=workers)


def merge_corpus(
    plan: Plan,
    out: Path,
    left_out: Sequence[str] = (),
    keep_parts: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Join the parts of all sources; the manifest, written last, says that the corpus is complete.

    Of a complete corpus the blend's files are written again where it has been moved.

    Args:
        plan: of the corpus.
        out: its folder.
        left_out: paths of shards to do without.
        keep_parts: do not remove the parts, which need as much space again.
        workers: processes, each on one source (on one file of it, with ``file_tokens``).

    Returns:
        The manifest.

    Raises:
        DataError: a shard is not tokenized, a part is damaged, or a file cannot be written.
    """
    manifest = read_manifest(out)
    left_out = _as_in_plan(plan, left_out)
    names = sorted(relative(Path(path), out) for path in left_out)
    if manifest is not None and names != manifest["left_out"]:
        raise DataError(
            f"{out}: is complete, merged without {manifest['left_out'] or 'leaving out any shard'}"
            "\n  remedy:  begin in a new folder"
        )
    try:
        if manifest is None:
            parts = finished_parts(plan, out, left_out)
            merged = _merge_sources(plan, out, parts, workers)
            manifest = _manifest(plan, out, parts, merged, names)
            read = {part.shard: part.shard_bytes for found in parts.values() for _, part in found}
            rewrite_plan(plan, out, read)
            _put_blend(plan, out, manifest)
            put_json(out / MANIFEST, manifest)
        else:
            _put_blend(plan, out, manifest)  # the folder may have been moved
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}") from error
    if not keep_parts:
        shutil.rmtree(out / PARTS, ignore_errors=True)
        for draft in out.glob(".*.tmp"):  # of calls that were killed
            draft.unlink(missing_ok=True)
    return manifest


def _as_in_plan(plan: Plan, paths: Sequence[str]) -> list[str]:
    """The plan's names of shards; a path that is no shard's stays as it is."""
    if not paths:
        return []  # without a look at every shard
    names = {Path(shard.path).resolve(): shard.path for shard in plan.shards}
    return [names.get(Path(path).resolve(), path) for path in paths]


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a complete corpus; ``None`` where it is not complete."""
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{out / MANIFEST}: damaged: {error}") from error
    return manifest


def _merge_sources(
    plan: Plan, out: Path, parts: dict[str, list[tuple[Shard, Part]]], workers: int
) -> dict[str, dict[str, list[Merged]]]:
    """The datasets of every source and split."""
    volumes: list[Volume] = []
    for name, threshold in thresholds(plan, out, parts).items():
        volumes += volumes_of(plan, parts[name], name, threshold)
    discard_others(volumes, out)
    merged: dict[str, dict[str, list[Merged]]] = {name: {TRAIN: [], VALID: []} for name in parts}
    for volume, found in zip(volumes, _merge_volumes(plan, out, volumes, workers), strict=True):
        for split, one in found.items():
            merged[volume.source][split].append(one)
    for name, splits in merged.items():
        if not splits[TRAIN]:
            raise DataError(f"source {name}: every document is held out\n  remedy:  hold out less")
    return merged


def _merge_volumes(
    plan: Plan, out: Path, volumes: Sequence[Volume], workers: int
) -> list[dict[str, Merged]]:
    if workers == 1 or len(volumes) == 1:
        return [merge_volume(plan, out, volume) for volume in volumes]
    with worker_pool(min(workers, len(volumes)), _start_nothing) as pool:
        return list(pool.map(partial(merge_volume, plan, out), volumes))


def _start_nothing() -> None:
    """Merging needs nothing loaded."""


def _shares(plan: Plan, tokens: dict[str, int]) -> dict[str, float]:
    """Each source's part of the blend: by the recipe's weights, else by tokens."""
    weights = {s.name: s.weight or float(tokens[s.name]) for s in plan.recipe.sources}
    total = sum(weights.values()) or 1.0
    return {name: weight / total for name, weight in weights.items()}


def _manifest(
    plan: Plan,
    out: Path,
    parts: dict[str, list[tuple[Shard, Part]]],
    merged: dict[str, dict[str, list[Merged]]],
    left_out: list[str],
) -> dict[str, Any]:
    """Holds nothing of when, where and by how many it was built."""
    facts = asdict(plan.tokenizer)
    if plan.tokenizer.path:
        facts["location"] = relative(plan.tokenizer.path, out)
    counted = {name: sum(one.tokens for one in splits[TRAIN]) for name, splits in merged.items()}
    shares = _shares(plan, counted)
    content = {
        "recipe": plan.recipe.model_dump(),
        "tokenizer": facts,
        "sources": {
            name: {
                "share": shares[name],
                "datasets": {
                    split: [asdict(one) for one in volumes]
                    for split, volumes in merged[name].items()
                },
                "shards": [
                    asdict(part) | {"shard": relative(Path(part.shard), out)} for _, part in found
                ],
            }
            for name, found in parts.items()
        },
        "left_out": left_out,
        "warnings": _warnings(plan, counted, merged),
    }
    manifest: dict[str, Any] = json.loads(json.dumps(content))  # as it will be read back
    return manifest


def _put_blend(plan: Plan, out: Path, manifest: dict[str, Any]) -> None:
    for path, text in _blend_files(plan, out, manifest).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            put_text(path, text)


def _blend_files(plan: Plan, out: Path, manifest: dict[str, Any]) -> dict[Path, str]:
    """What training reads of the corpus; the only files that say where it is."""
    blend = _blend(out, manifest)
    return {out / BLEND: json.dumps(blend, indent=1) + "\n", out / GROUP: _group(plan, blend)}


def _blend(out: Path, manifest: dict[str, Any]) -> dict[str, list[str] | None]:
    """Weights and prefixes of each split, in the form of ``--per-split-data-args-path``."""
    blend: dict[str, list[str] | None] = {TRAIN: None, VALID: None, "test": None}
    for source in manifest["sources"].values():
        for split, volumes in source["datasets"].items():
            tokens = sum(one["tokens"] for one in volumes)
            for one in volumes:
                weight = source["share"] * one["tokens"] / tokens
                prefix = str(out.resolve() / one["name"])
                blend[split] = [*(blend[split] or []), f"{weight:.9g}", prefix]
    return blend


def _warnings(
    plan: Plan, counted: dict[str, int], merged: dict[str, dict[str, list[Merged]]]
) -> list[str]:
    total = sum(counted.values())
    found = []
    for source in plan.recipe.sources:
        share = 100 * counted[source.name] / total
        expected = source.expected_share
        if expected and abs(share / expected - 1) > plan.recipe.share_tolerance:
            found.append(
                f"source {source.name}: {share:.3g} % of the tokens, {expected:g} % expected"
            )
        if plan.recipe.validation and not merged[source.name][VALID]:
            found.append(f"source {source.name}: too small for a document of validation")
    return found


def _group(plan: Plan, blend: dict[str, list[str] | None]) -> str:
    """The data group of a configuration: copy it to ``configs/data/NAME.yaml``."""
    words = iter(plan.tokenizer.megatron_args)
    values: dict[str, Any] = {
        key.removeprefix("--").replace("-", "_"): value
        for key, value in zip(words, words, strict=True)
    }
    if "vocab_size" in values:
        values["vocab_size"] = int(values["vocab_size"])
    values["train_data_path"] = blend[TRAIN]
    if blend[VALID]:
        values["valid_data_path"] = blend[VALID]
    values["dataloader_type"] = "single"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def verify_corpus(out: Path) -> dict[str, Any]:
    """Read every byte of a complete corpus again, also as Megatron does.

    Returns:
        The manifest.

    Raises:
        DataError: it is not complete, a file has changed, a dataset cannot be read, or the blend
            is not of this folder.
    """
    from uar_megatron.data.readback import read_back

    plan, manifest = read_plan(out), read_manifest(out)
    if manifest is None:
        raise DataError(f"{out}: is not complete\n  remedy:  run `uar corpus merge` (or `build`)")
    for source in manifest["sources"].values():
        for one in (one for volumes in source["datasets"].values() for one in volumes):
            for suffix, digest in one["files"].items():
                path = out / f"{one['name']}{suffix}"
                if not path.is_file() or sha256_of(path) != digest:
                    state = "has changed" if path.is_file() else "is missing"
                    raise DataError(f"{path}: {state} since the corpus was built")
            check_dataset(out / one["name"], plan.tokenizer.vocab_size)
            eod = plan.tokenizer.eod if plan.recipe.append_eod else None
            read_back(
                out / one["name"], one["documents"], one["tokens"], plan.tokenizer.vocab_size, eod
            )
    for path, text in _blend_files(plan, out, manifest).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{path}: is not the blend of the datasets in {out.resolve()} (moved, or edited?)\n"
                "  remedy:  `uar corpus merge` writes it again for where they are"
            )
    return manifest
