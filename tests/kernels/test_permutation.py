"""Permute and unpermute against Megatron's, and the kernels against the reference."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from uar_kernels.permutation import (
    begin_permute,
    minimum_bytes,
    moved_bytes,
    op,
    permute,
    reference,
    unpermute,
)
from uar_kernels.permutation.op import Launch
from uar_kernels.plan import plan

# (tokens, experts, K_max, hidden, type)
SHAPES = [
    (0, 8, 4, 48, torch.float32),
    (1, 1, 1, 97, torch.float32),
    (37, 6, 3, 48, torch.bfloat16),
    (37, 7, 7, 97, torch.float16),
    (33, 160, 12, 1, torch.float32),
    (20, 256, 16, 64, torch.float32),
    (3, 8, 2, 7168, torch.bfloat16),
]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(
    tokens: int, experts: int, k_max: int, hidden: int, dtype: torch.dtype = torch.float32
) -> Case:
    """Hidden states, probabilities, row ids and counts; k from 0 to K_max, slots with holes."""
    generator = torch.Generator().manual_seed(tokens + experts)
    index_TK = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k_max]
    unused_TK = torch.rand(tokens, k_max, generator=generator) < 0.4
    unused_TK[: tokens // 8] = True
    plan_ = plan(index_TK.masked_fill(unused_TK, -1), experts, backend="torch")
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(dtype)
    probs_TK = torch.rand(tokens, k_max, generator=generator)
    return hidden_TH, probs_TK, plan_.row_id_TK, plan_.tokens_per_expert_E


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_sums_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-equal; the interpreter cuts bf16 off instead of rounding it, so one ulp is allowed."""
    assert got.dtype == expected.dtype
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, expected)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def replacement(*args: object, **kwargs: object) -> torch.Tensor:
        result = new_empty(*args, **kwargs)
        return result.fill_(float("nan") if result.is_floating_point() else -12345)

    monkeypatch.setattr(torch.Tensor, "new_empty", replacement)


@pytest.mark.parametrize(("tokens", "experts", "k_max", "hidden", "dtype"), SHAPES)
def test_kernels_are_the_reference(
    tokens: int, experts: int, k_max: int, hidden: int, dtype: torch.dtype
) -> None:
    """Values and gradients, with exactly as many rows as are in use."""
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(tokens, experts, k_max, hidden, dtype)
    used = int(counts_E.sum())
    generator = torch.Generator().manual_seed(0)
    weight_RH = torch.randn(used, hidden, generator=generator).to(dtype)
    weight_R = torch.randn(used, generator=generator)
    weight_TH = torch.randn(tokens, hidden, generator=generator).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        inputs = [x.clone().requires_grad_() for x in (hidden_TH, probs_TK, weight_RH)]
        rows_RH, probs_R, overflow = permute(*inputs[:2], row_id_TK, counts_E, used, backend)
        sum_TH = unpermute(inputs[2], row_id_TK, backend)
        assert (overflow.dtype, overflow.shape, overflow.item()) == (torch.int32, (), 0)
        outputs = [(rows_RH, weight_RH), (probs_R, weight_R), (sum_TH, weight_TH)]
        torch.autograd.backward(*(list(x) for x in zip(*outputs, strict=True)))
        results.append([rows_RH, probs_R, sum_TH, *(x.grad for x in inputs)])
    names = ("rows", "probs", "sum", "grad of hidden", "grad of probs", "grad of rows")
    for name, expected, got in zip(names, *results, strict=True):
        assert not got.isnan().any(), name
        if name == "grad of hidden":
            # Torch adds this one up in the type and the order of the rows.
            torch.testing.assert_close(got, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
            expected = reference.unpermute(weight_RH, row_id_TK)
        assert_sums_equal(got, expected)


def test_no_slots_at_all() -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(5, 8, 0, 16)
    for backend in ("torch", "triton"):
        rows_RH, probs_R, _ = permute(hidden_TH, probs_TK, row_id_TK, counts_E, 0, backend)
        assert (rows_RH.shape, probs_R.shape) == ((0, 16), (0,))
        assert torch.equal(unpermute(rows_RH, row_id_TK, backend), torch.zeros(5, 16))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_is_megatrons_permute_and_unpermute(backend: str) -> None:
    tokens, experts, k_max, hidden = 41, 16, 5, 48
    generator = torch.Generator().manual_seed(1)
    index_TK = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k_max]
    index_TK = index_TK.masked_fill(torch.rand(tokens, k_max, generator=generator) < 0.4, -1)
    used_TK = index_TK >= 0
    map_TE = torch.zeros(tokens, experts + 1, dtype=torch.bool)
    map_TE = map_TE.scatter(1, index_TK.where(used_TK, experts), True)[:, :experts]
    probs_TE = torch.rand(tokens, experts, generator=generator) * map_TE
    probs_TK = probs_TE.gather(1, index_TK.clamp(min=0))
    hidden_TH = torch.randn(tokens, hidden, generator=generator)
    used = int(map_TE.sum())
    theirs_RH, theirs_R, order, _, _ = moe_utils.permute(
        hidden_TH, map_TE, probs_TE, num_out_tokens=used
    )
    got = plan(index_TK, experts, backend=backend)
    rows_RH, probs_R, _ = permute(
        hidden_TH, probs_TK, got.row_id_TK, got.tokens_per_expert_E, used, backend
    )
    assert torch.equal(rows_RH, theirs_RH)
    assert torch.equal(probs_R, theirs_R)
    sum_TH = unpermute(rows_RH * probs_R[:, None], got.row_id_TK, backend)
    theirs_TH = moe_utils.unpermute(theirs_RH * theirs_R[:, None], order, hidden_TH.shape)
    torch.testing.assert_close(sum_TH, theirs_TH)


