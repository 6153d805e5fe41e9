"""The routing kernels, in Triton's interpreter, against the reference; both against the product."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_kernels.routing import (
    Budget,
    Mask,
    Measure,
    Routed,
    Scoring,
    bytes,
    measure_tokens,
    op,
    route,
)

MEAN = torch.tensor(-2.5, dtype=torch.float64)
INVERSE = torch.tensor(1.5, dtype=torch.float64)
ENERGY = Measure("energy", 1.0, MEAN, INVERSE)
MASK = Mask(theta=0.1, width=0.5, floor=0.1)
DIFFERENTIABLE = ("probs_TK", "lse_T", "weighted_GE")
RULES = [("softmax", "as_they_are"), ("softmax", "softmax_after")]
RULES += [("sigmoid", "as_they_are"), ("sigmoid", "renormalised")]


def logits_of(tokens: int, experts: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    """Multiples of 1/64, so that equal scores come from equal logits alone, and in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * scale * 64).round() / 64


def eq5(k_min: int, k_max: int, rounding: str = "floor") -> Budget:
    return Budget(
        alpha=1.1, beta=0.5 * (k_min + k_max), k_min=k_min, k_max=k_max, rounding=rounding
    )


def fields(routed: Routed) -> dict[str, torch.Tensor]:
    return {f.name: getattr(routed, f.name) for f in dataclasses.fields(routed)}


def losses(routed: Routed) -> torch.Tensor:
    """A function of all that is differentiable, whose gradient differs from number to number."""
    total = torch.zeros(())
    for seed, name in enumerate(DIFFERENTIABLE):
        value = getattr(routed, name)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        total = total + (value * weights).nan_to_num().sum()
    return total


def both(logits_TE: torch.Tensor, **request: Any) -> tuple[list[Routed], list[torch.Tensor]]:
    routed, grads = [], []
    for backend in ("triton", "torch"):
        leaf_TE = logits_TE.detach().requires_grad_()
        routed.append(route(leaf_TE, backend=backend, **request))
        losses(routed[-1]).backward()
        assert leaf_TE.grad is not None
        grads.append(leaf_TE.grad)
    return routed, grads


