"""Train a small byte-level BPE and save it in the form Megatron's HuggingFaceTokenizer loads."""

import json
from collections.abc import Iterable
from pathlib import Path

from uar_megatron.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
_SMALLEST = 257  # the bytes and the end of document


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Path:
    """Train a byte-level BPE and write it to a new or empty folder.

    Any text can be encoded (there is no unknown token) and is decoded to itself. Id 0 is
    ``<|endoftext|>``, the end-of-document token.

    Args:
        texts: the training texts; nothing else may reach the vocabulary.
        vocab_size: number of ids, the end-of-document token included. Texts too small for it
            give a smaller vocabulary.
        folder: gets ``tokenizer.json`` and ``tokenizer_config.json``.

    Returns:
        The folder, for ``hf:FOLDER`` and ``--tokenizer-model FOLDER``.

    Raises:
        DataError: the vocabulary is too small to hold every byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise DataError(f"vocab_size: {vocab_size} is too small\n  allowed: {_SMALLEST} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder
