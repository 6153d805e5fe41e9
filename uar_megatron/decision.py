"""What a router decided for one micro-batch, with the shape legend used throughout the package.

Shape suffixes: ``T`` tokens on this rank, ``E`` experts (all of them, not only local ones),
``K`` columns of a selection (the largest number of experts a token may get).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Uncertainty:
    """How uncertain the router is about each token. Always detached.

    Attributes:
        energy_T: free energy F (Eq. 4), fp32; high means little evidence.
        entropy_T: router entropy H (Eq. 3), nats, fp32.
        measure_T: u, the one of the two that the configuration chose.
        zscore_T: ẑ = (u − ū)/σ_u, fp32; 0 before the first statistics and for tokens whose u is not
            finite.
        finite_T: bool, whether energy and entropy are finite (both are, or neither is).
    """

    energy_T: torch.Tensor
    entropy_T: torch.Tensor
    measure_T: torch.Tensor
    zscore_T: torch.Tensor
    finite_T: torch.Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """Which experts each token goes to and with which weight.

    Attributes:
        probs_TE: combination weights in the logits' dtype, 0 where a token is not routed.
        routing_map_TE: bool, True where a token is dispatched to an expert.
        k_T: experts of each token (int64), the row sums of ``routing_map_TE``.
        wanted_k_T: what k would be without a bound on the rows, or None where there is none.
    """

    probs_TE: torch.Tensor
    routing_map_TE: torch.Tensor
    k_T: torch.Tensor
    wanted_k_T: torch.Tensor | None = None