@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("missing", [-9, 0, 1, 8, "all"])
def test_writes_the_rows_that_fit_and_nothing_else(missing: int | str, dtype: torch.dtype) -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(11, 8, 4, 97, dtype)
    probs_TK = probs_TK.to(dtype)
    used = int(counts_E.sum())
    capacity = 0 if missing == "all" else used - int(missing)
    memory_RH, memory_R = poisoned(used + 20, 97, dtype=dtype), poisoned(used + 20, dtype=dtype)
    overflow = torch.tensor(-12345, dtype=torch.int32)
    launch = Launch(block_h=64, unroll=3, num_warps=1)
    extras = (probs_TK, memory_R[:capacity], counts_E, overflow)
    op._scatter(hidden_TH, row_id_TK, memory_RH[:capacity], launch, extras)

    expected_RH, expected_R = reference.permute(hidden_TH, probs_TK, row_id_TK, used)
    written = min(used, capacity)
    assert torch.equal(memory_RH[:written], expected_RH[:written])
    assert torch.equal(memory_R[:written], expected_R[:written])
    assert memory_RH[written:].isnan().all()
    assert memory_R[written:].isnan().all()
    assert overflow == max(used - capacity, 0)
    reference_overflow = permute(hidden_TH, probs_TK, row_id_TK, counts_E, capacity, "torch")[2]
    assert torch.equal(reference_overflow, overflow)

    # The gather reads the same rows: NaN behind them must not come through.
    memory_TH, memory_TK = poisoned(11, 97, dtype=dtype), poisoned(11, 4, dtype=dtype)
    op._gather(memory_RH[:capacity], row_id_TK, memory_TH, launch, (memory_R[:capacity], memory_TK))
    assert_sums_equal(memory_TH, reference.unpermute(expected_RH[:written], row_id_TK))
    kept_TK = (row_id_TK >= 0) & (row_id_TK < capacity)
    assert torch.equal(memory_TK, probs_TK * kept_TK)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("missing", [-9, 0, 13])
def test_gradients_of_dropped_and_unused_slots_are_zero(missing: int, backend: str) -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(29, 8, 4, 48)
    used = int(counts_E.sum())
    capacity, written = used - missing, min(used, used - missing)
    hidden_TH.requires_grad_()
    probs_TK.requires_grad_()
    rows_RH, probs_R, _ = permute(hidden_TH, probs_TK, row_id_TK, counts_E, capacity, backend)
    (rows_RH[:written].sum() + 2 * probs_R[:written].sum()).backward()
    kept_TK = ((row_id_TK >= 0) & (row_id_TK < capacity)).float()
    assert torch.equal(probs_TK.grad, 2 * kept_TK)
    assert torch.equal(hidden_TH.grad, kept_TK.sum(dim=1, keepdim=True).expand(-1, 48))


