"""Free energy and entropy of the router's distribution over experts (Eq. 3 and 4 of the paper)."""

import torch


def energy_and_entropy(
    logits_TE: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the free energy F and the entropy H of each token.

    F = −τ·logsumexp(z/τ); H = logsumexp(z/τ) − Σ p·z/τ with p = softmax(z/τ), a form of −Σ p·log p
    that has no log(0) as p → 0.

    Args:
        logits_TE: raw router logits z, before any expert bias, ``[tokens, experts]``, any float.
        temperature: τ > 0.

    Returns:
        ``(energy_T, entropy_T)``, fp32 (fp64 for fp64 logits); F in units of the logits, H in nats.
    """
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    scaled_TE = logits_TE.to(dtype) / temperature
    # H does not change when all logits move together, so it is computed from z − max z: a common
    # level of 1e4 would otherwise cost fp32 all of H's digits.
    level_T1 = scaled_TE.amax(dim=-1, keepdim=True)
    shifted_TE = scaled_TE - level_T1
    log_partition_T = torch.logsumexp(shifted_TE, dim=-1)
    probs_TE = torch.exp(shifted_TE - log_partition_T.unsqueeze(-1))
    # 0·(−inf) is 0 here: an expert masked out with −inf holds no probability and no entropy.
    weighted_TE = torch.where(probs_TE > 0, probs_TE * shifted_TE, torch.zeros_like(probs_TE))
    entropy_T = log_partition_T - weighted_TE.sum(dim=-1)
    # Rounding alone can push a one-hot distribution a few ulp below zero.
    return -temperature * (log_partition_T + level_T1.squeeze(-1)), entropy_T.clamp_min(0.0)
