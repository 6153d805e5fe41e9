"""The recipe of a corpus: which shards of which sources, which tokenizer, what is held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator
from yaml import YAMLError

from uar_megatron.config import Section, parse_section
from uar_megatron.errors import ConfigError
from uar_megatron.experiment import read_yaml

_Share = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]


class Source(Section):
    """A source of the blend: it becomes one dataset of each split."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Names its files."""
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders (searched recursively) and glob patterns, relative to ``root``."""
    tokens: Literal["uint16", "uint32"] | None = None
    """The files are arrays of token ids of this type with an end-of-document id after every
    document (``.npy`` of AI2's Dolma tools, without a header), not text. A file in which no id
    ends a document is refused: its type or its tokenizer is another."""
    json_field: str = "text"
    """Of each JSON line: the text."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits each text file into documents, an end of line in it as LF or as CR LF; without it a
    file is one."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """In the blend; without it the counted tokens are. All sources have one, or none."""
    expected_share: _Share | None = None
    """Percent of the corpus's tokens; another count gives a warning."""


class Validation(Section):
    """Whole documents that are held out, chosen by a hash of their content."""

    tokens: Annotated[int, Field(gt=0)] | None = None
    """About this many in all, from every source in proportion to its share of the blend: without
    weights in expectation, for one threshold over all sources keeps copies together. With weights
    each source has a threshold of its own, so copies stay together within a source only."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """About this part of the documents of every source."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.tokens is None) == (self.fraction is None):
            raise ValueError("tokens|one of tokens and fraction says how much|tokens, or fraction")
        return self


class Recipe(Section):
    """Everything a corpus depends on besides the shards themselves."""

    tokenizer: str
    """``hf:PATH``, ``gigatoken:PATH``, ``tiktoken:PATH``, ``sentencepiece:PATH`` or ``bytes``."""
    sources: Annotated[list[Source], Field(min_length=1)]
    root: str = "."
    """Where the sources' paths begin."""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document id."""
    seed: int = 0
    """Another seed holds out other documents."""
    validation: Validation | None = None
    """Without it every document is for training."""
    file_tokens: Annotated[int, Field(gt=0)] | None = None
    """A source with more tokens gets several datasets of at most this many; a shard is not cut."""
    share_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far a counted share may be from the expected one, as a part of that."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [source.name.casefold() for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources|{', '.join(twice)} occurs twice|a name for each source")
        if any(source.weight for source in self.sources) and not all(
            source.weight for source in self.sources
        ):
            raise ValueError("sources|only some have a weight|a weight for each source, or none")
        if not math.isfinite(sum(source.weight or 0 for source in self.sources)):
            raise ValueError("sources|the weights are too large to add|smaller weights")
        return self


def of_parts(recipe: Recipe) -> dict[str, Any]:
    """What the tokenized parts depend on; the merge alone follows the rest."""
    values = recipe.model_dump(include={"tokenizer", "root", "append_eod", "seed"})
    only_merged = {"weight", "expected_share"}
    values["sources"] = [source.model_dump(exclude=only_merged) for source in recipe.sources]
    values["validation"] = recipe.validation is not None  # whether parts have keys
    return values


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``key=value`` with dotted keys.

    Raises:
        ConfigError: the file is missing or broken, a key unknown, a value not allowed.
    """
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(override, "not an override", allowed="key=value, e.g. root=/data")
    try:
        merged = OmegaConf.merge(read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(str(path), str(error).splitlines()[0]) from error
    return parse_section(Recipe, plain, "recipe")
