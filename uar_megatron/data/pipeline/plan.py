"""What a corpus is built from, fixed by whoever comes first: every node and resumption follows."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from uar_megatron.data.engines import ENGINES
from uar_megatron.data.files import put_json, put_text
from uar_megatron.data.pipeline.recipe import Recipe, Source, of_parts
from uar_megatron.data.readers import find_files
from uar_megatron.data.tokenizers import Encoder, HuggingFaceEncoder, build_encoder, fingerprint
from uar_megatron.errors import DataError

PLAN, PARTS, MANIFEST = "plan.json", "parts", "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """An input file.

    Attributes:
        index: place in the corpus.
        source: name of its source.
        path: as the recipe leads to it, absolute: the merge may be called from another folder.
        bytes: size when the plan was made; deals the shards to the nodes, and binds nothing: a
            damaged shard may be mended until it is tokenized.
    """

    index: int
    source: str
    path: str
    bytes: int


@dataclass(frozen=True)
class TokenizerFacts:
    """What an ``Encoder`` says of itself, and the recipe's word for it.

    ``location`` is absolute, as the paths of shards are.
    """

    spec: str
    name: str
    location: str | None
    sha256: str | None
    vocab_size: int
    eod: int
    megatron_args: tuple[str, ...]
    note: str

    @property
    def path(self) -> Path | None:
        """The tokenizer's file or folder."""
        return None if self.location is None else Path(self.location)


@dataclass(frozen=True)
class Plan:
    """A recipe, its tokenizer and its shards in the order of the corpus."""

    recipe: Recipe
    tokenizer: TokenizerFacts
    shards: tuple[Shard, ...]

    def source(self, name: str) -> Source:
        """The source of that name."""
        return next(source for source in self.recipe.sources if source.name == name)

    def shards_of(self, source: str) -> list[Shard]:
        """The shards of a source, in their order."""
        return [shard for shard in self.shards if shard.source == source]


def open_plan(recipe: Recipe, out: Path) -> Plan:
    """The plan of the corpus in a folder; made and written there if this is the first call.

    What of the recipe only the merge follows may change until the corpus is complete: the plan
    that is returned has the recipe given here.

    Raises:
        DataError: the folder's corpus has another recipe, tokenizer or other shards, or holds
            something else, or cannot be written; an input is missing; a type of tokens is too
            small for the tokenizer.
    """
    try:
        if not (out / PLAN).exists():
            _begin(recipe, out)
    except OSError as error:
        raise DataError(
            f"{out}: a corpus cannot be begun there: {error}\n"
            "  remedy:  make that possible, or name another folder with -o"
        ) from error
    return follow_plan(recipe, out)  # another node may have been first


def follow_plan(recipe: Recipe, out: Path) -> Plan:
    """The plan that is in a folder, with the recipe given.

    Raises:
        DataError: there is none, or it is of another recipe, tokenizer or other shards.
    """
    plan = read_plan(out)

    def refuse(what: str) -> DataError:
        return DataError(
            f"{out}: was begun with {what}\n"
            "  remedy:  begin in a new folder, or remove this one to build it again"
        )

    look = Recipe.model_dump if (out / MANIFEST).exists() else of_parts
    old, new = look(plan.recipe), look(recipe)
    changed = [key for key in new if new[key] != old[key]]
    if changed:
        raise refuse(f"another recipe; different: {', '.join(changed)}")
    if fingerprint(recipe.tokenizer) != plan.tokenizer.sha256:
        raise refuse(f"another tokenizer than {recipe.tokenizer} is now")
    return replace(plan, recipe=recipe)


def rewrite_plan(plan: Plan, out: Path, sizes: Mapping[str, int]) -> None:
    """Replace the plan in a folder by that of the corpus as it became.

    Args:
        plan: with the recipe that the corpus is merged by.
        out: the folder.
        sizes: of the shards, by path, as they were read.
    """
    shards = tuple(replace(s, bytes=sizes.get(s.path, s.bytes)) for s in plan.shards)
    put_json(out / PLAN, _content(replace(plan, shards=shards)))


