"""Selection and weights for a variable k against a float64 reference, token by token."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.config import BudgetConfig, UARConfig
from uar_megatron.policies import RouterSettings
from uar_megatron.policies.scores import route_variable_k


def reference(
    logits: np.ndarray, k: int, bias: np.ndarray, settings: RouterSettings, width: int
) -> np.ndarray:
    """Weights of one token's experts in plain Python; 0 where not routed."""
    experts = len(logits)
    shifted = np.exp(logits - logits.max())
    scores = {
        "softmax": shifted / shifted.sum(),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "sqrtsoftplus": np.sqrt(np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0)),
    }[settings.score_function]
    post_softmax = settings.score_function == "softmax" and not settings.use_pre_softmax
    ranking = logits if post_softmax and not bias.any() else scores + bias
    allowed = set(range(experts))
    if settings.group_topk and settings.num_groups:
        size = experts // settings.num_groups
        counted = settings.topk // settings.group_topk
        groups = [range(g * size, (g + 1) * size) for g in range(settings.num_groups)]
        worth = [sum(sorted((ranking[e] for e in g), reverse=True)[:counted]) for g in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: settings.group_topk]
        allowed = {e for g in best for e in groups[g]}
    order = sorted(allowed, key=lambda e: (-ranking[e], e))
    chosen = order[:k]
    total = sum(scores[e] for e in chosen)
    rule = settings.uar.weights
    if rule == "megatron":
        if settings.score_function == "softmax":
            rule = "softmax_all" if settings.use_pre_softmax else "renormalised"
        else:
            rule = "renormalised" if width > 1 else "softmax_all"
    scale = 1.0
    if rule != "softmax_all":
        scale = 1 / (total + 1e-20)
    if rule == "renormalised_to_K":
        scale *= sum(scores[e] for e in order[: settings.topk]) / scores.sum()
    weights = np.zeros(experts)
    for e in chosen:
        weights[e] = scores[e] * scale * (settings.scaling_factor or 1.0)
    return weights


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 6),
    shape=st.sampled_from([(1, 1), (6, 2), (8, 2), (8, 8), (12, 3)]),
    score_function=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    use_pre_softmax=st.booleans(),
    weights=st.sampled_from(["megatron", "softmax_all", "renormalised", "renormalised_to_K"]),
    has_bias=st.booleans(),
    has_groups=st.booleans(),
    has_ties=st.booleans(),
    scaling_factor=st.sampled_from([None, 2.5]),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_reference(
    seed: int,
    tokens: int,
    shape: tuple[int, int],
    score_function: str,
    use_pre_softmax: bool,
    weights: str,
    has_bias: bool,
    has_groups: bool,
    has_ties: bool,
    scaling_factor: float | None,
) -> None:
    rng = np.random.default_rng(seed)
    experts, topk = shape
    if weights == "softmax_all" and score_function != "softmax":
        weights = "megatron"
    grouped = has_groups and experts % 4 == 0 and topk >= 2
    width = 2 * experts // 4 if grouped else experts
    (budget,) = BudgetConfig().layers(1, topk)
    settings_ = RouterSettings(
        num_experts=experts,
        topk=topk if not grouped else min(topk, width),
        score_function=score_function,
        use_pre_softmax=use_pre_softmax,
        scaling_factor=scaling_factor,
        num_groups=4 if grouped else None,
        group_topk=2 if grouped else None,
        num_moe_layers=1,
        uar=UARConfig.model_validate({"weights": weights}),
        fixed_topk=lambda logits, k: (logits, logits.bool()),
        budget=budget,
        device="cpu",
    )
    logits = rng.normal(size=(tokens, experts)) * 3
    if has_ties and not grouped:  # which of two equal groups is taken is Megatron's to say
        logits = np.round(logits / 2) * 2
    bias = rng.normal(size=experts) if has_bias else np.zeros(experts)
    k = rng.integers(0, width + 1, size=tokens)
    variable = torch.tensor(logits, requires_grad=True)
    decision = route_variable_k(
        variable, torch.tensor(k), width, torch.tensor(bias) if has_bias else None, settings_
    )
    expected = [
        reference(row, int(n), bias, settings_, width) for row, n in zip(logits, k, strict=True)
    ]
    expected = np.array(expected).reshape(tokens, experts)
    assert (decision.routing_map_TE.numpy() == (expected != 0)).all()
    assert decision.routing_map_TE.sum(dim=1).tolist() == k.tolist()
    np.testing.assert_allclose(decision.probs_TE.detach().numpy(), expected, rtol=2e-5, atol=1e-7)
    decision.probs_TE.square().sum().backward()
    assert math.isfinite(float(variable.grad.abs().sum()))
