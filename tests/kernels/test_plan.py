"""The plan against its definition written out in Python, and against Megatron's own order."""

import subprocess
import sys
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils

from uar_kernels import backend, permutation
from uar_kernels.plan import deepep_indices, minimum_bytes, moved_bytes, op, plan
from uar_kernels.plan.op import Launch, Plan

# (tokens, experts, K_max). There is a second program from 1024 entries on (4096 at 256 experts).
SHAPES = [
    (0, 8, 4),
    (1, 1, 1),
    (37, 6, 3),
    (37, 7, 7),
    (127, 8, 8),
    (128, 8, 8),
    (129, 8, 8),
    (200, 64, 8),
    (37, 160, 16),
    (40, 256, 16),
    (257, 256, 16),
    (5, 300, 2),
    (3, 8, 0),
]
LAUNCHES = [
    Launch(programs=1, part=512, streams=1, scan_rows=1, num_warps=1),
    Launch(programs=2, part=32, streams=8, scan_rows=4, num_warps=4),
    Launch(programs=5, part=64, streams=2, scan_rows=2, num_warps=8),
]


def random_index(tokens: int, experts: int, k_max: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts for each token, in any order; k from 0 to K_max, with holes."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k_max]
    k = torch.randint(0, k_max + 1, (tokens, 1), generator=generator)
    used = torch.rand(tokens, k_max, generator=generator).argsort(dim=1) < k
    return torch.where(used, index, -1)


def written_out(index_TK: torch.Tensor, experts: int, ep_size: int) -> Plan:
    rows = torch.full(index_TK.shape, -1, dtype=torch.int32)
    counts = [0] * experts
    row = 0
    for expert in range(experts):
        for token, slots in enumerate(index_TK.tolist()):
            for slot, chosen in enumerate(slots):
                if chosen == expert:
                    rows[token, slot] = row
                    row += 1
                    counts[expert] += 1
    local = experts // ep_size
    splits = [sum(counts[rank * local : (rank + 1) * local]) for rank in range(ep_size)]
    return Plan(rows, torch.tensor(counts), torch.tensor(splits))


def assert_same(got: Plan, expected: Plan) -> None:
    for name in ("row_id_TK", "tokens_per_expert_E", "splits"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(-12345) if result.dtype in (torch.int32, torch.int64) else result

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("tokens", "experts", "k_max"), SHAPES)
def test_rows_follow_experts_then_tokens(tokens: int, experts: int, k_max: int) -> None:
    index_TK = random_index(tokens, experts, k_max)
    expected = written_out(index_TK, experts, 1)
    assert_same(plan(index_TK, experts, backend="torch"), expected)
    assert_same(plan(index_TK, experts, backend="triton"), expected)


@pytest.mark.parametrize("name", ["one expert", "last expert", "nothing", "all experts", "two"])
def test_uneven_loads(name: str) -> None:
    tokens, experts = 70, 8
    index_TK = torch.full((tokens, experts), -1)
    if name == "one expert":
        index_TK[:, 2] = 0
    elif name == "last expert":
        index_TK[:, 0] = 7
    elif name == "all experts":
        index_TK[:] = torch.arange(experts - 1, -1, -1)
    elif name == "two":
        index_TK[::2, 0] = 5
        index_TK[1::3, 1] = 2
    assert_same(plan(index_TK, experts, 2, "triton"), written_out(index_TK, experts, 2))
    assert_same(plan(index_TK.int(), experts, 2, "triton"), written_out(index_TK, experts, 2))
    assert_same(plan(index_TK, experts, 2, "torch"), written_out(index_TK, experts, 2))


@given(
    hnp.arrays(
        "int64", st.tuples(st.integers(0, 9), st.integers(0, 5)), elements=st.integers(-2, 9)
    )
)
@settings(max_examples=15, deadline=None)
def test_any_ids(index: object) -> None:
    """Ids out of range are unused slots; a token that names an expert twice has two rows there."""
    index_TK = torch.as_tensor(index)
    expected = written_out(index_TK, 6, 3)
    assert_same(plan(index_TK, 6, 3, "torch"), expected)
    assert_same(op._launch(index_TK, 6, 3, LAUNCHES[0]._replace(part=64)), expected)


@pytest.mark.parametrize("experts", [8, 256])
def test_bit_equal_for_all_block_sizes_and_runs(experts: int) -> None:
    index_TK = random_index(61, experts, 8, seed=1)
    expected = plan(index_TK, experts, 4, "torch")
    for launch in [*LAUNCHES, LAUNCHES[1]]:
        assert launch.programs * launch.part * launch.streams >= index_TK.numel()
        assert_same(op._launch(index_TK, experts, 4, launch), expected)


@pytest.mark.parametrize("ep_size", [1, 2, 16])
def test_splits_of_each_rank(ep_size: int) -> None:
    """Also where there are more ranks than programs."""
    index_TK = random_index(40, 16, 4, seed=2)
    expected = written_out(index_TK, 16, ep_size)
    assert_same(plan(index_TK, 16, ep_size, "triton"), expected)
    assert_same(plan(index_TK, 16, ep_size, "torch"), expected)
    assert_same(op._launch(index_TK, 16, ep_size, LAUNCHES[1]), expected)


def test_non_contiguous() -> None:
    index_TK = random_index(37, 8, 6, seed=3).T.contiguous().T[:, ::2]
    assert not index_TK.is_contiguous()
    assert_same(plan(index_TK, 8, backend="triton"), written_out(index_TK, 8, 1))


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_order_is_megatrons(backend_name: str) -> None:
    tokens, experts, k_max = 61, 16, 5
    index_TK = random_index(tokens, experts, k_max, seed=4)
    map_TE = torch.zeros(tokens, experts + 1, dtype=torch.bool)
    map_TE = map_TE.scatter(1, index_TK.where(index_TK >= 0, experts), True)[:, :experts]
    used = int(map_TE.sum())
    token_R = moe_utils.permute(torch.zeros(tokens, 1), map_TE, num_out_tokens=used)[2]
    got = plan(index_TK, experts, backend=backend_name)
    assert torch.equal(got.tokens_per_expert_E, map_TE.sum(dim=0))
    for token, slots in enumerate(got.row_id_TK.tolist()):
        rows = [row for row in slots if row >= 0]
        assert sorted(rows) == (token_R == token).nonzero().flatten().tolist()


def test_launches_cover_all_entries() -> None:
    for experts, entries in [(8, 10**6), (64, 10**7), (256, 262144), (512, 10**6), (7, 1), (7, 0)]:
        launch = op.heuristics(entries, experts)
        assert launch.part % 32 == 0
        assert launch.programs > 0
        assert launch.programs * launch.streams * launch.part >= entries


def test_bad_input() -> None:
    index_TK = random_index(3, 8, 2)
    with pytest.raises(ValueError, match="int32 or int64"):
        plan(index_TK.float(), 8)
    with pytest.raises(ValueError, match="tokens, K_max"):
        plan(index_TK.flatten(), 8)
    with pytest.raises(ValueError, match="ep_size must divide"):
        plan(index_TK, 8, 3)
    with pytest.raises(ValueError, match="at most 1073741824 slots"):
        plan(index_TK[:1, :1].expand(2**15 + 1, 2**15), 8)


def test_deepep_takes_int64_and_at_most_32() -> None:
    index_TK = random_index(5, 40, 32).int()
    got = deepep_indices(index_TK.T.contiguous().T)
    assert got.dtype == torch.int64
    assert got.is_contiguous()
    assert torch.equal(got, index_TK.long())
    assert deepep_indices(torch.tensor([[-5, 3]])).tolist() == [[-1, 3]]
    with pytest.raises(ValueError, match="at most 32 experts per token; got K_max=33"):
        deepep_indices(random_index(5, 40, 33))


@pytest.mark.parametrize(("experts", "k_mean", "k_max"), [(8, 2, 8), (16, 4, 8), (256, 8, 16)])
@pytest.mark.parametrize("hidden", [1024, 2048])
@pytest.mark.parametrize("tokens", [4096, 8192, 16384, 32768])
def test_bytes_are_few_beside_the_permutation(
    experts: int, k_mean: int, k_max: int, hidden: int, tokens: int
) -> None:
    limit = 0.03 * permutation.minimum_bytes(tokens, tokens * k_mean, hidden, itemsize=2)
    moved = moved_bytes(tokens, k_max, experts, index_itemsize=8)
    assert minimum_bytes(tokens, k_max, experts, index_itemsize=8) < moved <= limit


@pytest.mark.parametrize(
    "case",
    [*op.compilations(), *permutation.op.compilations()],
    ids=lambda case: f"{case['kernel']} {case['case']}",
)
def test_report_compiles_all_arguments(case: dict[str, Any]) -> None:
    names = case["fn"].arg_names
    assert sorted([*case["signature"], *case["constexprs"]]) == sorted(names)
    assert all(names[i] in case["signature"] for i in case["attrs"])


def test_backend_is_taken_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.zeros(1)
    assert backend.resolve("torch", cpu) == "torch"
    assert backend.resolve("auto", cpu) == "torch"
    assert backend.resolve("triton", cpu) == "triton"
    with pytest.raises(ValueError, match="one of auto, triton, torch; got 'cuda'"):
        backend.resolve("cuda", cpu)
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        plan(random_index(3, 8, 2), 8, backend="triton")


def test_works_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
import uar_kernels.permutation
from uar_kernels.plan import plan
assert plan(torch.tensor([[1, 0], [1, -1]]), 2).row_id_TK.tolist() == [[1, 0], [2, -1]]
try:
    plan(torch.tensor([[1]]), 2, backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