def compare(logits_TE: torch.Tensor, **request: Any) -> Routed:
    """Check Triton against the reference, forward and backward; return what Triton says."""
    (got, expected), (got_grad, expected_grad) = both(logits_TE, **request)
    for name, value in fields(expected).items():
        torch.testing.assert_close(
            fields(got)[name], value, rtol=2e-5, atol=2e-6, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    finite_T = expected.energy_T.isfinite()
    assert got_grad.dtype == logits_TE.dtype
    assert got_grad[~finite_T].isnan().all()
    # Half precision: the gradient is rounded once (the interpreter cuts bf16 off: one unit).
    unit = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[logits_TE.dtype]
    torch.testing.assert_close(
        got_grad[finite_T].float(), expected_grad[finite_T].float(), rtol=unit, atol=5e-6
    )
    return got


@pytest.mark.parametrize("experts", [1, 6, 7, 8, 64, 160, 256])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_equals_the_reference(tokens: int, experts: int) -> None:
    width = min(experts, 5)
    compare(
        logits_of(tokens, experts), width=width, budget=eq5(0, width), measure=ENERGY, mask=MASK
    )


@pytest.mark.parametrize("past", [-1, 0, 1])
@pytest.mark.parametrize("experts", [8, 64, 256])
def test_around_a_whole_tile(experts: int, past: int) -> None:
    block, _ = op.tile(op.FORWARD_TILES, experts)
    compare(logits_of(block + past, experts), width=2, budget=eq5(1, 2), measure=ENERGY, mask=MASK)


@pytest.mark.parametrize("experts", [512, 257])
def test_rows_of_four_reads(experts: int) -> None:
    compare(logits_of(3, experts), width=3, budget=eq5(1, 3), measure=ENERGY, mask=MASK)


@pytest.mark.parametrize(("function", "weights"), RULES)
@pytest.mark.parametrize("biased", [False, True])
def test_every_rule_of_the_weights(function: str, weights: str, biased: bool) -> None:
    # A bias that reverses many an order, and with it what is chosen at a vanishing probability.
    bias_E = torch.linspace(3, -3, 16) if biased else None
    scoring = Scoring(function, weights, 2.5, bias_E)
    logits_TE = logits_of(37, 16, scale=6.0)
    for budget in (eq5(0, 6), eq5(1, 6)):
        compare(
            logits_TE, width=6, budget=budget, measure=ENERGY, mask=MASK, scoring=scoring,
            valid_T=torch.arange(37) % 3 != 0,
        )  # fmt: skip


@pytest.mark.parametrize("rounding", ["floor", "nearest", "ceil"])
def test_every_rounding_and_halves_to_even(rounding: str) -> None:
    compare(logits_of(60, 8), width=8, budget=eq5(0, 8, rounding), measure=ENERGY)
    # Without statistics ẑ = 0: k is β rounded.
    for beta, expected in ((0.5, (0, 0, 1)), (1.5, (1, 2, 2)), (2.5, (2, 2, 3)), (-3.0, (0, 0, 0))):
        budget = Budget(1.0, torch.tensor(beta, dtype=torch.float64), 0, 8, rounding)
        routed = compare(logits_of(2, 8), width=8, budget=budget)
        wanted = expected[("floor", "nearest", "ceil").index(rounding)]
        assert routed.k_T.tolist() == [wanted, wanted]


@pytest.mark.parametrize("name", ["energy", "entropy"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("units", ["sigma", "absolute"])
def test_measures_temperatures_and_units(name: str, temperature: float, units: str) -> None:
    measure = Measure(name, temperature, torch.tensor(1.0), torch.tensor(1.5))
    mask = Mask(0.3, 0.7, 0.05, units)
    logits_TE = logits_of(33, 8)
    routed = compare(logits_TE, width=4, budget=eq5(1, 4), measure=measure, mask=mask)
    first = measure_tokens(logits_TE, measure=measure, backend="triton")
    for field in ("energy_T", "entropy_T", "statistics"):
        assert torch.equal(getattr(first, field), getattr(routed, field))
    second = compare(
        logits_TE, width=4, budget=routed.k_T, measure=measure, mask=mask, measured=first
    )
    for name_of, value in fields(routed).items():
        assert torch.equal(getattr(second, name_of), value), name_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_rows_that_are_apart(dtype: torch.dtype) -> None:
    wide = logits_of(37, 48).to(dtype)
    for logits_TE in (wide[:, :40], wide[:, 8:], wide[::2], wide.t().contiguous().t()):
        compare(logits_TE, width=3, budget=eq5(1, 3), measure=ENERGY, mask=MASK)


@pytest.mark.parametrize("sequences", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_of_each_sequence(sequences: int, padded: bool) -> None:
    tokens = 42
    valid_T = torch.arange(tokens) % 5 != 1 if padded else None
    routed = compare(
        logits_of(tokens, 8), width=4, budget=eq5(0, 4), measure=ENERGY, mask=MASK,
        valid_T=valid_T, sequences=sequences,
    )  # fmt: skip
    for sequence in range(sequences):
        index = routed.index_TK[sequence::sequences]
        if valid_T is not None:
            index = index[valid_T[sequence::sequences]]
        counted = torch.bincount(index[index >= 0].long(), minlength=8)
        assert routed.slots_GE[sequence].tolist() == counted.tolist()


def test_k_that_is_given() -> None:
    logits_TE, k_T = logits_of(37, 8), torch.arange(37) % 9
    for given_T in (k_T, k_T.int()):
        routed = compare(logits_TE, width=8, budget=given_T, measure=ENERGY, mask=MASK)
        assert torch.equal(routed.k_T, k_T.int())
        assert torch.equal((routed.index_TK >= 0).sum(-1), k_T)


def test_all_experts_and_ties_to_the_lower_index() -> None:
    logits_TE = torch.tensor([[0.0] * 7, [1.0, 2.0, 1.0, 2.0, -0.0, 0.0, 0.0]])
    for rule in RULES:
        k_T = torch.tensor([7, 7])
        routed = compare(logits_TE, width=7, budget=k_T, scoring=Scoring(*rule))
        assert routed.index_TK.tolist() == [[0, 1, 2, 3, 4, 5, 6], [1, 3, 0, 2, 4, 5, 6]]


def test_no_spread_makes_every_token_average() -> None:
    logits_TE = logits_of(1, 8).expand(20, 8)
    measure = Measure("energy", 1.0, MEAN, torch.tensor(0.0))
    routed = compare(logits_TE, width=4, budget=Budget(5.0, 2.0, 0, 4), measure=measure, mask=MASK)
    assert routed.k_T.tolist() == [2] * 20


def test_tokens_that_are_not_finite() -> None:
    logits_TE = logits_of(20, 8)
    logits_TE[1, 3] = math.nan
    logits_TE[2, 5] = math.inf
    logits_TE[3] = -math.inf
    logits_TE[4] = -math.inf
    logits_TE[4, 6] = 1.0
    logits_TE[5, 2] = -math.inf
    bad = [1, 2, 3]
    for rule in RULES:
        for bias_E in (None, torch.linspace(0, 1, 8)):
            routed = compare(
                logits_TE, width=8, budget=Budget(1.0, 3.0, 0, 8), measure=ENERGY, mask=MASK,
                scoring=Scoring(*rule, bias_E=bias_E), valid_T=torch.arange(20) != 2,
            )  # fmt: skip
            assert routed.k_T[bad].tolist() == [3] * 3
            assert routed.index_TK[bad, :4].tolist() == [[0, 1, 2, -1]] * 3
            assert routed.probs_TK[bad, :3].isnan().all()
            assert routed.probs_TK[bad, 3:].eq(0).all()
            assert routed.statistics[2:].tolist() == [17, 2]
            assert routed.statistics.isfinite().all()
            assert routed.weighted_GE.isfinite().all()
            # Also without a mask a token that is not finite weighs nothing.
            plain = route(
                logits_TE, width=8, budget=Budget(1.0, 3.0, 0, 8), backend="triton"
            ).omega_G
            assert plain.tolist() == [17]


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_huge_logits(level: float) -> None:
    logits_TE = logits_of(20, 8) + level
    measure = Measure("energy", 1.0, torch.tensor(-level), torch.tensor(0.5))
    routed, _ = both(logits_TE, width=4, budget=eq5(1, 4), measure=measure, mask=MASK)
    for name, value in fields(routed[1]).items():
        # lse itself is known to 1e-3 there.
        torch.testing.assert_close(fields(routed[0])[name], value, rtol=1e-4, atol=2e-3)
    apart_TE = torch.tensor([[1e4, -1e4, 0.0, 3e38], [-3e38, 1e4, 0.0, -1e4]])
    compare(apart_TE, width=4, budget=torch.tensor([4, 4]), mask=MASK)


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 20),
    seed=st.integers(0, 1000),
    rule=st.sampled_from(RULES),
    scale=st.sampled_from([0.02, 1.0, 20.0]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_request(
    tokens: int, experts: int, seed: int, rule: tuple[str, str], scale: float, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, experts))
    k_T = torch.randint(0, width + 1, (tokens,), generator=torch.Generator().manual_seed(seed))
    compare(
        logits_of(tokens, experts, seed, scale), width=width, budget=k_T,
        measure=data.draw(st.sampled_from([ENERGY, Measure("entropy", 1.5, MEAN, INVERSE)])),
        scoring=Scoring(*rule), mask=data.draw(st.sampled_from([MASK, None])),
    )  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_single_gradient(name: str) -> None:
    for rule in RULES:
        grads = []
        for backend in ("triton", "torch"):
            logits_TE = logits_of(19, 8).requires_grad_()
            routed = route(
                logits_TE, width=4, budget=eq5(0, 4), measure=ENERGY, mask=MASK,
                scoring=Scoring(*rule), backend=backend,
            )  # fmt: skip
            getattr(routed, name).square().sum().backward()
            grads.append(logits_TE.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    for other in set(fields(routed)) - set(DIFFERENTIABLE):
        assert not getattr(routed, other).requires_grad


def test_bits_do_not_depend_on_the_tile_or_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = logits_of(200, 8, scale=3.0)
    request = {"width": 4, "budget": eq5(0, 4), "measure": ENERGY, "mask": MASK, "sequences": 2}
    valid_T = torch.arange(200) % 7 != 3
    seen = []
    for block, warps, most_warps in (
        (64, 4, 999), (64, 4, 999), (16, 1, 999), (32, 8, 999), (128, 4, 1), (16, 2, 4),
    ):  # fmt: skip
        monkeypatch.setattr(op, "FORWARD_TILES", {8: (block, warps)})
        monkeypatch.setattr(op, "BACKWARD_TILES", {8: (block, warps)})
        monkeypatch.setattr(op, "MOST_WARPS", most_warps)
        leaf_TE = logits_TE.clone().requires_grad_()
        routed = route(leaf_TE, valid_T=valid_T, backend="triton", **request)
        losses(routed).backward()
        seen.append(fields(routed) | {"grad": leaf_TE.grad})
    for other in seen[1:]:
        for name, value in seen[0].items():
            assert torch.equal(value, other[name]), name


def test_statistics_of_many_granules(monkeypatch: pytest.MonkeyPatch) -> None:
    """More granules than the last program reads at once, and tiles up to what an int32 holds."""
    tokens = 16 * 1024 + 127
    logits_TE = torch.zeros(tokens, 1)
    logits_TE[::3] = 2.0
    monkeypatch.setattr(op, "FORWARD_TILES", {8: (128, 4)})
    monkeypatch.setattr(op, "MOST_WARPS", 1)
    measure = Measure("energy", 1.0, torch.tensor(0.25))
    routed = route(
        logits_TE, width=1, budget=Budget(0.0, 1.0, 1, 1), measure=measure, backend="triton"
    )
    ones = -(-tokens // 3)
    assert routed.slots_GE.tolist() == [[tokens]]
    assert routed.weighted_GE.tolist() == [[tokens]]
    assert routed.statistics[0] == -2.25 * ones - 0.25 * (tokens - ones)
    assert routed.statistics[1] == 2.25**2 * ones + 0.0625 * (tokens - ones)


def test_everything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", poisoned)
    for tokens, experts in ((0, 8), (37, 6), (17, 160)):
        routed, grads = both(
            logits_of(tokens, experts), width=3, budget=eq5(0, 3), measure=ENERGY, mask=MASK
        )
        for value in [*fields(routed[0]).values(), grads[0]]:
            assert not value.double().isnan().any()
            assert not value.eq(12345).any()


def test_the_workspace_is_left_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    zeros = op._zeros

    def remembered(*args: Any) -> torch.Tensor:
        kept.append(zeros(*args))
        return kept[-1]

    monkeypatch.setattr(op, "_zeros", remembered)
    route(logits_of(84, 8), width=3, budget=eq5(0, 3), sequences=3, backend="triton")
    measure_tokens(logits_of(84, 8), backend="triton")
    assert len(kept) == 4
    assert not any(tensor.any() for tensor in kept)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Measure("energie"), "measure"),
        (lambda: Measure(temperature=0.0), "temperature"),
        (lambda: Budget(1.0, 1.0, 2, 1), "k_min"),
        (lambda: Budget(1.0, 1.0, 1, 1, "up"), "rounding"),
        (lambda: Scoring("sqrtsoftplus"), "score function"),
        (lambda: Scoring("softmax", "renormalised_to_K"), "weights of softmax"),
        (lambda: Scoring("sigmoid", "softmax_after"), "weights of sigmoid"),
        (lambda: Mask(0.0, 0.0), "width"),
        (lambda: Mask(0.0, 1.0, 2.0), "floor"),
        (lambda: Mask(0.0, 1.0, units="miles"), "units"),
        (lambda: route(torch.zeros(2, 8), width=9, budget=eq5(1, 2)), "width"),
        (lambda: route(torch.zeros(2, 8), width=1, budget=eq5(1, 2)), "k_max"),
        (lambda: route(torch.zeros(2, 8), width=1, budget=torch.ones(3).long()), "k_T"),
        (lambda: route(torch.zeros(3, 8), width=2, budget=eq5(1, 2), sequences=2), "sequences"),
        (
            lambda: route(torch.zeros(2, 8).double(), width=2, budget=eq5(1, 2), backend="triton"),
            "fp32",
        ),
        (
            lambda: route(torch.zeros(2, 600), width=2, budget=eq5(1, 2), backend="triton"),
            "512 experts",
        ),
    ],
)
def test_refusals(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("experts", [8, 16, 64, 256])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_bytes_stay_near_the_minimum(experts: int, width: int) -> None:
    for tokens in (4096, 32768):
        minimum = bytes.forward_minimum(tokens, experts, width)
        assert bytes.forward(tokens, experts, width) <= 1.15 * minimum
        assert bytes.forward(tokens, experts, width, launches=2) <= 2.0 * minimum
        minimum = bytes.backward_minimum(tokens, experts, width)
        assert bytes.backward(tokens, experts, width) <= 1.1 * minimum


def test_what_is_compiled_ahead_is_complete() -> None:
    entries = op.compilations()
    assert len(entries) == 2 * (3 + 4 + 4 + 4)
    for entry in entries:
        names = entry["fn"].arg_names
        assert list(entry["signature"]) == list(names)
        assert {n for n, t in entry["signature"].items() if t == "constexpr"} == set(
            entry["constexprs"]
        )
