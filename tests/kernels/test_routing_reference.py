"""The routing op's reference is what the product computes without it; its gradients are true."""

from __future__ import annotations

import pytest
import torch

from uar_kernels.routing import Budget, Mask, Measure, Scoring
from uar_kernels.routing.reference import route_reference
from uar_kernels.uncertainty import energy_and_entropy
from uar_megatron.balance import balancing_sums, epistemic_weight, masked_balancing_loss
from uar_megatron.budget import free_budget
from uar_megatron.config import CLBConfig, UARConfig
from uar_megatron.mcore.compat import compute_routing_scores_for_aux_loss
from uar_megatron.policies import RouterSettings
from uar_megatron.policies.scores import route_variable_k
from uar_megatron.uncertainty import UncertaintyStatistics

# Score function and the kernels' rule -> moe_router_pre_softmax and uar.weights.
RULES = {
    ("softmax", "as_they_are"): (True, "megatron"),
    ("softmax", "softmax_after"): (False, "megatron"),
    ("sigmoid", "as_they_are"): (False, "megatron"),
    ("sigmoid", "renormalised"): (False, "renormalised"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("measure_name", ["energy", "entropy"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_is_the_products_definition(
    rule: tuple[str, str], biased: bool, measure_name: str, sequences: int
) -> None:
    function, weights = rule
    # Megatron divides sigmoid scores by their sum as soon as two experts can be chosen.
    width = 1 if rule == ("sigmoid", "as_they_are") else 5
    torch.manual_seed(0)
    logits_TE = torch.randn(24, 8)
    valid_T = torch.arange(24) % 5 != 0
    bias_E = torch.randn(8) if biased else None
    epsilon, coeff = 1e-3, 0.02
    clb = CLBConfig(enabled=True, floor=0.1, width=0.7)
    statistics = UncertaintyStatistics(
        UARConfig(uncertainty=measure_name, temperature=0.8), torch.device("cpu")
    )
    statistics.mean.fill_(-1.0)
    statistics.var.fill_(2.0)

    product_TE = logits_TE.clone().requires_grad_()
    uncertainty = statistics.measure(product_TE.detach(), valid_T)
    k_T = free_budget(uncertainty.zscore_T, 1.3, 2.0, (0, width), "floor")
    decision = route_variable_k(product_TE, k_T, width, bias_E, settings_of(function, *RULES[rule]))
    omega_T = epistemic_weight(uncertainty, 0.2, clb) * valid_T
    _, scores_TE = compute_routing_scores_for_aux_loss(
        product_TE, 2, function, padding_mask=~valid_T
    )
    routed_TE = decision.routing_map_TE & valid_T.unsqueeze(-1)
    sums = balancing_sums(scores_TE, routed_TE, omega_T, sequences)
    loss = masked_balancing_loss(
        sums.weighted_BE, sums.slots_BE.float(), sums.omega_B, coeff, epsilon
    )
    mixed_TE = torch.randn(24, 8)
    z_loss = product_TE.logsumexp(-1).square().mean()
    ((decision.probs_TE * mixed_TE).sum() + loss + z_loss).backward()

    own_TE = logits_TE.clone().requires_grad_()
    inverse_sigma = torch.tensor(2.0, dtype=torch.float64).rsqrt()
    routed = route_reference(
        own_TE, width, Budget(1.3, 2.0, 0, width),
        Measure(measure_name, 0.8, statistics.mean, inverse_sigma),
        Scoring(function, weights, 1.5, bias_E), Mask(0.2, 0.7, 0.1), valid_T, sequences,
    )  # fmt: skip
    index_TK = routed.index_TK.long().clamp_min(0)
    fractions_BE = routed.slots_GE / routed.slots_GE.sum(-1, keepdim=True).clamp_min(1)
    own_loss = coeff * 8 * (fractions_BE * routed.weighted_GE).sum(-1) / (routed.omega_G + epsilon)
    own_mixed = (routed.probs_TK * mixed_TE.gather(1, index_TK)).sum()
    (own_mixed + own_loss.mean() + routed.lse_T.square().mean()).backward()

    assert torch.equal(routed.k_T.long(), k_T)
    torch.testing.assert_close(routed.energy_T, uncertainty.energy_T)
    torch.testing.assert_close(routed.entropy_T, uncertainty.entropy_T)
    expected = statistics._sums(uncertainty.measure_T, uncertainty.finite_T, valid_T)
    torch.testing.assert_close(routed.statistics, expected)
    assert torch.equal(routed.slots_GE.long(), sums.slots_BE)
    dense_TE = torch.zeros(24, 8).scatter_add(1, index_TK, routed.probs_TK.detach())
    torch.testing.assert_close(dense_TE, decision.probs_TE.detach())
    torch.testing.assert_close(own_loss.mean(), loss)
    torch.testing.assert_close(own_TE.grad, product_TE.grad)


def settings_of(function: str, pre_softmax: bool, weights: str) -> RouterSettings:
    return RouterSettings(
        num_experts=8, topk=2, score_function=function, use_pre_softmax=pre_softmax,
        scaling_factor=1.5, num_groups=None, group_topk=None, num_moe_layers=1,
        uar=UARConfig(weights=weights), fixed_topk=None, budget=None, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(("function", "weights"), RULES)
def test_true_gradients(function: str, weights: str) -> None:
    """Of p, of the masked loss and of logsumexp, by finite differences in float64."""
    torch.manual_seed(1)
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    measure = Measure("energy", 1.0, torch.tensor(-2.0), torch.tensor(1.0))
    k_T = torch.tensor([0, 1, 2, 3, 2, 1])
    # ω is detached: it must not move with the logits, so the threshold is far away.
    mask = Mask(-1e9, 1.0)

    def outputs(logits_TE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routed = route_reference(
            logits_TE, 3, k_T, measure, Scoring(function, weights), mask, None, 2
        )
        return routed.probs_TK, routed.weighted_GE, routed.lse_T

    assert torch.autograd.gradcheck(outputs, (logits_TE,))
    assert torch.autograd.gradcheck(energy_and_entropy, (logits_TE,))
