"""Free energy and entropy of the router's distribution over experts (Eq. 3 and 4 of the paper)."""

import torch


def energy_and_entropy(
    logits_TE: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the free energy F and the entropy H of each token.

    F = −τ·logsumexp(z/τ); H = −Σ p·log p with p = softmax(z/τ) and 0·log 0 = 0. Neither a common
    level of the logits nor experts masked out with −inf cost precision: softmax takes the level out
    and ``entr`` knows the limit.

    Args:
        logits_TE: raw router logits z, before any expert bias, ``[tokens, experts]``, any float.
        temperature: τ > 0.

    Returns:
        ``(energy_T, entropy_T)``, fp32 (fp64 for fp64 logits); F in units of the logits, H in nats.
    """
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    scaled_TE = logits_TE.to(dtype) / temperature
    energy_T = -temperature * torch.logsumexp(scaled_TE, dim=-1)
    entropy_T = torch.special.entr(torch.softmax(scaled_TE, dim=-1)).sum(dim=-1)
    return energy_T, entropy_T
