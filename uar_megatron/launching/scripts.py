"""The scripts of ``launch/``, and their copies with settings filled in."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

Setting = str | int | Sequence[str]


def script_dir() -> Path:
    """The scripts that come with the package: inside a wheel, else the repository's."""
    packaged = Path(__file__).parents[1] / "launch"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "launch"


def fill_in(
    template: str, directives: Mapping[str, str | None], settings: Mapping[str, Setting]
) -> str:
    """Return a batch script with its ``#SBATCH`` lines and its settings replaced.

    Args:
        template: the text of ``slurm.sbatch``.
        directives: options of sbatch without their dashes; None for one that takes no value. An
            option that has no line gets one after the others. Values are quoted as sbatch reads
            them.
        settings: values of ``name=value`` lines; a sequence becomes an array.
    """
    for name, value in directives.items():
        line = f"#SBATCH --{name}" + ("" if value is None else f"={_quoted_for_sbatch(value)}")
        template, count = re.subn(
            rf"^#SBATCH --{re.escape(name)}(=.*)?$", _literally(line), template, flags=re.M
        )
        if not count:
            last = list(re.finditer(r"^#SBATCH .*$", template, flags=re.M))[-1].end()
            template = f"{template[:last]}\n{line}{template[last:]}"
    for name, setting in settings.items():
        template, count = re.subn(
            rf"^{name}=.*$", _literally(f"{name}={_quoted(setting)}"), template, flags=re.M
        )
        assert count == 1, f"{count} lines of the script set {name}"
    return template


def write_script(path: Path, text: str) -> None:
    """Write an executable script, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o755)
    temporary.replace(path)


def _quoted(setting: Setting) -> str:
    if isinstance(setting, str | int):
        return shlex.quote(str(setting))
    if not setting:
        return "()"
    return "(\n" + "".join(f"  {shlex.quote(word)}\n" for word in setting) + ")"


def _quoted_for_sbatch(value: str) -> str:
    """sbatch splits at blanks and takes ``#`` for a comment, but reads quotes and backslashes."""
    if not re.search(r"[\s\"'#\\]", value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def _literally(text: str) -> str:
    """A replacement for ``re.sub`` in which backslashes mean themselves."""
    return text.replace("\\", r"\\")
