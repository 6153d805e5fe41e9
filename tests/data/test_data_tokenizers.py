"""Data preparation gives the ids that Megatron's own tokenizers give; what it refuses and why."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import string
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tokenizers.text.libraries.bytelevel_tokenizer import ByteLevelTokenizer
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import add_megatron_arguments
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from uar_megatron.data.tokenizers import BytesEncoder, Encoder, build_encoder
from uar_megatron.errors import DataError

Tiktoken = Callable[[Iterable[str]], Path]
SPECIALS = {"hf": "<|endoftext|>", "tiktoken": "</s>", "sentencepiece": "<tool>"}
PIECES = [
    *(*SPECIALS.values(), "<unk>", "<s>", "<SPECIAL_12>", "<SPECIAL_2>", "<|tool|>", "HelloWorld"),
    *("  ", "\n\n", "\t", "\r\n", "\0", "☯", "▁", " the dog", "été", "😀", "1234"),
]


def from_megatron(encoder: Encoder) -> Any:
    """The tokenizer that training builds from the arguments that data preparation prints."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    args = parser.parse_args(list(encoder.megatron_args))
    args.rank = 0
    return build_tokenizer(args)


def assert_agree(encoder: Encoder, megatron: Any, text: str) -> None:
    ids = list(encoder.encode(text))
    assert ids == megatron.tokenize(text) == list(encoder.encode_many(["a", text])[1])
    assert all(0 <= i < encoder.vocab_size for i in ids)
    assert (encoder.vocab_size, encoder.eod) == (megatron.vocab_size, megatron.eod)


def train_sentencepiece(prefix: Path, **options: Any) -> Path:
    texts = ["the quick brown fox jumps over the lazy dog", "Zwölf  Boxkämpfer\tjagen"] * 20
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module", params=SPECIALS)
def pair(
    request: pytest.FixtureRequest,
    bpe: Path,
    tiktoken: Tiktoken,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Encoder, Any]:
    """One of our encoders, and Megatron's tokenizer for the same file."""
    location = bpe
    if request.param == "tiktoken":
        location = tiktoken([" t", "he", " the", "dog", "é", "\n\n", "  ", "12", "oW", "é😀"])
    elif request.param == "sentencepiece":
        folder = tmp_path_factory.mktemp("sentencepiece")
        options = {"user_defined_symbols": ["<tool>"], "remove_extra_whitespaces": False}
        location = train_sentencepiece(folder / "sp", **options)
    encoder = build_encoder(f"{request.param}:{location}")
    return encoder, from_megatron(encoder)


@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=9), max_size=9).map("".join))
@settings(max_examples=150, deadline=None)
def test_ids_size_and_end_equal_megatrons(pair: tuple[Encoder, Any], text: str) -> None:
    assert_agree(*pair, text)


