"""Whole documents before tokenization: remove duplicates, split off validation by document."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_MIN_LINE_CHARACTERS = 20  # shorter lines (imports, headings, braces) say nothing about origin
_MIN_LINES = 3
_MAX_OWNERS = 20  # a line found in more documents than that is boilerplate, a licence for one


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and the kind of text it is."""

    text: str
    source: str
    genre: str


@dataclass(frozen=True)
class Deduplicated:
    """The documents kept, in their order, and how many were dropped as exact and near copies."""

    kept: list[Document]
    exact: int
    near: int


def deduplicate(documents: Sequence[Document], near_threshold: float = 0.8) -> Deduplicated:
    """Drop documents equal to another, or mostly contained in one larger document.

    Equal means equal after every run of white space is made one space; the first stays. Mostly
    contained means that at least ``near_threshold`` of the distinct lines of 20 characters or more
    occur in the one larger document; documents with fewer than three such lines are compared
    exactly only.
    """
    by_digest: dict[bytes, int] = {}
    for index, document in enumerate(documents):
        digest = hashlib.sha256(" ".join(document.text.split()).encode("utf-8")).digest()
        by_digest.setdefault(digest, index)
    distinct = sorted(by_digest.values())

    owners_of: defaultdict[str, list[int]] = defaultdict(list)
    near: set[int] = set()
    for index in sorted(distinct, key=lambda i: -len(documents[i].text)):
        stripped = (line.strip() for line in documents[index].text.splitlines())
        lines = {line for line in stripped if len(line) >= _MIN_LINE_CHARACTERS}
        lines = {line for line in lines if len(owners_of.get(line, ())) < _MAX_OWNERS}
        overlap = Counter(owner for line in lines for owner in owners_of.get(line, ()))
        most = max(overlap.values(), default=0)
        if len(lines) >= _MIN_LINES and most >= near_threshold * len(lines):
            near.add(index)
            continue
        for line in lines:
            owners_of[line].append(index)
    kept = [documents[index] for index in distinct if index not in near]
    return Deduplicated(kept, exact=len(documents) - len(distinct), near=len(near))


def split_by_hash(
    documents: Sequence[Document], held_out_bytes: int
) -> tuple[list[Document], list[Document]]:
    """Split whole documents into (train, held out), the same way in every run.

    Documents are taken for the held-out part in the order of their SHA-256 until it has
    ``held_out_bytes`` of UTF-8 text. Those above a quarter of that size stay in training, so that
    a few large documents cannot make up the whole held-out part.
    """
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    digests = [hashlib.sha256(document.text.encode("utf-8")).digest() for document in documents]
    held_out: set[int] = set()
    taken = 0
    for index in sorted(range(len(documents)), key=digests.__getitem__):
        if taken >= held_out_bytes:
            break
        if sizes[index] <= held_out_bytes / 4:
            held_out.add(index)
            taken += sizes[index]
    train = [document for index, document in enumerate(documents) if index not in held_out]
    return train, [documents[index] for index in sorted(held_out)]
