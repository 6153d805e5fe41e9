"""From configuration to Megatron's arguments, and what of them goes together with UAR."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from uar_megatron.config import UARConfig, nearest
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.compat import add_megatron_arguments

_OURS = {
    "spec": "the layer spec is what this plugin provides",
    "yaml_cfg": "Megatron's YAML mode bypasses its argument checks; write the arguments here",
}


@functools.cache
def megatron_parser() -> argparse.ArgumentParser:
    """Return a parser of every argument of the installed Megatron."""
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))


def to_argv(megatron: Mapping[str, Any]) -> list[str]:
    """Compile Megatron arguments, given by name, to its command line.

    A key is an argument's destination (``bias_swiglu_fusion: false``) or its option
    (``no_bias_swiglu_fusion: true``), with underscores or dashes. ``null`` leaves the default.

    Raises:
        ConfigError: unknown key, a value of the wrong type or not among the choices, one argument
            given twice, or one that the plugin sets itself.
    """
    argv: list[str] = []
    given: dict[str, str] = {}
    for key, value in megatron.items():
        name = key.replace("-", "_")
        if name in _OURS:
            raise ConfigError(key, f"cannot be set here: {_OURS[name]}", remedy="remove it")
        if value is None:
            continue
        actions = _actions(key, name)
        dest = actions[0].dest
        if dest in given:
            raise ConfigError(
                key,
                f"the same Megatron argument is already set by '{given[dest]}'",
                remedy="keep one of the two",
            )
        given[dest] = key
        argv += _words(key, name, value, actions)
    return argv


@functools.cache
def _index() -> tuple[dict[str, list[argparse.Action]], dict[str, argparse.Action]]:
    """Actions by destination, and by option name."""
    by_dest: dict[str, list[argparse.Action]] = {}
    by_option: dict[str, argparse.Action] = {}
    for action in megatron_parser()._actions:
        by_dest.setdefault(action.dest, []).append(action)
        for option in action.option_strings:
            by_option[option.lstrip("-").replace("-", "_")] = action
    return by_dest, by_option


def _actions(key: str, name: str) -> list[argparse.Action]:
    by_dest, by_option = _index()
    if name in by_dest:
        return by_dest[name]
    if name in by_option:
        return [by_option[name]]
    known = {*by_dest, *by_option, "uar", "run", "launch"}
    raise ConfigError(
        key,
        "neither a Megatron argument nor a section of ours",
        remedy=nearest(name, known) or "see the configuration reference in the README",
    )


def _words(key: str, name: str, value: Any, actions: list[argparse.Action]) -> list[str]:
    by_dest, _ = _index()
    switches = [a for a in actions if a.nargs == 0]
    if switches and (len(switches) == len(actions) or isinstance(value, bool)):
        return _switch(key, value, switches, by_destination=name in by_dest)
    action = next(a for a in actions if a.nargs != 0)
    flag = max(action.option_strings, key=len)
    if isinstance(action, argparse.BooleanOptionalAction):
        return _switch(key, value, [action], by_destination=True)
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    values = value if isinstance(value, list) else [value]
    if many:
        for item in values:
            _check(key, item, action)
        return [flag, *(_text(item) for item in values)]
    if isinstance(value, list):
        # e.g. moe_layer_freq: [0, 1, 1], which Megatron reads from a string
        value = str(value).replace(" ", "")
    _check(key, value, action)
    return [f"{flag}={_text(value)}"]


def _switch(
    key: str, value: Any, actions: list[argparse.Action], *, by_destination: bool
) -> list[str]:
    """A flag without a value: written out when it brings the destination to ``value``."""
    if isinstance(actions[0], argparse.BooleanOptionalAction):
        options = actions[0].option_strings
        wanted = _as_bool(key, value)
        return [next(o for o in options if o.startswith("--no-") != wanted)]
    constants = {getattr(a, "const", None): a for a in actions}
    if not by_destination:
        return [actions[0].option_strings[-1]] if _as_bool(key, value) else []
    if set(constants) <= {True, False}:
        wanted = _as_bool(key, value)
        if wanted in constants:
            return [constants[wanted].option_strings[-1]]
        return []  # the opposite of the only flag is the default
    if value in constants:
        return [constants[value].option_strings[-1]]
    raise ConfigError(key, f"{value!r} is not allowed", allowed=", ".join(map(str, constants)))


def _as_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(key, f"{value!r} is not allowed", allowed="true, false")


def _check(key: str, value: Any, action: argparse.Action) -> None:
    """Convert as argparse will, so that a bad value is refused under its own name."""
    kind = action.type if callable(action.type) else str
    text = _text(value)
    name = getattr(kind, "__name__", str(kind))
    if isinstance(value, bool) and kind in (int, float):
        raise ConfigError(key, f"{value!r} is not allowed", allowed=name)
    if isinstance(value, dict):
        raise ConfigError(key, "a Megatron argument is a value, not a section")
    try:
        converted = kind(text)
    except KeyError as error:  # an enumeration, which is read by name
        raise _not_a_choice(key, value, action) from error
    except (ValueError, TypeError, argparse.ArgumentTypeError, AssertionError) as error:
        detail = f" ({error})" if isinstance(error, argparse.ArgumentTypeError) else ""
        raise ConfigError(key, f"{value!r} is not allowed{detail}", allowed=name) from error
    if action.choices is not None and converted not in action.choices:
        raise _not_a_choice(key, value, action)


def _not_a_choice(key: str, value: Any, action: argparse.Action) -> ConfigError:
    choices = [str(getattr(choice, "name", choice)) for choice in action.choices or ()]
    return ConfigError(
        key,
        f"{value!r} is not allowed",
        allowed=", ".join(choices) or None,
        remedy=nearest(_text(value), choices),
    )


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


class _Rule(NamedTuple):
    """A combination that is refused."""

    applies: Callable[[UARConfig, Any], object]
    field: str
    reason: str
    remedy: str


def _variable(uar: UARConfig, args: Any) -> bool:
    """Whether tokens may get another number of experts than ``moe_router_topk``."""
    return uar.policy == "uar" and uar.budget.constant_k() != args.moe_router_topk


def _unstock(uar: UARConfig, args: Any) -> bool:
    """Whether the routing is not Megatron's own."""
    return uar.policy != "topk" or uar.clb.enabled or uar.bias.enabled


