"""SeqTopK against a list of all (token, expert) pairs of a sequence, sorted by score in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import build_policy, decide

from uar_megatron.errors import UARError


def scores_of(logits: np.ndarray, score_function: str) -> np.ndarray:
    """Scores of one token's experts."""
    if score_function == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def experts_per_token(
    scores: np.ndarray, total: int, low: int, high: int, are_ties_exact: bool
) -> list[int] | None:
    """k of each token of one sequence (rows of ``scores``); None where float32 cannot tell.

    ``low`` experts of each token first, then the best of what is left until ``total``.
    """
    k = [low] * len(scores)
    best = [sorted(row, reverse=True) for row in scores]
    left = [
        (-best[token][rank], token, rank)
        for token in range(len(scores))
        for rank in range(low, high)
    ]
    left.sort()
    to_give = total - low * len(scores)
    for _, token, _ in left[:to_give]:
        k[token] += 1
    if 0 < to_give < len(left):
        last, next_one = -left[to_give - 1][0], -left[to_give][0]
        is_clear = last == next_one and are_ties_exact
        if not is_clear and abs(last - next_one) < 1e-6 * abs(last) + 1e-12:
            return None
    return k


@given(
    seed=st.integers(0, 2**16),
    length=st.sampled_from([0, 1, 2, 6, 8]),
    batch_size=st.sampled_from([1, 2, 3]),
    shape=st.sampled_from([(1, 1, 1), (6, 1, 4), (6, 2, 2), (7, 0, 7), (8, 0, 3), (8, 1, 8)]),
    part=st.sampled_from([0.0, 0.3, 0.5, 0.77, 1.0]),
    segment=st.sampled_from([None, 1, 2]),
    score_function=st.sampled_from(["softmax", "sigmoid"]),
    pre_softmax=st.booleans(),
    has_bias=st.booleans(),
    has_ties=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_reference(
    seed: int,
    length: int,
    batch_size: int,
    shape: tuple[int, int, int],
    part: float,
    segment: int | None,
    score_function: str,
    pre_softmax: bool,
    has_bias: bool,
    has_ties: bool,
    dtype: torch.dtype,
) -> None:
    experts, low, high = shape
    target = low + part * (high - low)
    if segment is not None and length % segment:
        segment = None
    policy = build_policy(
        {
            "policy": "seq_topk",
            "budget": {"k_min": low, "k_max": high, "target_mean_k": target, "segment": segment},
        },
        experts=experts,
        topk=1,
        score_function=score_function,
        pre_softmax=pre_softmax and score_function == "softmax",
    )
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(length, batch_size, experts)) * 2
    if has_ties and length > 1:  # equal tokens have equal probabilities in every precision
        logits[1:] = logits[0]
    # torch's sigmoid of one number may differ in the last bit, where vectors end and singles begin.
    are_ties_exact = score_function == "softmax"
    variable = torch.tensor(logits.reshape(-1, experts), dtype=dtype)
    bias = rng.normal(size=experts) / 4 if has_bias else np.zeros(experts)
    decision = decide(
        policy, variable, torch.tensor(bias) if has_bias else None, batch_size=batch_size
    )
    scores = np.array(
        [scores_of(row, score_function) + bias for row in variable.double().numpy()]
    ).reshape(length, batch_size, experts)
    k = decision.k_T.view(length, batch_size)
    size = segment or length
    for b in range(batch_size):
        for start in range(0, length, max(size, 1)):
            total = round(size * target)
            assert int(k[start : start + size, b].sum()) == total
            ours = scores[start : start + size, b]
            expected = experts_per_token(ours, total, low, high, are_ties_exact)
            assert expected is None or k[start : start + size, b].tolist() == expected
    total = policy.total_slots(length * batch_size, 0)
    assert total is None or total == int(decision.k_T.sum())
    is_known = segment is not None or target == int(target)
    assert (total is not None) == is_known
    for t, row in enumerate(scores.reshape(-1, experts)):  # a token keeps its own best experts
        order = sorted(range(experts), key=lambda e: (-row[e], e))
        gaps = np.diff(sorted(row))
        if not len(gaps) or gaps.min() > 1e-6:
            chosen = decision.routing_map_TE[t].numpy().nonzero()[0].tolist()
            assert chosen == sorted(order[: int(decision.k_T[t])])


@given(seed=st.integers(0, 2**16), pre_softmax=st.booleans(), k_max=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_one_token_more_or_less_changes_only_its_own_sequence(
    seed: int, pre_softmax: bool, k_max: int
) -> None:
    """Tokens are ordered [sequence, batch]; sequences do not compete with each other."""
    uar = {"policy": "seq_topk", "budget": {"k_max": k_max}}
    policy = build_policy(uar, experts=6, pre_softmax=pre_softmax)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, 3, 6, generator=generator)
    whole = decide(policy, logits.view(-1, 6), batch_size=3)
    alone = [decide(policy, logits[:, b]) for b in range(3)]
    for b in range(3):
        probs = whole.probs_TE.view(5, 3, 6)[:, b]
        torch.testing.assert_close(probs, alone[b].probs_TE)
        assert torch.equal(whole.k_T.view(5, 3)[:, b], alone[b].k_T)


def test_a_certain_token_gives_its_experts_to_others() -> None:
    """Scores decide across tokens also with a softmax after the selection, not logits."""
    policy = build_policy({"policy": "seq_topk", "budget": {"k_max": 3}}, experts=4)
    certain, uncertain = [20.0, 9.0, 8.0, 7.0], [1.0, 0.9, 0.8, 0.0]
    decision = decide(policy, torch.tensor([certain, uncertain]))
    assert decision.k_T.tolist() == [1, 3]
    torch.testing.assert_close(decision.probs_TE.sum(dim=1), torch.ones(2))


def test_ties_go_to_the_earlier_token() -> None:
    uar = {"policy": "seq_topk", "budget": {"k_max": 3, "target_mean_k": 1.5}}
    decision = decide(build_policy(uar, experts=4), torch.zeros(6, 4))
    # Nine experts for six tokens: one each, then the second and third of the earliest.
    assert decision.k_T.tolist() == [3, 2, 1, 1, 1, 1]
    assert decision.routing_map_TE[0].tolist() == [True, True, True, False]


def test_with_one_bound_for_all_it_is_top_k() -> None:
    uar = {"policy": "seq_topk", "budget": {"k_min": 2, "k_max": 2}}
    policy = build_policy(uar, experts=6, scaling_factor=2.5)
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    decision = decide(policy, logits)
    probs, routing_map = policy.settings.fixed_topk(logits, 2)
    torch.testing.assert_close(decision.probs_TE, probs)
    assert torch.equal(decision.routing_map_TE, routing_map)


def test_a_sequence_that_is_no_whole_number_of_segments_is_an_error() -> None:
    policy = build_policy({"policy": "seq_topk", "budget": {"segment": 4}}, experts=6)
    assert policy.segment == 4
    with pytest.raises(UARError, match="segment"):
        decide(policy, torch.zeros(6, 6))


@pytest.mark.parametrize(("segment", "bound"), [(None, 3.0), (1, 3.0), (4, 2.5 + 0.5 / 4)])
def test_the_bound_on_the_rows_holds_at_every_length(segment: int | None, bound: float) -> None:
    uar = {"policy": "seq_topk", "budget": {"target_mean_k": 2.5, "segment": segment, "k_max": 8}}
    policy = build_policy(uar, experts=8)
    assert policy.mean_bound == bound
    for length in range(segment or 1, 17, segment or 1):
        assert decide(policy, torch.randn(length, 8)).k_T.sum() <= bound * length