def test_bit_equal_for_all_block_sizes_and_runs() -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(9, 16, 11, 97)
    used = int(counts_E.sum())
    results = []
    for launch in [
        Launch(128, 8, 4),
        Launch(128, 8, 4),
        Launch(32, 1, 1),
        Launch(64, 3, 2),
        Launch(256, 16, 8),
    ]:
        rows_RH, probs_R = poisoned(used, 97), poisoned(used)
        overflow = torch.zeros((), dtype=torch.int32)
        op._scatter(hidden_TH, row_id_TK, rows_RH, launch, (probs_TK, probs_R, counts_E, overflow))
        sum_TH, back_TK = poisoned(9, 97), poisoned(9, 11)
        op._gather(rows_RH, row_id_TK, sum_TH, launch, (probs_R, back_TK))
        results.append((rows_RH, probs_R, sum_TH, back_TK))
    for result in results:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


def test_all_tokens_to_one_expert_and_to_all() -> None:
    for k_max in (1, 6):
        index_TK = torch.arange(6)[:k_max].expand(20, k_max)
        got = plan(index_TK, 6, backend="torch")
        hidden_TH = torch.randn(20, 48)
        rows_RH, _, _ = permute(
            hidden_TH,
            torch.ones(20, k_max),
            got.row_id_TK,
            got.tokens_per_expert_E,
            20 * k_max,
            "triton",
        )
        assert torch.equal(rows_RH, hidden_TH.repeat(k_max, 1))
        torch.testing.assert_close(unpermute(rows_RH, got.row_id_TK, "triton"), k_max * hidden_TH)


@pytest.mark.parametrize(
    "strided", [lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, dim=1)[:, ::2]]
)
def test_non_contiguous(strided: Callable[[torch.Tensor], torch.Tensor]) -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(13, 8, 4, 48)
    used = int(counts_E.sum())
    expected_RH, expected_R = reference.permute(hidden_TH, probs_TK, row_id_TK, used)
    inputs = [strided(x).requires_grad_(x.is_floating_point()) for x in (hidden_TH, probs_TK)]
    row_ids = strided(row_id_TK)
    assert not any(x.is_contiguous() for x in (*inputs, row_ids))
    rows_RH, probs_R, _ = permute(*inputs, row_ids, counts_E, used, "triton")
    assert torch.equal(rows_RH, expected_RH)
    assert torch.equal(probs_R, expected_R)
    # Gradients that come in strided.
    torch.autograd.backward([rows_RH, probs_R], [strided(expected_RH), expected_R.flip(0).flip(0)])
    assert torch.equal(inputs[0].grad, reference.unpermute(expected_RH, row_id_TK))
    leaf_RH = strided(expected_RH).requires_grad_()
    sum_TH = unpermute(leaf_RH, row_ids, "triton")
    assert torch.equal(sum_TH, reference.unpermute(expected_RH, row_id_TK))
    sum_TH.backward(strided(hidden_TH))
    assert torch.equal(leaf_RH.grad, expected_RH)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_take_is_a_slice_whose_gradient_is_no_longer(backend: str) -> None:
    """Allocated by bound, launched, and cut to size when the host knows the size."""
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(19, 8, 4, 48)
    used = int(counts_E.sum())
    inputs = [hidden_TH.requires_grad_(), probs_TK.requires_grad_()]
    permuted = begin_permute(*inputs, row_id_TK, counts_E, row_id_TK.numel(), backend)
    rows_RH, probs_R = permuted.take(used)
    expected = reference.permute(*inputs, row_id_TK, used)
    weights = [torch.randn(used, 48), torch.randn(used)]
    got_grads = torch.autograd.grad([rows_RH, probs_R], inputs, weights)
    expected_grads = torch.autograd.grad(expected, inputs, weights)
    assert torch.equal(rows_RH, expected[0])
    assert torch.equal(probs_R, expected[1])
    assert torch.equal(got_grads[1], expected_grads[1])
    torch.testing.assert_close(got_grads[0], expected_grads[0])
    if backend == "triton":
        assert rows_RH.untyped_storage().data_ptr() == permuted._rows_RH.data_ptr()
        assert type(rows_RH.grad_fn).__name__ == "_PermuteBackward"


