"""What rank 0 does where a batch goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from uar_megatron.errors import UARError
from uar_megatron.evaluation.ranks import Ranks

ROWS: list[Any] = [[1]]


def ranks(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *, size: int) -> Any:
    """Rank 0 of some, of which the forward ends in this error; and all that it tells the others."""
    found: Any = object.__new__(Ranks)
    found.is_alone, found.data_ranks, found._is_open = size == 1, size, True
    found.told = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)

    def execute(*request: Any) -> dict[str, Any]:
        if error is not None:
            raise error
        return {}

    def tell(request: Any) -> Any:
        found.told.append(request)
        return request

    found._execute, found._tell = execute, tell
    return found


def test_nothing_is_told_to_ranks_that_wait_for_a_batchs_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ranks(monkeypatch, None, size=2)

    def collect(part: Any) -> Any:
        raise RuntimeError("Connection closed by peer\nat …")

    found._collect = collect
    with pytest.raises(UARError, match=r"one has left.*Connection closed by peer"):
        found.run("last", ROWS, width=1)
    interrupted = ranks(monkeypatch, KeyboardInterrupt(), size=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run("last", ROWS, width=1)
    for closed in (found, interrupted):
        closed.close()
        assert len(closed.told) == 1


def test_others_are_let_go_after_a_failure_that_all_know_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ranks(monkeypatch, ValueError(), size=2)
    found._collect = lambda part: [part, {}]
    with pytest.raises(UARError, match=r"rank 0: ValueError$"):
        found.run("last", ROWS, width=1)
    found.close()
    assert found.told[1:] == [None]


def test_a_lack_of_memory_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UARError, match=r"OutOfMemoryError[^$]*--batch-size"):
        ranks(monkeypatch, torch.OutOfMemoryError("tried"), size=1).run("last", ROWS, width=1)
    with pytest.raises(ZeroDivisionError):  # a fault of the model stays what it is
        ranks(monkeypatch, ZeroDivisionError(), size=1).run("last", ROWS, width=1)
