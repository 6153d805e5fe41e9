"""Write the configuration reference of README.md from the docstrings of the configuration.

``python scripts/config_reference.py`` rewrites the block between the markers; with ``--check`` it
only says whether the block is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from uar_megatron.config import Section, UARConfig
from uar_megatron.experiment import LaunchConfig, RunConfig

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- config reference -->\n).*?(<!-- end -->)", re.DOTALL)


def reference() -> str:
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
        default = "null" if field.default is None else str(field.default)
        rows.append(f"| `{prefix}.{name}` | `{default}` | {meaning} |")
    return rows


def main() -> None:
    """Rewrite or check the block."""
    text = README.read_text(encoding="utf-8")
    fresh = BLOCK.sub(lambda match: match[1] + reference() + match[2], text)
    if "--check" not in sys.argv:
        README.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        sys.exit("README.md: the configuration reference is old; run scripts/config_reference.py")


if __name__ == "__main__":
    main()