def read_plan(out: Path) -> Plan:
    """The plan in a folder.

    Raises:
        DataError: there is none.
    """
    path = out / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["tokenizer"]
        facts["megatron_args"] = tuple(facts["megatron_args"])
        return Plan(
            Recipe.model_validate(content["recipe"]),
            TokenizerFacts(**facts),
            tuple(
                Shard(shard["index"], shard["source"], shard["path"], shard["bytes"])
                for shard in content["shards"]
            ),
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{out}: holds no corpus (no {PLAN})\n"
            "  remedy:  name its folder with -o; `uar corpus build` and `tokenize` begin one"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a corpus plan: {error!r}") from error


def find_shards(recipe: Recipe) -> list[Shard]:
    """The input files of a recipe, in its order.

    Raises:
        DataError: a path leads to no file, or one file is in two sources.
    """
    shards: list[Shard] = []
    owner: dict[Path, str] = {}
    for source in recipe.sources:
        # Not resolved: the manifest names files as the recipe does.
        given = [os.path.join(recipe.root, path) for path in source.paths]  # noqa: PTH118
        for path in find_files(given, ".npy" if source.tokens else None):
            real = path.resolve()
            if real in owner:
                raise DataError(
                    f"{path}: belongs to two sources, {owner[real]} and {source.name}\n"
                    "  remedy:  take it out of one of them"
                )
            owner[real] = source.name
            size = path.stat().st_size
            shards.append(Shard(len(shards), source.name, str(path.absolute()), size))
    return shards


def assign(sizes: Sequence[int], nodes: int) -> list[list[int]]:
    """Which shards each node tokenizes: each exactly once, the bytes even.

    The largest first, each to the node that has least so far (ties to the lower number), so the
    most that a node gets is at most the mean and one shard. Depends on nothing but the arguments.

    Returns:
        Indices into ``sizes`` for each node, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(nodes)]
    loads = [(0, 0, node) for node in range(nodes)]  # bytes, shards, node
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, count, node = heapq.heappop(loads)
        shares[node].append(index)
        heapq.heappush(loads, (load + sizes[index], count + 1, node))
    return [sorted(share) for share in shares]


def _begin(recipe: Recipe, out: Path) -> None:
    _refuse_foreign_files(recipe, out)
    shards = find_shards(recipe)
    encoder = build_encoder(recipe.tokenizer)
    _refuse_narrow_tokens(recipe, encoder)
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    facts = _look_at_tokenizer(recipe.tokenizer, encoder, out / PARTS)
    _write_once(out / PLAN, _content(Plan(recipe, facts, tuple(shards))))


def _refuse_narrow_tokens(recipe: Recipe, encoder: Encoder) -> None:
    """Raise DataError where ids of a source's type cannot be this tokenizer's."""
    for source in recipe.sources:
        if source.tokens and encoder.vocab_size - 1 > np.iinfo(source.tokens).max:
            raise DataError(
                f"source {source.name}: tokens: {source.tokens} does not hold the "
                f"{encoder.vocab_size} ids of {recipe.tokenizer}\n"
                "  remedy:  name the type and the tokenizer that its arrays were written with"
            )


def _look_at_tokenizer(spec: str, encoder: Encoder, folder: Path) -> TokenizerFacts:
    """What the plan says of a tokenizer; keeps what workers need to start without torch."""
    if isinstance(encoder, HuggingFaceEncoder):
        put_text(folder / TOKENIZER, encoder.content)
    return TokenizerFacts(
        spec=spec,
        name=encoder.name,
        location=None if encoder.path is None else str(encoder.path.absolute()),
        sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        megatron_args=encoder.megatron_args,
        note=encoder.note,
    )


def keeps_tokenizer(spec: str) -> bool:
    """Whether ``parts/tokenizer.json`` is what workers load."""
    return spec.partition(":")[0] in ENGINES


def _content(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.model_dump(),
        "tokenizer": asdict(plan.tokenizer),
        "shards": [asdict(shard) for shard in plan.shards],
    }


def _write_once(path: Path, content: dict[str, Any]) -> None:
    """Write the plan unless there is one: of several nodes that begin together, one wins."""
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    put_json(draft, content)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _refuse_foreign_files(recipe: Recipe, out: Path) -> None:
    """Raise DataError where a file that the corpus will have is there already."""
    names = [MANIFEST, "blend.json", "data.yaml"]
    for source in recipe.sources:
        names += [f"{source.name}{split}.idx" for split in ("", "_train", "_valid")]
    for name in names:
        if (out / name).exists():
            raise DataError(
                f"{out / name}: is there already, and not of a corpus in this folder\n"
                "  remedy:  name another folder, or move that away"
            )
