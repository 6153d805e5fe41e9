"""`uar report`: page, summary and figures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uar_megatron.errors import ConfigError
from uar_megatron.experiment import check_writable
from uar_megatron.reporting.figures import write_figures
from uar_megatron.reporting.html import render
from uar_megatron.reporting.summary import read_unigram, replace_text, write_summary
from uar_megatron.reporting.view import load_views


@dataclass(frozen=True)
class Written:
    """What a report wrote.

    Attributes:
        text: the summary.
        lines: the files, and why figures were left out.
    """

    text: str
    lines: list[str]


def write_report(
    runs: Sequence[Path], output: Path | None = None, manifest: Path | None = None
) -> Written:
    """Write the report of one or several runs.

    Args:
        runs: folders of runs, or run logs.
        output: the page. ``report.html`` or ``comparison.html`` in the first run's folder if None.
        manifest: ``manifest.json`` of the corpus, whose unigram perplexities are compared with.

    Raises:
        UARError: a run has no log or one of a newer schema, the manifest cannot be read, the page
            cannot be written there, or the ``plots`` extra is not installed.
    """
    if output is not None and (output.suffix != ".html" or output.is_dir()):
        raise ConfigError(
            "--output",
            f"{output} is no place for a page",
            allowed="a file whose name ends in .html",
            remedy=f"--output {output.with_suffix('') / 'report.html'}",
        )
    views = load_views(runs)
    unigram = read_unigram(manifest) if manifest else None
    folder = views[0].path.parent
    page = output or folder / ("report.html" if len(views) == 1 else "comparison.html")
    # The usual page of a run has a summary and figures beside it; others carry the page's name.
    usual = page.name == "report.html"
    name, figures = ("summary", "figures") if usual else (page.stem, f"{page.stem}_figures")
    check_writable("--output", page.parent)
    replace_text(page, render(views, unigram))
    text = write_summary(views, page.parent, name, unigram)
    written, left_out = write_figures(views, page.parent / figures)
    lines = [str(page), *map(str, written)]
    lines += [f"not drawn: {figure}: {reason}" for figure, reason in left_out.items()]
    return Written(text, lines)
