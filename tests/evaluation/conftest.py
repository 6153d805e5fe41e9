"""A tiny run, and its model loaded once for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluated_run import forgotten_afterwards

from uar_megatron.evaluation.model import CheckpointModel


@pytest.fixture(scope="session")
def run(text_run: Path) -> Path:
    """The folder of the run."""
    return text_run


@pytest.fixture(scope="module")
def model(run: Path, model_parallel: None) -> Iterator[CheckpointModel]:
    """Its newest checkpoint."""
    with forgotten_afterwards(), CheckpointModel(run) as loaded:
        yield loaded
