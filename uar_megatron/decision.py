"""What a router decided for one micro-batch, with the shape legend used throughout the package.

Shape suffixes: ``T`` tokens on this rank, ``E`` experts (all of them, not only local ones),
``K`` columns of a selection (the largest number of experts a token may get), ``B`` sequences.
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
        mean: ū that ẑ was made with, a scalar.
        inverse_sigma: 1/σ_u likewise; 0 where there is no spread.
    """

    energy_T: torch.Tensor
    entropy_T: torch.Tensor
    measure_T: torch.Tensor
    zscore_T: torch.Tensor
    finite_T: torch.Tensor
    mean: torch.Tensor
    inverse_sigma: torch.Tensor


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

    def slots(self, counted_T: torch.Tensor | None) -> torch.Tensor:
        """Return the slots of each expert, ``[experts]``; of the tokens that are counted."""
        routed_TE = self.routing_map_TE
        if counted_T is not None:
            routed_TE = routed_TE & counted_T.unsqueeze(-1)
        return routed_TE.sum(dim=0)

    def weighted_slots(self, weight_T: torch.Tensor) -> torch.Tensor:
        """Return Σ of the weights of each expert's tokens, float64 ``[experts]``."""
        return weight_T.double() @ self.routing_map_TE.double()


@dataclass(frozen=True)
class CompactDecision:
    """As :class:`RoutingDecision`, without anything of size tokens × experts.

    Attributes:
        index_TK: int32 experts in descending score, −1 from k on.
        probs_TK: combination weights in the logits' dtype, 0 from k on.
        k_T: experts of each token.
        slots_E: slots of each expert, padding left out.
        wanted_k_T: as in :class:`RoutingDecision`.
    """

    index_TK: torch.Tensor
    probs_TK: torch.Tensor
    k_T: torch.Tensor
    slots_E: torch.Tensor
    wanted_k_T: torch.Tensor | None = None

    def slots(self, counted_T: torch.Tensor | None) -> torch.Tensor:
        """Return the slots of each expert, ``[experts]``: of every token that is no padding."""
        return self.slots_E

    def weighted_slots(self, weight_T: torch.Tensor) -> torch.Tensor:
        """Return Σ of the weights of each expert's tokens, float64 ``[experts]``.

        Sums of dyadic weights are exact, so the order in which a device adds them does not matter.
        """
        weight_TK = weight_T.double().unsqueeze(-1).expand(self.index_TK.shape)
        total = weight_TK.new_zeros(self.slots_E.shape[0] + 1)  # the last is for unused slots
        return total.index_add_(0, self._with_spare().flatten(), weight_TK.flatten())[:-1]

    def densify(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(probs_TE, routing_map_TE)`` for a dispatcher that takes nothing else."""
        index_TK = self._with_spare()
        shape = (index_TK.shape[0], self.slots_E.shape[0] + 1)
        probs_TE = self.probs_TK.new_zeros(shape).scatter(1, index_TK, self.probs_TK)
        is_routed_TE = torch.zeros(shape, dtype=torch.bool, device=index_TK.device)
        return probs_TE[:, :-1], is_routed_TE.scatter(1, index_TK, True)[:, :-1]

    def _with_spare(self) -> torch.Tensor:
        """The experts, int64; unused slots have one of their own, past the last."""
        return self.index_TK.long().masked_fill(self.index_TK < 0, self.slots_E.shape[0])
