"""Bytes that the kernels move, beside Megatron's and Transformer Engine's, and launches counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uar_kernels import permutation, plan, routing
from uar_kernels.permutation import kernel as permutation_kernel
from uar_kernels.permutation import op as permutation_op
from uar_kernels.plan import kernel as plan_kernel
from uar_kernels.plan import op as plan_op
from uar_kernels.routing import bytes as routing_bytes
from uar_kernels.routing import kernel as routing_kernel
from uar_kernels.routing import op as routing_op

BANDWIDTH = 3.35e12  # bytes a second of an H800's memory
TOKENS = (4096, 8192, 16384, 32768)
HIDDEN = (1024, 2048)
ITEMSIZE = 2  # of a row's elements; logits are fp32
# Experts, mean k, K_max. Megatron and Transformer Engine route every token to the mean.
PRESETS = {"8A2": (8, 2, 4), "16A4": (16, 4, 8), "256A8": (256, 8, 16)}


class Step(NamedTuple):
    """What one operation moves at least: each input read once, each output written once.

    Bytes for each (token, expert), each chosen (token, expert) and each token; then rows of the
    hidden size, for each token and each chosen (token, expert). Launches are at least as many.
    """

    source: str
    launches: int
    te: int = 0
    tk: int = 0
    t: int = 0
    th: int = 0
    rh: int = 0


# Read from Megatron-Core 0.19.2 (megatron/core/transformer/moe/; moe_utils.py where no file is
# named) and Transformer Engine at d0067d0 (transformer_engine/common/): softmax before the
# selection, fp32, z-loss and balancing loss on, no bias, no groups, no padding. These are lower
# bounds: an operation of torch that takes several passes counts as one, and what TE clears and then
# writes again counts once.
Z_LOSS = Step("z-loss: logsumexp, square, mean (:162-175)", 3, te=4, t=16)
Z_LOSS_BACKWARD = Step("logsumexp (:162)", 1, te=8)
GRADIENT_SUMS = Step("two sums of three gradients of the logits (autograd)", 2, te=24)
COUNTS = Step("routing_map.sum(0) (token_dispatcher.py:537)", 1, te=1)
MEGATRON = {
    "router forward": (
        Z_LOSS,
        Step("softmax (:841)", 1, te=8),
        Step("topk (:823)", 1, te=4, tk=12),
        Step("probabilities: zeros_like, copy, scatter (:893)", 3, te=12, tk=16),
        Step("map: zeros_like, int, copy, scatter, bool (:894)", 5, te=25, tk=12),
        Step("softmax for the balancing loss (:936)", 1, te=8),
        Step("its topk (:946)", 1, te=4, tk=12),
        Step("its map (:947)", 5, te=25, tk=12),
        Step("tokens per expert (:271)", 1, te=1),
        Step("sum of scores, product with counts (:139-142)", 4, te=4),
    ),
    "router backward": (
        Z_LOSS_BACKWARD,
        Step("gather for the scatter (:893)", 1, tk=16),
        Step("zeros, scatter for topk (:823)", 2, te=4, tk=16),
        Step("softmax (:841)", 1, te=12),
        Step("softmax for the balancing loss; its gradient is one row (:936)", 1, te=8),
        GRADIENT_SUMS,
    ),
    "plan": (
        COUNTS,
        Step("transposed map (:452)", 1, te=2),
        Step("stable argsort: flags in; flags and int64 positions out (:457)", 1, te=10),
        Step("remainder (:459)", 1, tk=16),
    ),
    "permute": (
        Step("transposed probabilities, index (:462)", 2, te=8, tk=16),
        Step("index_select (:465)", 1, tk=8, th=1, rh=1),
    ),
    "permute backward": (
        Step("zeros, index_put for the index (:462)", 2, te=4, tk=16),
        Step("zeros, index_add for index_select (:465)", 2, tk=8, th=3, rh=1),
    ),
    "unpermute": (Step("zeros, scatter_add (:552-568)", 2, tk=8, th=3, rh=1),),
    "unpermute backward": (Step("gather (:566)", 1, tk=8, th=1, rh=1),),
}
TRANSFORMER_ENGINE = {
    "router forward": (
        Z_LOSS,  # Megatron's: never fused
        Step("fused_router/fused_topk_with_score_function.cu:153-189, 311-320", 1, te=13),
        Step("fused_router/fused_score_for_moe_aux_loss.cu:59-139", 1, te=13),
        Step("tokens per expert (Megatron, :271)", 1, te=1),
        Step("fused_router/fused_moe_aux_loss.cu:36-53, 106-117", 2, te=4),
    ),
    "router backward": (
        Z_LOSS_BACKWARD,
        Step("fused_router/fused_topk_with_score_function.cu:1286-1450", 1, te=13),
        Step("fused_router/fused_score_for_moe_aux_loss.cu:461-512, gradient out", 1, te=12),
        Step("fused_router/fused_moe_aux_loss.cu:229-248", 1, te=4),
        GRADIENT_SUMS,
    ),
    "plan": (
        COUNTS,
        Step("triton/permutation.py:112-124, pass 1", 1, te=5),
        Step("triton/permutation.py:145-162, pass 2", 1, te=8),
        Step("triton/permutation.py:179-202, pass 3", 1, te=4, tk=8, t=4),
    ),
    "permute": (Step("triton/permutation.py:259-303", 1, tk=16, t=4, th=1, rh=1),),
    "permute backward": (
        Step("triton/permutation.py:359-416, with probabilities", 1, te=4, tk=16, t=4, th=1, rh=1),
    ),
    "unpermute": (Step("triton/permutation.py:371-416", 1, tk=4, t=4, th=1, rh=1),),
    "unpermute backward": (Step("triton/permutation.py:259-303", 1, tk=4, t=4, th=1, rh=1),),
}


def traffic() -> Iterator[tuple[str, dict[str, float]]]:
    """Bytes of each operation at each size: ours, the least, Megatron's and TE's, and what follows.

    ``…_us`` is the time that the bytes take at the memory's bandwidth: computed, not measured.
    """
    for preset, (experts, k, k_max) in PRESETS.items():
        for tokens in TOKENS:
            for name, ours, minimum in router(tokens, experts, k_max):
                others = (name.removesuffix(", two launches"), tokens, experts, k, 0)
                yield f"{name}: {preset}, T={tokens}", compare(ours, minimum, *others)
            for hidden in HIDDEN:
                at = f"{preset}, T={tokens}, H={hidden}"
                sizes = (tokens, experts, k, hidden)
                for name, ours, minimum in rows(*sizes, k_max):
                    yield f"{name}: {at}", compare(ours, minimum, name, *sizes[:3], hidden)
                planned = plan.moved_bytes(tokens, k_max, experts)
                least = plan.minimum_bytes(tokens, k_max, experts)
                row = compare(planned, least, "plan", *sizes[:3], hidden)
                moved = permutation.minimum_bytes(tokens, tokens * k, hidden, ITEMSIZE)
                yield f"plan: {at}", row | {"share_of_permutation": round(planned / moved, 5)}


def router(tokens: int, experts: int, k_max: int) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and least bytes of the router's passes."""
    sizes = (tokens, experts, k_max)
    minimum = routing_bytes.forward_minimum(*sizes)
    yield "router forward", routing_bytes.forward(*sizes), minimum
    yield "router forward, two launches", routing_bytes.forward(*sizes, launches=2), minimum
    yield "router backward", routing_bytes.backward(*sizes), routing_bytes.backward_minimum(*sizes)


