"""`make replicate`: the paper's Tables 2 and 3 at demo scale, and the README's section on them.

What is finished already is not done again: stop it and call it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

# Beside this file, which is where a script's imports are looked for first.
import replicate_section as section  # type: ignore[import-not-found]
import typer

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError
from uar_megatron.precheck import check_experiments
from uar_megatron.sweep.command import run_sweep
from uar_megatron.sweep.grid import expand
from uar_megatron.sweep.measure import measure


def main(
    jobs: Annotated[int, typer.Option(min=1, help="trainings at a time")] = 2,
) -> None:
    """Build the corpus if it is missing, train every point, rewrite the README's section."""
    os.chdir(section.ROOT)
    # Now, not in an hour.
    if f"<!-- {section.BLOCK} -->" not in (section.ROOT / "README.md").read_text("utf-8"):
        raise UARError("README.md: has no lines `<!-- replicate -->` and `<!-- end -->` to fill")
    subprocess.run([sys.executable, "scripts/demo_corpus.py"], check=True)
    code = run_sweep(section.GRID, check_experiments, jobs=jobs)
    if code:
        raise typer.Exit(code)
    report(section.GRID, section.POINTS, section.FIGURE)
    subprocess.run([sys.executable, "scripts/config_reference.py"], check=True)


def report(grid: Path, points_file: Path, figure: Path) -> None:
    """Store the numbers of a finished sweep and draw them."""
    points = measure(expand(grid))
    section.save_points(points, points_file)
    section.draw(points, figure, grid)
    print(f"{points_file}\n{figure}")


if __name__ == "__main__":
    run_command(main)
