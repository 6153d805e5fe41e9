"""The routers of a UAR model: how many experts a token gets, which, and with which weights.

Tensors are named by their shapes: ``T`` tokens, ``E`` experts, ``K`` columns of a selection.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_uar_moe import UARMoEConfig

ROUNDING = {"floor": torch.floor, "nearest": torch.round, "ceil": torch.ceil}
SIGMA_FLOOR = 1e-6  # a spread below this counts as none


class FrozenState(nn.Module):
    """What training left behind: statistics of the uncertainty, and the selection bias.

    Follows the model's device but not its dtype: in bf16 a token's k would change.
    """

    mean: torch.Tensor
    var: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, config: UARMoEConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("var", torch.zeros((), dtype=torch.float64))
        self.register_buffer("bias", None)
        if config.routing["bias_dtype"] is not None:
            dtype = getattr(torch, config.routing["bias_dtype"])
            self.register_buffer("bias", torch.zeros(config.num_experts, dtype=dtype))

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda x: x.to(device=fn(x.new_empty(0)).device), recurse)


class Router(nn.Module):
    """Decides how many experts a token gets, which, and with which weights."""

    def __init__(self, config: UARMoEConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.routing = spec, config.routing
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.frozen = FrozenState(config)

    def forward(
        self, x_BSH: torch.Tensor, valid_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``(weight_TE, map_TE, k_T, energy_T)``; tokens in order of batch, sequence."""
        name = self.routing["dtype"]
        dtype = x_BSH.dtype if name is None else getattr(torch, name)
        x_TH = x_BSH.flatten(0, 1)
        logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
        energy_T, entropy_T = energy_and_entropy(logits_TE, self.routing["temperature"])
        if self.spec["rule"] == "relu":
            map_TE = logits_TE > 0
            weight_TE = torch.relu(logits_TE).masked_fill(~map_TE, 0.0) * self.routing["scaling"]
            return weight_TE, map_TE, map_TE.sum(-1), energy_T.float()
        u_T = energy_T if self.routing["uncertainty"] == "energy" else entropy_T
        var = self.frozen.var
        inverse = (var > SIGMA_FLOOR**2) * var.clamp_min(SIGMA_FLOOR**2).rsqrt()
        zscore_T = ((u_T - self.frozen.mean) * inverse).float()
        zscore_T = zscore_T.masked_fill(~(energy_T.abs() < math.inf), 0.0)
        k_T = self._experts_of(zscore_T, logits_TE, valid_BS)
        weight_TE, map_TE = self._select(logits_TE, k_T)
        return weight_TE, map_TE, k_T, energy_T.float()

    def _experts_of(
        self, zscore_T: torch.Tensor, logits_TE: torch.Tensor, valid_BS: torch.Tensor
    ) -> torch.Tensor:
        spec = self.spec
        low, high = spec["k_min"], spec["k_max"]
        if spec["rule"] == "line":
            exact_T = ROUNDING[spec["rounding"]](spec["alpha"] * zscore_T + spec["beta"])
            return exact_T.clamp(low, high).long()
        if spec["rule"] == "top_p":
            largest_TK = torch.softmax(logits_TE, -1, dtype=torch.float32).topk(high, -1).values
            before_TK = largest_TK.cumsum(-1) - largest_TK
            return (before_TK < spec["p"]).sum(-1).clamp(low, high)
        k_T = torch.full_like(zscore_T, low, dtype=torch.int64)
        for tokens in budget_groups(valid_BS, spec["segment"]):
            total = round(len(tokens) * spec["mean_k"])
            k_T[tokens] = exact_budget(zscore_T[tokens], spec["alpha"], low, high, total)
        return k_T

    def _select(
        self, logits_TE: torch.Tensor, k_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the k best experts; ties go to the lower index, and the bias only chooses."""
        routing, rule, width = self.routing, self.spec["weights"], self.spec["width"]
        scores_TE = scores_of(logits_TE, routing["score_function"])
        selection_TE = logits_TE if routing["selects_by_logits"] else scores_TE
        if self.frozen.bias is not None:
            selection_TE = scores_TE + self.frozen.bias
        if routing["group_topk"]:
            selection_TE = limit_to_groups(selection_TE, routing)
        columns = max(width, routing["topk"]) if rule == "renormalised_to_K" else width
        order_TE = torch.sort(selection_TE, dim=-1, descending=True, stable=True).indices
        index_TK = order_TE[:, :columns]
        chosen_TK = torch.arange(columns, device=k_T.device) < k_T.unsqueeze(-1)
        if rule == "softmax_after":
            weight_TK = logits_TE.float().gather(1, index_TK).masked_fill(~chosen_TK, -math.inf)
            weight_TK = weight_TK.masked_fill((k_T == 0).unsqueeze(-1), 0.0).softmax(-1)
        else:
            weight_TK = scores_TE.gather(1, index_TK)
            if rule != "as_they_are":
                sum_T1 = (weight_TK * chosen_TK).sum(-1, keepdim=True) + 1e-20
                # Without an expert there is nothing to divide; 1/1e-20 has gradients of infinity.
                scaled_TK = weight_TK / sum_T1.masked_fill((k_T == 0).unsqueeze(-1), 1.0)
                if rule == "renormalised_to_K":
                    if routing["score_function"] != "softmax":
                        weight_TK = weight_TK / (scores_TE.sum(-1, keepdim=True) + 1e-20)
                    scaled_TK = scaled_TK * weight_TK[:, : routing["topk"]].sum(-1, keepdim=True)
                weight_TK = scaled_TK
        weight_TK = (weight_TK * routing["scaling"]).masked_fill(~chosen_TK, 0.0)
        weight_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weight_TK.type_as(logits_TE))
        map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, chosen_TK)
        return weight_TE, map_TE


def energy_and_entropy(
    logits_TE: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """F = −τ·logsumexp(z/τ) and H = −Σ p·log p with p = softmax(z/τ)."""
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    scaled_TE = logits_TE.to(dtype) / temperature
    energy_T = -temperature * torch.logsumexp(scaled_TE, dim=-1)
    return energy_T, torch.special.entr(scaled_TE.softmax(-1)).sum(-1)


def scores_of(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores of all experts, float32."""
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE.float())
    return F.softplus(logits_TE.float()).sqrt()