def _loss_types(args: Any) -> list[str]:
    types = args.moe_router_load_balancing_type
    return list(types) if isinstance(types, list | tuple) else [types]


def _has_aux_loss(args: Any) -> bool:
    coeff = args.moe_aux_loss_coeff
    coeffs = coeff if isinstance(coeff, list | tuple) else [coeff] * len(_loss_types(args))
    return any(t == "aux_loss" and c > 0 for t, c in zip(_loss_types(args), coeffs, strict=False))


_TABLE_NOT_YET = "use a plain top-k policy (uar.policy=topk without clb and bias) with this option"

RULES = (
    _Rule(
        lambda uar, args: _experts(args) is None,
        "num_experts",
        "the model has no experts to route to",
        "set num_experts, or train without this plugin",
    ),
    _Rule(
        lambda uar, args: uar.policy == "uar" and uar.budget.k_max > (_experts(args) or 0),
        "uar.budget.k_max",
        "k_max is larger than the number of experts",
        "lower uar.budget.k_max to num_experts or less",
    ),
    _Rule(
        lambda uar, args: (
            _variable(uar, args) and args.moe_token_dispatcher_type not in ("alltoall", "allgather")
        ),
        "moe_token_dispatcher_type",
        "this dispatcher assumes the same number of experts for every token",
        "use moe_token_dispatcher_type=alltoall (or allgather)",
    ),
    _Rule(
        lambda uar, args: _unstock(uar, args) and args.moe_expert_capacity_factor is not None,
        "moe_expert_capacity_factor",
        "token dropping is not supported together with uncertainty-aware routing",
        "remove moe_expert_capacity_factor",
    ),
    _Rule(
        lambda uar, args: _unstock(uar, args) and args.moe_router_padding_for_quantization,
        "moe_router_padding_for_quantization",
        "padding the routing map is not supported together with uncertainty-aware routing",
        "remove moe_router_padding_for_quantization",
    ),
    _Rule(
        lambda uar, args: (
            (_variable(uar, args) or uar.bias.enabled)
            and (args.moe_router_num_groups or args.moe_router_group_topk)
        ),
        "moe_router_group_topk",
        "group-limited selection is not supported with a variable k or with our bias",
        _TABLE_NOT_YET,
    ),
    _Rule(
        lambda uar, args: _unstock(uar, args) and args.moe_router_fusion,
        "moe_router_fusion",
        "the fused router computes a fixed top-k and its own losses",
        "remove moe_router_fusion",
    ),
    _Rule(
        lambda uar, args: _unstock(uar, args) and args.moe_enable_routing_replay,
        "moe_enable_routing_replay",
        "routing replay records a fixed top-k",
        _TABLE_NOT_YET,
    ),
    _Rule(
        lambda uar, args: (
            _unstock(uar, args) and {"sinkhorn", "quantile_balancing"} & set(_loss_types(args))
        ),
        "moe_router_load_balancing_type",
        "sinkhorn and quantile balancing choose experts in their own way",
        "use aux_loss or none, or a plain top-k policy",
    ),
    _Rule(
        lambda uar, args: (
            (_variable(uar, args) or uar.clb.enabled or uar.bias.enabled)
            and {"seq_aux_loss", "global_aux_loss"} & set(_loss_types(args))
        ),
        "moe_router_load_balancing_type",
        "seq_aux_loss and global_aux_loss are not supported with a variable k, CLB or our bias yet",
        "use aux_loss or none",
    ),
    _Rule(
        lambda uar, args: uar.clb.enabled and not (_has_aux_loss(args) or uar.bias.enabled),
        "uar.clb.enabled",
        "there is nothing to calibrate: no auxiliary loss and no bias",
        "set moe_aux_loss_coeff above 0 with moe_router_load_balancing_type=aux_loss, or "
        "uar.bias.enabled=true",
    ),
    _Rule(
        lambda uar, args: uar.bias.enabled and args.moe_router_enable_expert_bias,
        "uar.bias.enabled",
        "Megatron's own expert bias is on as well",
        "keep one: remove moe_router_enable_expert_bias, or set uar.bias.enabled=false",
    ),
    _Rule(
        lambda uar, args: _variable(uar, args) and args.moe_router_enable_expert_bias,
        "moe_router_enable_expert_bias",
        "Megatron's expert bias is applied inside its fixed top-k",
        "use uar.bias.enabled=true instead, which works with a variable k",
    ),
    _Rule(
        lambda uar, args: (
            _unstock(uar, args) and getattr(args, "cuda_graph_impl", "none") != "none"
        ),
        "cuda_graph_impl",
        "the number of dispatched rows changes from step to step",
        "set cuda_graph_impl=none",
    ),
    _Rule(
        lambda uar, args: getattr(args, "transformer_impl", "local") == "inference_optimized",
        "transformer_impl",
        "the inference-optimized layers have a router of their own",
        "use transformer_impl=transformer_engine or local",
    ),
    _Rule(
        lambda uar, args: (
            _variable(uar, args) and getattr(args, "overlap_moe_expert_parallel_comm", False)
        ),
        "overlap_moe_expert_parallel_comm",
        "the overlapped schedule has not been tested with a variable k",
        "remove overlap_moe_expert_parallel_comm",
    ),
)


def _experts(args: Any) -> int | None:
    """E, under the name of Megatron's arguments or of its TransformerConfig."""
    return args.num_experts if hasattr(args, "num_experts") else args.num_moe_experts


def check_compatible(uar: UARConfig, args: Any) -> None:
    """Refuse combinations that cannot work, or are not supported yet.

    Args:
        uar: the UAR section.
        args: Megatron's parsed arguments, or a ``TransformerConfig``.

    Raises:
        ConfigError: the first rule of :data:`RULES` that applies.
    """
    for rule in RULES:
        if rule.applies(uar, args):
            raise ConfigError(rule.field, rule.reason, remedy=rule.remedy)
