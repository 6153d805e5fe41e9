"""The CPU layer: refuses a GPU machine, and what it replaces behaves."""

from __future__ import annotations

import pytest
import torch

from uar_megatron.errors import UnsupportedEnvironmentError
from uar_megatron.mcore import cpu

pytestmark = pytest.mark.skipif(not cpu.is_enabled(), reason="this machine has a CUDA device")


def test_refuses_where_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_enabled", False)
    with pytest.raises(UnsupportedEnvironmentError, match="CUDA works on this machine"):
        cpu.enable()
    assert not cpu.is_enabled()


def test_refuses_after_megatron_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.tensor_parallel  # noqa: F401

    monkeypatch.setattr(cpu, "_enabled", False)
    with pytest.raises(UnsupportedEnvironmentError, match="before megatron"):
        cpu.enable()


def test_enabling_twice_changes_nothing() -> None:
    before = torch.zeros
    cpu.enable()
    assert torch.zeros is before


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0), "cpu"])
def test_cuda_devices_are_the_cpu(device: object) -> None:
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device=device, dtype=torch.int8).dtype == torch.int8
    assert torch.ones(2).new_zeros(3, device=device).device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda(0).weight.cuda().device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_cuda_is_still_said_to_be_missing() -> None:
    assert not torch.cuda.is_available()


def test_device_generator_is_the_cpus() -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_iterating_a_data_loader_draws_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    iter(torch.utils.data.DataLoader([1, 2, 3]))
    assert torch.equal(torch.rand(1), expected)