def limit_to_groups(selection_TE: torch.Tensor, routing: dict[str, Any]) -> torch.Tensor:
    """−inf outside the groups with the best sums of their best scores."""
    groups, best = routing["num_groups"], routing["group_topk"]
    worth_TGE = selection_TE.unflatten(-1, (groups, -1))
    worth_TG = worth_TGE.topk(routing["topk"] // best, dim=-1).values.sum(-1)
    chosen_TG = worth_TG.topk(best, dim=-1, sorted=False).indices
    allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, chosen_TG, True)
    allowed_TE = allowed_TG.repeat_interleave(worth_TGE.shape[-1], dim=-1)
    return selection_TE.masked_fill(~allowed_TE, -math.inf)


def budget_groups(valid_BS: torch.Tensor, segment: int | None) -> list[torch.Tensor]:
    """Tokens that share a budget: those of a sequence, or of a segment of it, without padding.

    Of one call: what the cache holds was shared out when it was computed.
    """
    token_BS = torch.arange(valid_BS.numel(), device=valid_BS.device).view(valid_BS.shape)
    rows = [row[valid] for row, valid in zip(token_BS, valid_BS, strict=True) if valid.any()]
    return [part for row in rows for part in row.split(segment or len(row))]


def exact_budget(
    zscore_T: torch.Tensor, alpha: float, low: int, high: int, total: int
) -> torch.Tensor:
    """k = clamp(⌊α·ẑ + s⌋, low, high) with the s for which the k sum to ``total``."""
    x_T, order_T = torch.sort(alpha * zscore_T.double(), descending=True, stable=True)
    steps_J = torch.arange(low + 1, high + 1, device=x_T.device, dtype=torch.float64)
    cheapest = torch.argsort((steps_J - x_T.unsqueeze(-1)).flatten(), stable=True)
    bought = order_T[cheapest[: total - len(x_T) * low] // max(high - low, 1)]
    return torch.full_like(order_T, low).scatter_add_(0, bought, torch.ones_like(bought))