def rows(
    tokens: int, experts: int, k: int, hidden: int, k_max: int
) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and least bytes of what moves rows."""
    chosen = tokens * k
    minimum = permutation.minimum_bytes(tokens, chosen, hidden, ITEMSIZE)
    for name, options in (
        ("permute", {"num_experts": experts}),
        ("permute backward", {"backward": True}),
        ("unpermute", {"probs": False}),
        ("unpermute backward", {"probs": False}),
    ):
        moved = permutation.moved_bytes(tokens, k_max, chosen, hidden, ITEMSIZE, **options)
        yield name, moved, minimum


def compare(
    ours: int, minimum: int, name: str, tokens: int, experts: int, k: int, hidden: int
) -> dict[str, float]:
    """A row of the report: all that is known of an operation at one size."""
    sizes = {"te": tokens * experts, "tk": tokens * k, "t": tokens}
    sizes |= {"th": tokens * hidden * ITEMSIZE, "rh": tokens * k * hidden * ITEMSIZE}
    result: dict[str, float] = {"minimum": minimum, "ours": ours, "ratio": round(ours / minimum, 4)}
    for other, steps in (("megatron", MEGATRON[name]), ("te", TRANSFORMER_ENGINE[name])):
        result[other] = sum(getattr(step, unit) * n for step in steps for unit, n in sizes.items())
    times = {
        f"{who}_us": round(result[who] / BANDWIDTH * 1e6, 2) for who in ("ours", "megatron", "te")
    }
    return result | times


class Counter(TorchDispatchMode):
    """Counts launches: of the kernels, which it stands in for, and of torch's operations.

    Nothing is computed: outputs stay as they were allocated.
    """

    arg_names = ()  # a kernel's, by which its launch chooses constants

    def __init__(self) -> None:
        super().__init__()
        self.count = {"kernels": 0, "torch_operations": 0, "host_syncs": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.count["host_syncs"] += 1
        elif not func.is_view and "empty" not in name:
            self.count["torch_operations"] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self.count["kernels"] += 1

    def waiting(self, name: str) -> Callable[..., Any]:
        """A method of tensors that on a CPU dispatches nothing, and on a GPU waits for it."""
        original = getattr(torch.Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.count["host_syncs"] += 1
            return original(*args, **kwargs)

        return method


def launches() -> dict[str, dict[str, int]]:
    """Launches of each public function, by calling it with kernels that only count."""
    tokens, experts, k_max, hidden = 64, 8, 4, 16
    logits_TE = torch.randn(tokens, experts, requires_grad=True)
    hidden_TH = torch.randn(tokens, hidden, requires_grad=True)
    # On a GPU the workspace is kept from one launch to the next.
    workspace = torch.zeros(3 + experts, dtype=torch.int32), torch.zeros(1 + experts).long()
    settings: dict[str, Any] = {
        "width": k_max,
        "budget": routing.Budget(1.0, 2.0, 1, k_max),
        "mask": routing.Mask(0.0, 1.0),
    }
    result = {}

    def counted(name: str, call: Callable[[], Any]) -> Any:
        counter = Counter()
        with ExitStack() as stack:
            for op in (routing_op, plan_op, permutation_op):
                stack.enter_context(mock.patch.object(op, "resolve", return_value="triton"))
            stack.enter_context(mock.patch.object(routing_op, "_workspace", return_value=workspace))
            for kernels, names in (
                (routing_kernel, ("forward", "backward")),
                (plan_kernel, ("count_kernel", "rank_kernel")),
                (permutation_kernel, ("scatter_rows", "gather_rows")),
            ):
                for kernel in names:
                    stack.enter_context(mock.patch.object(kernels, kernel, counter))
            for name_of_method in ("cpu", "tolist"):
                method = counter.waiting(name_of_method)
                stack.enter_context(mock.patch.object(torch.Tensor, name_of_method, method))
            with counter:
                value = call()
        result[name] = counter.count
        return value

    def gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], Any]:
        ones = [torch.ones_like(output) for output in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, ones)

    def two_passes() -> Any:
        return routing.route(logits_TE, measured=routing.measure_tokens(logits_TE), **settings)

    def permuted(routed: routing.Routed, planned: plan.Plan) -> tuple[torch.Tensor, torch.Tensor]:
        return permutation.begin_permute(
            hidden_TH,
            routed.probs_TK,
            planned.row_id_TK,
            planned.tokens_per_expert_E,
            tokens * k_max,
        ).take(tokens * 2)

    def everything() -> Any:
        routed = routing.route(logits_TE, **settings)
        return permuted(routed, plan.plan(routed.index_TK, experts))

    routed = counted("router forward", lambda: routing.route(logits_TE, **settings))
    counted("router forward, two launches", two_passes)
    differentiable = [routed.probs_TK, routed.weighted_GE, routed.lse_T]
    counted("router backward", gradients(differentiable, [logits_TE]))
    planned = counted("plan", lambda: plan.plan(routed.index_TK, experts))
    probs_TK = routed.probs_TK.detach().requires_grad_()
    leaf = dataclasses.replace(routed, probs_TK=probs_TK)
    rows_RH, probs_R = counted("permute", lambda: permuted(leaf, planned))
    counted("permute backward", gradients([rows_RH, probs_R], [hidden_TH, probs_TK]))
    leaf_RH = rows_RH.detach().requires_grad_()
    out_TH = counted("unpermute", lambda: permutation.unpermute(leaf_RH, planned.row_id_TK))
    counted("unpermute backward", gradients([out_TH], [leaf_RH]))
    counted("logits to permuted rows", everything)
    return result


def least_launches(name: str) -> tuple[int, int]:
    """Launches of Megatron and of TE for an operation that :func:`launches` counts, at least."""
    name = name.removesuffix(", two launches")
    parts = ("router forward", "plan", "permute") if name == "logits to permuted rows" else (name,)
    megatron, te = (
        sum(step.launches for part in parts for step in steps[part])
        for steps in (MEGATRON, TRANSFORMER_ENGINE)
    )
    return megatron, te