def test_bad_input() -> None:
    hidden_TH, probs_TK, row_id_TK, counts_E = make_case(5, 8, 4, 16)
    with pytest.raises(ValueError, match="hidden_TH must have 2 dimensions and be float32"):
        permute(hidden_TH.double(), probs_TK, row_id_TK, counts_E, 20)
    with pytest.raises(ValueError, match="row_id_TK must have 2 dimensions and be int32"):
        permute(hidden_TH, probs_TK, row_id_TK.long(), counts_E, 20)
    with pytest.raises(ValueError, match="capacity >= 0"):
        permute(hidden_TH, probs_TK[:, 1:], row_id_TK, counts_E, 20)
    with pytest.raises(ValueError, match="capacity >= 0"):
        permute(hidden_TH[1:], probs_TK, row_id_TK, counts_E, 20)
    with pytest.raises(ValueError, match="rows_RH must have 2 dimensions"):
        unpermute(hidden_TH.flatten(), row_id_TK)
    with pytest.raises(ValueError, match="one of auto, triton, torch"):
        unpermute(hidden_TH, row_id_TK, "cuda")


@pytest.mark.parametrize(("experts", "k_mean", "k_max"), [(8, 2, 8), (16, 4, 8), (256, 8, 16)])
@pytest.mark.parametrize("hidden", [1024, 2048, 7168])
def test_bytes_are_close_to_the_minimum(experts: int, k_mean: int, k_max: int, hidden: int) -> None:
    tokens = 4096
    minimum = minimum_bytes(tokens, tokens * k_mean, hidden, itemsize=2)
    sizes = (tokens, k_max, tokens * k_mean, hidden, 2)
    for moved in (
        moved_bytes(*sizes, num_experts=experts),
        moved_bytes(*sizes, backward=True),
    ):
        assert minimum < moved <= 1.03 * minimum
    assert moved_bytes(*sizes, probs=False) <= 1.03 * minimum


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31() -> None:
    """Rows and tokens whose elements start beyond 2³¹, in memory of which few pages are touched."""
    script = """
import os, resource
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch, triton
from triton.runtime import interpreter
from uar_kernels.permutation import kernel, op
# The interpreter would copy each buffer onto itself after the launch, and so touch all of it.
interpreter.GridExecutor._restore_args_dev = lambda *args: None
N, H = 300_003, 7168
assert N * H > 2**31
buffer_RH = torch.empty(N, H, dtype=torch.bfloat16)
buffer_TH = torch.empty(N, H, dtype=torch.bfloat16)
row_id_TK = torch.tensor([[N - 1, -1, 299_600]], dtype=torch.int32)
launch = op.heuristics(buffer_RH, row_id_TK)

x = torch.randn(1, H).bfloat16()
op._scatter(x, row_id_TK, buffer_RH, launch)
assert torch.equal(buffer_RH[N - 1], x[0]) and torch.equal(buffer_RH[299_600], x[0])
back = torch.full_like(x, float("nan"))
op._gather(buffer_RH, row_id_TK, back, launch)
assert torch.equal(back, 2 * x)

# Only the last token's programs: the interpreter counts up to the grid, so the ids are shifted.
blocks = -(-H // launch.block_h)
get = interpreter.interpreter_builder.create_get_program_id
def shifted(axis):
    handle = get(axis)
    handle.data = handle.data + np.int32((N - 1) * blocks)
    return handle
interpreter.interpreter_builder.create_get_program_id = shifted
all_row_ids = torch.full((N, 3), -1, dtype=torch.int32)
all_row_ids[N - 1] = torch.tensor([1, -1, 0])
sizes = op._constexprs(H, 3, launch)
buffer_TH[N - 1] = x[0]
few_RH = torch.full((2, H), float("nan"), dtype=torch.bfloat16)
none = all_row_ids
kernel.scatter_rows[(blocks,)](
    buffer_TH, none, all_row_ids, none, few_RH, none, none, 2, N, 0,
    **sizes, BLOCK_E=1, HAS_PROBS=False)
assert torch.equal(few_RH, x.expand(2, H))
kernel.gather_rows[(blocks,)](
    few_RH, none, all_row_ids, buffer_TH, none, 2, **sizes, HAS_PROBS=False)
assert torch.equal(buffer_TH[N - 1], 2 * x[0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 3000, done.stdout
