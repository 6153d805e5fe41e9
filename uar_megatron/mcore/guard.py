"""Ranks that share a layer must agree on its routing state, or they train on garbage or hang."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, TrainingError
from uar_megatron.mcore.router import UARRouter

_REMEDY = (
    "resume from the last checkpoint; if it happens again at the same place, look for code that "
    "changes a router on some ranks only, else for a faulty device on the ranks named"
)

_NOT_SET = "not set"


def check_same_section(uar: UARConfig) -> None:
    """Refuse to start where ranks have read different UAR sections; a collective over all ranks.

    Raises:
        ConfigError: on every rank, naming the fields that differ and who has which value.
    """
    text = json.dumps(uar.model_dump(mode="json"), sort_keys=True)
    codes = torch.tensor(list(text.encode()), dtype=torch.int64, device=torch.cuda.current_device())
    if not len(_differing(_fingerprint(codes).unsqueeze(0), None)):
        return
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    fields = [dict(_leaves(json.loads(other), "uar")) for other in texts]
    # A field may be there on some ranks only: a section against null.
    names = dict.fromkeys(name for found in fields for name in found)
    differing = (n for n in names if len({repr(f.get(n, _NOT_SET)) for f in fields}) > 1)
    name = next(differing)
    values = {rank: f.get(name, _NOT_SET) for rank, f in enumerate(fields)}
    raise ConfigError(
        name,
        f"differs between ranks: {_by_value(values)}",
        allowed="one value on all ranks",
        remedy="start every node with the same files and overrides",
    )


class ConsistencyGuard:
    """Compares routing state between the ranks that share layers, every ``interval`` steps.

    Compared are the router's weight, Megatron's expert bias and all ``uar_`` state, bit by bit, by
    one checksum per tensor: two small all-reduces and one wait for the device per comparison.

    Args:
        interval: optimizer steps between comparisons, the first step among them; 0 for never.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._steps = 0

    @torch.no_grad()
    def on_step(self, routers: list[UARRouter], iteration: Callable[[], int]) -> None:
        """Compare if it is time to; a collective over all ranks.

        Args:
            routers: this rank's, perhaps none.
            iteration: tells the optimizer step, for the message.

        Raises:
            TrainingError: on every rank. Those whose pipeline stage disagrees name the first tensor
                that differs, the ranks and their values.
        """
        self._steps += 1
        if not self.interval or (self._steps - 1) % self.interval:
            return
        difference = self._difference(routers) if routers else None
        bad = torch.tensor([int(difference is not None)], device=torch.cuda.current_device())
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            what = difference or "ranks of another pipeline stage do not agree on its routers"
            raise TrainingError(f"step {iteration()}: {what}\n  remedy:  {_REMEDY}")

    def _difference(self, routers: list[UARRouter]) -> str | None:
        named = [(router, name, value) for router in routers for name, value in _state(router)]
        group = routers[0].tp_dp_cp_group
        differing = _differing(torch.stack([_fingerprint(value) for *_, value in named]), group)
        if not len(differing):
            return None
        router, name, value = named[int(differing[0])]
        # The element that is furthest apart tells most; bits that differ may be a NaN's.
        flat = value.flatten().double()
        highest, lowest = flat.clone(), flat.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
        place = int((highest - lowest).nan_to_num(nan=torch.inf).argmax())
        values = [torch.empty_like(flat[place]) for _ in range(group.size())]
        dist.all_gather(values, flat[place].clone(), group=group)
        ranks = dist.get_process_group_ranks(group)
        found = {rank: float(v) for rank, v in zip(ranks, values, strict=True)}
        return (
            f"ranks do not agree on {name}[{place}] of layer {router.layer_number}: "
            f"{_by_value(found)} ({len(differing)} of {len(named)} tensors differ)"
        )


def _state(router: UARRouter) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that must be the same on all ranks of a router."""
    yield "weight", router.weight
    for name, buffer in router.state_dict(keep_vars=True).items():
        if name == "expert_bias" or name.startswith("uar_"):
            yield name, buffer


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of a tensor's bits and their places, int64 scalar; integer sums wrap around."""
    of_size = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    bits = tensor.detach().reshape(-1).view(of_size[tensor.element_size()]).long()
    places = torch.arange(len(bits), device=bits.device)
    # Mixed first: in a plain weighted sum the sign bits of some entries cancel.
    mixed = (bits + places) * 0x2545F4914F6CDD1D
    mixed = mixed ^ (mixed >> 29)
    return (mixed * (2 * places + 1)).sum()


def _differing(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Indices at which an int64 vector is not the same on all ranks of a group."""
    # ~x falls as x rises, so that one reduction finds both extremes.
    extremes = torch.cat((values, ~values))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, inverted_lowest = extremes.chunk(2)
    return (highest != ~inverted_lowest).nonzero().flatten()


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def _by_value(values: Mapping[int, object]) -> str:
    """``rank → value`` as '0.5 on ranks 0, 1; 0.6 on rank 2', at most eight ranks of each."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(repr(value), []).append(rank)
    return "; ".join(
        f"{value} on rank{'s' * (len(who) > 1)} "
        + ", ".join(map(str, who[:8]))
        + ("…" if len(who) > 8 else "")
        for value, who in ranks.items()
    )