def test_a_special_token_in_the_text_becomes_that_token(pair: tuple[Encoder, Any]) -> None:
    encoder, _ = pair
    kind = encoder.name.partition(":")[0]
    (special,) = set(encoder.encode(f"fox{SPECIALS[kind]}")) - set(encoder.encode("fox"))
    assert (special == encoder.eod) == (kind != "sentencepiece")
    assert encoder.path is not None
    path = encoder.path / "tokenizer.json" if kind == "hf" else encoder.path
    assert encoder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"eos_token": "<|endoftext|>", "bos_token": "<s>"}, "<s> $A <|endoftext|>"),
        ({"sep_token": "<s>", "cls_token": "<|cls|>"}, "$A"),
        ({"eos_token": "<|new|>", "additional_special_tokens": ["<|tool|>"]}, "$A"),
    ],
)
def test_other_hf_tokenizers_equal_megatrons(
    config: dict[str, Any], pattern: str, bpe: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "<|endoftext|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ends)
    tokenizer.enable_truncation(3)  # neither Megatron nor we follow it
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = build_encoder(f"hf:{tmp_path}")
    text = "".join([*PIECES, "<|new|>"])
    assert_agree(encoder, from_megatron(encoder), text)
    assert len(encoder.encode(text)) > 50


def test_a_lone_tokenizer_file_says_what_megatron_needs(bpe: Path, tmp_path: Path) -> None:
    whole = build_encoder(f"hf:{bpe}")
    named = build_encoder(f"hf:{bpe / 'tokenizer.json'}")
    assert (named.megatron_args, named.note) == (whole.megatron_args, "")
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    lone = build_encoder(f"hf:{tmp_path / 'tokenizer.json'}")
    assert (lone.eod, lone.vocab_size, lone.sha256) == (whole.eod, whole.vocab_size, whole.sha256)
    assert "'<|endoftext|>' was used" in lone.note
    advice = lone.note[lone.note.index("{") : lone.note.rindex("}") + 1]
    (tmp_path / "tokenizer_config.json").write_text(advice)
    assert_agree(lone, from_megatron(build_encoder(f"hf:{tmp_path}")), "".join(PIECES))


def test_a_tiktoken_vocabulary_is_cut_where_megatron_cuts_it(tiktoken: Tiktoken) -> None:
    words = [f" {''.join(word)}" for word in product(string.ascii_lowercase, repeat=4)][: 2**17]
    encoder = build_encoder(f"tiktoken:{tiktoken(words)}")
    last = 2**17 - 1000 - 256 - 1
    assert encoder.encode(words[last]) == [2**17 - 1]
    assert encoder.encode(words[last + 1]) == [1000 + byte for byte in words[last + 1].encode()]
    assert_agree(encoder, from_megatron(encoder), "".join(words[last - 5 : last + 5]))


@given(text=st.text())
def test_bytes_are_megatrons_bytes(text: str) -> None:
    encoder = build_encoder("bytes")
    assert list(encoder.encode(text)) == ByteLevelTokenizer().text_to_ids(text)
    assert encoder.eod not in encoder.encode(text)


def test_training_on_bytes_gets_the_same_size_and_end() -> None:
    megatron = from_megatron(build_encoder("bytes"))
    assert (megatron.vocab_size, megatron.eod) == (257, 256)
    assert (BytesEncoder.vocab_size, BytesEncoder.eod) == (257, 256)


@pytest.mark.parametrize("spec", ["gpt2", "", "hf", "hf:", "bytes:here", "spm:a.model", ":a"])
def test_a_spec_that_is_not_understood(spec: str) -> None:
    with pytest.raises(DataError, match="not understood\n  allowed: hf:PATH, tiktoken:PATH"):
        build_encoder(spec)


@pytest.mark.parametrize("kind", SPECIALS)
def test_files_that_are_missing_or_something_else(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*no\.json"):
        build_encoder(f"{kind}:{tmp_path / 'no.json'}")
    for content in (b"", b"[]", b"{}", b"\xff"):
        (tmp_path / "some.json").write_bytes(content)
        with pytest.raises(DataError, match=r"some\.json"):
            build_encoder(f"{kind}:{tmp_path / 'some.json'}")
    with pytest.raises(DataError, match=str(tmp_path)):
        build_encoder(f"{kind}:{tmp_path}")


def test_a_tokenizer_without_an_end_of_document(tmp_path: Path) -> None:
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-document token\n  remedy:  name one"):
        build_encoder(f"hf:{tmp_path / 'tokenizer.json'}")
    with pytest.raises(DataError, match="has no eos piece"):
        build_encoder(f"sentencepiece:{train_sentencepiece(tmp_path / 'sp', eos_id=-1)}")


@pytest.mark.parametrize(
    "defect",
    [
        lambda e: [*e, {**e[0], "rank": 256}],  # a byte twice; in the next, another token
        lambda e: [*e, *({**e[0], "token_bytes": "YWI=", "rank": i} for i in (256, 257))],
        lambda e: [*e, {**e[0], "token_bytes": "YWI=", "rank": 257}],  # ranks with a gap
        lambda e: [{**e[1], "rank": 0}, {**e[0], "rank": 1}, *e[2:]],  # bytes out of order
        lambda e: e[:255],
        lambda e: [{"token_bytes": x["token_bytes"], "token_str": ""} for x in e],
        lambda e: [*e, {**e[0], "token_bytes": "a", "rank": 256}],  # not base64
        lambda e: {x["token_bytes"]: x["rank"] for x in e},
    ],
)
def test_tiktoken_files_that_megatron_would_refuse(
    defect: Callable[[Any], Any], tiktoken: Tiktoken
) -> None:
    path = tiktoken([])
    assert build_encoder(f"tiktoken:{path}").vocab_size == 1256
    path.write_text(json.dumps(defect(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"vocabulary\.json: not a tiktoken vocabulary"):
        build_encoder(f"tiktoken:{path}")
    with pytest.raises(DataError, match=r"from \.json files only"):
        build_encoder(f"tiktoken:{path.rename(path.with_suffix('.tiktoken'))}")


@pytest.fixture(scope="module")
def fast(bpe: Path) -> tuple[Encoder, Encoder]:
    """The same tokenizer through both libraries."""
    pytest.importorskip("gigatoken", reason="pip install 'uar-megatron[fast]'")
    return build_encoder(f"hf:{bpe}"), build_encoder(f"gigatoken:{bpe}")


@given(texts=st.lists(st.lists(st.sampled_from(PIECES) | st.text()).map("".join)))
@settings(deadline=None)
def test_gigatoken_gives_the_ids_of_tokenizers(
    fast: tuple[Encoder, Encoder], texts: list[str]
) -> None:
    plain, quick = fast
    assert [list(ids) for ids in quick.encode_many(texts)] == plain.encode_many(texts)


def test_gigatoken_is_the_same_tokenizer_under_another_name(fast: tuple[Encoder, Encoder]) -> None:
    plain, quick = fast
    assert (plain.name, quick.name) == ("hf:tokenizer", "gigatoken:tokenizer")
    for field in ("vocab_size", "eod", "sha256", "megatron_args", "path"):
        assert getattr(plain, field) == getattr(quick, field)


def test_a_tokenizer_that_gigatoken_encodes_otherwise_is_refused(
    fast: tuple[Encoder, Encoder], bpe: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "ends.json"))
    with pytest.raises(DataError, match=r"gigatoken .*\n  remedy:  take hf:PATH"):
        build_encoder(f"gigatoken:{tmp_path / 'ends.json'}")


def test_gigatoken_asked_for_by_name_is_never_replaced(
    bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(
        DataError, match=r"not installed\n  remedy:  pip install 'uar-megatron\[fast"
    ):
        build_encoder(f"gigatoken:{bpe}")


def test_gigatoken_is_watched_while_it_works(
    fast: tuple[Encoder, Encoder], bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder(f"gigatoken:{bpe}")
    engine = encoder._engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_tokenizer", SimpleNamespace(encode=lambda text: np.array([1])))
    with pytest.raises(DataError, match=r"other ids than tokenizers, for one for 'the fox'"):
        encoder.encode_many(["the fox", "dog"])
