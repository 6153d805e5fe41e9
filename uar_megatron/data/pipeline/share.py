"""A node's share of a corpus: its shards to parts, in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path

from uar_megatron.data.files import put_text
from uar_megatron.data.pipeline.part import (
    DiskFullError,
    Part,
    build_part,
    open_encoder,
    part_prefix,
    read_part,
)
from uar_megatron.data.pipeline.plan import MANIFEST, Plan, Shard, assign, find_shards
from uar_megatron.data.progress import progress_bar
from uar_megatron.data.tokenizers import Encoder
from uar_megatron.data.workers import worker_pool
from uar_megatron.errors import DataError


def tokenize_share(
    plan: Plan, out: Path, node: int = 0, nodes: int = 1, workers: int = 1, progress: bool = True
) -> int:
    """Tokenize the shards that fall to a node; those finished before are left alone.

    What is written does not depend on ``nodes`` and ``workers``.

    Args:
        plan: of the corpus.
        out: its folder, which every node sees.
        node, nodes: this one, from 0, and how many there are.
        workers: processes; 1 works in this one.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        How many shards were tokenized now.

    Raises:
        DataError: a shard failed (all others were done), the disk is full, or there are new shards.
    """
    if not 0 <= node < nodes:
        raise DataError(f"node: {node} of {nodes} nodes\n  allowed: 0 … {nodes - 1}")
    if workers < 1:
        raise DataError(f"workers: {workers} is not a number of processes\n  allowed: 1 or more")
    if (out / MANIFEST).exists():  # complete; the parts may be gone
        return 0
    share = [plan.shards[i] for i in assign([shard.bytes for shard in plan.shards], nodes)[node]]
    todo = [shard for shard in share if read_part(out, shard) is None]
    if todo:
        _refuse_new_shards(plan)
    failures: list[str] = []
    with progress_bar(progress) as bar:
        total = sum(shard.bytes for shard in todo)
        task = bar.add_task("tokenizing", total=total, documents=0, tokens=0)
        documents = tokens = 0
        for shard, result in _results(plan, out, todo, workers):
            if isinstance(result, DataError):
                failures.append(str(result))
                _note_failure(out, shard, result)
                if isinstance(result, DiskFullError):
                    break
            else:
                documents, tokens = documents + result.documents, tokens + result.tokens
            bar.update(task, advance=shard.bytes, documents=documents, tokens=tokens)
    if failures:
        kept = sum(read_part(out, shard) is not None for shard in share)
        raise DataError(
            f"{len(failures)} of {len(share)} shards failed; {kept} are finished and kept\n"
            + "\n".join(failures)
            + "\n  remedy:  mend them and give the same command again, or leave them out of the "
            "merge with --leave-out"
        )
    return len(todo)


def _results(
    plan: Plan, out: Path, todo: Sequence[Shard], workers: int
) -> Iterator[tuple[Shard, Part | DataError]]:
    """Each shard with its part or what went wrong, as they come."""
    if not todo:
        return
    if workers == 1:
        encoder = open_encoder(plan, out)
        for shard in todo:
            yield shard, _attempt(plan, out, shard, encoder)
        return
    with worker_pool(min(workers, len(todo)), _start_worker, plan, out) as pool:
        # The largest first: the last to end is then a small one.
        order = sorted(todo, key=lambda shard: -shard.bytes)
        futures = {pool.submit(_build_in_worker, shard): shard for shard in order}
        for future in as_completed(futures):
            yield futures[future], future.result()


_worker: tuple[Plan, Path, Encoder]


def _start_worker(plan: Plan, out: Path) -> None:
    global _worker
    _worker = plan, out, open_encoder(plan, out)


def _build_in_worker(shard: Shard) -> Part | DataError:
    plan, out, encoder = _worker
    return _attempt(plan, out, shard, encoder)


def _attempt(plan: Plan, out: Path, shard: Shard, encoder: Encoder) -> Part | DataError:
    try:
        return build_part(plan, out, shard, encoder)
    except DataError as error:
        return error


def _note_failure(out: Path, shard: Shard, error: DataError) -> None:
    """Leave word for the merge, which may be on another node; not on a full disk, of course."""
    path = Path(f"{part_prefix(out, shard)}.error")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_text(path, f"{error}\n")
    except OSError:
        path.unlink(missing_ok=True)


def _refuse_new_shards(plan: Plan) -> None:
    known = {shard.path for shard in plan.shards}
    new = [shard.path for shard in find_shards(plan.recipe) if shard.path not in known]
    if new:
        raise DataError(
            f"{new[0]}: was not there when the corpus was begun ({len(new)} such files)\n"
            "  remedy:  move it away, or begin in a new folder"
        )
