"""A tiny run on text to be evaluated: its tokenizer, its data, its checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from jobs import TESTS, train_arguments, warm_torchrun

WINDOW = 48
LENGTHS = (48, 5, 17, 1, 48)
CONFIG = (
    "mock_data=false",
    "split=100,0,0",
    "tokenizer_type=HuggingFaceTokenizer",
    "train_iters=8",
    "eval_iters=0",
    "num_layers=4",
    'moe_layer_freq="[0]+[1]*3"',
    f"seq_length={WINDOW}",
    f"max_position_embeddings={WINDOW}",
    "uar.policy=uar",
    "uar.budget.alpha=1.5",
    "uar.budget.k_max=4",
    "uar.clb.enabled=true",
    "tensorboard_dir=null",
)


def train(folder: Path, *overrides: str, has_bos: bool = False) -> Path:
    """Train on one rank and return the run; :func:`recorded` is what its model says."""
    texts = ["the text of a test", "another text"]
    tokenizer = build_tokenizer(folder / "tokenizer", texts, has_bos=has_bos)
    rng = np.random.default_rng(0)
    write_data(folder / "data", [rng.integers(0, 256, 150) for _ in range(40)])
    sequences = [rng.integers(0, 256, n).tolist() for n in LENGTHS]
    torch.save({"sequences": sequences}, folder / "record.pt")
    os.environ["RECORD"] = str(folder / "record.pt")
    keys = (*CONFIG, f"tokenizer_model={tokenizer}", f"data_path=[{folder / 'data'}]", *overrides)
    arguments = train_arguments(1, folder / "run", *keys)[2:]
    job = warm_torchrun(1, str(TESTS / "forward_after_training.py"), *arguments)
    del os.environ["RECORD"]
    assert job.returncode == 0, job.stderr[-6000:]
    return folder / "run"


def recorded(run: Path) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Sequences, and what the training's model said of each."""
    record = torch.load(run.parent / "record.pt")
    return record["sequences"], record["found"]


def build_tokenizer(
    folder: Path, texts: list[str], size: int = 300, *, has_bos: bool = False
) -> Path:
    """A small byte-level BPE in HuggingFace's form; ``<|endoftext|>`` is its last token.

    With a BOS, ``<s>`` comes after it, and before every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, min_frequency=1)
    tokenizer.train_from_iterator(texts, trainer)
    for i in range(size - 1 - tokenizer.get_vocab_size()):
        tokenizer.add_tokens([f"word{i}"])
    special = {"eos_token": "<|endoftext|>"}
    if has_bos:
        special["bos_token"] = "<s>"
        tokenizer.add_special_tokens(list(special.values()))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", size)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return folder


def write_data(prefix: Path, documents: list[np.ndarray]) -> None:
    """Megatron's .bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def shared_run(factory: pytest.TempPathFactory) -> Path:
    """The run of :func:`train`, once for all processes that share the tests."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "evaluated"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "trained").exists():
            folder.mkdir(exist_ok=True)
            train(folder)
            (folder / "trained").touch()
    return folder / "run"


@contextlib.contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Take away what a loaded model leaves in Megatron's globals; other tests look at them."""
    try:
        yield
    finally:
        from uar_megatron.evaluation.load import forget_globals

        forget_globals()


def padded(rows: list[list[int]], is_left: bool = False) -> torch.Tensor:
    """Rows as a tensor, zeros around them."""
    width = max(map(len, rows))
    tokens_BS = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens_BS[b, width - len(row) if is_left else 0 :][: len(row)] = torch.tensor(row)
    return tokens_BS


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Requests of lm-eval, all of a task ``t``."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]
