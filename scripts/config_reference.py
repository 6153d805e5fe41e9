"""Write the generated parts of README.md: configuration, Megatron's options, toy replication.

``python scripts/config_reference.py`` rewrites the blocks between their markers; with ``--check``
it only says whether they are up to date.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

# Beside this file, which is where a script's imports are looked for first.
import replicate_section  # type: ignore[import-not-found]

from uar_megatron.config import Schedule, Section, UARConfig
from uar_megatron.experiment import LaunchConfig, RunConfig
from uar_megatron.mcore import cpu

README = Path(__file__).resolve().parents[1] / "README.md"


def configuration() -> str:
    """Return the table of every field of our sections."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    sections: dict[str, type[Section]] = {
        "uar": UARConfig,
        "run": RunConfig,
        "launch": LaunchConfig,
    }
    for name, section in sections.items():
        rows += _rows(name, section)
    return "\n".join(rows) + "\n"


def _rows(prefix: str, section: type[Section]) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            rows += _rows(f"{prefix}.{name}", type(field.default))
            continue
        meaning = " ".join((field.description or "").split())
        if get_origin(field.annotation) is Literal:
            choices = ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
            meaning = f"{choices}. {meaning}"
        elif _is_per_layer(field.annotation):
            meaning = f"Number, list, or schedule. {meaning}"
        default = "null" if field.default is None else str(field.default)
        rows.append(f"| `{prefix}.{name}` | `{default}` | {meaning} |")
    return rows


def _is_per_layer(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_per_layer(argument) for argument in get_args(annotation))
    arguments = get_args(annotation)
    return annotation is Schedule or any(_is_per_layer(argument) for argument in arguments)


def megatron_options() -> str:
    """Return the table of Megatron's options that touch routing."""
    if not cpu.is_enabled():
        cpu.enable()
    from uar_megatron.mcore.options import OPTIONS

    verdicts = {"never": "supported", "variable k": "refused with a variable k"}
    verdicts |= {"acting": "refused when UAR is on", "always": "refused"}
    rows = ["| Megatron's arguments | | remarks |", "|---|---|---|"]
    for option in OPTIONS:
        names = ", ".join(f"`{name}`" for name in option.names)
        value = f" = {option.value}" if option.value else ""
        remarks = "; ".join(filter(None, (option.note, option.remedy))).replace("|", "\\|")
        rows.append(f"| {names}{value} | {verdicts[option.refused]} | {remarks} |")
    return "\n".join(rows) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "config reference": configuration,
    "megatron options": megatron_options,
    replicate_section.BLOCK: replicate_section.text,
}


def main() -> None:
    """Rewrite or check the blocks."""
    text = fresh = README.read_text(encoding="utf-8")
    for name, table in BLOCKS.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        # Backslashes in a table are not the pattern's.
        content = table().replace("\\", r"\\")
        fresh = block.sub(rf"\g<1>{content}\g<2>", fresh)
    if "--check" not in sys.argv:
        README.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        sys.exit("README.md: a generated table is old; run scripts/config_reference.py")


if __name__ == "__main__":
    main()
