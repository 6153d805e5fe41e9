"""From configuration to Megatron's command line, with errors under the key's own name."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from uar_megatron.config import nearest
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


def destination(key: str) -> str:
    """The Megatron argument that a key sets, by its destination.

    Raises:
        ConfigError: there is none.
    """
    return str(_actions(key, key.replace("-", "_"))[0].dest)


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
