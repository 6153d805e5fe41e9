"""The CPU layer comes first; one process group serves the whole session."""

from __future__ import annotations

import os

# Triton reads it when it is imported: kernels run in its interpreter, on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from uar_megatron.mcore import cpu

if not torch.cuda.is_available():
    cpu.enable()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def model_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Real gloo process groups of one rank, as Megatron sets them up.

    Shared by the session: every group costs two threads that gloo never gives back.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("store") / "store"
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=timedelta(minutes=1)
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run on text, with its tokenizer beside it."""
    from evaluated_run import shared_run

    return shared_run(tmp_path_factory)
