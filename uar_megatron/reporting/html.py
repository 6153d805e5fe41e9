"""The report: one HTML page that needs nothing but itself. Needs the ``plots`` extra."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uar_megatron.errors import UARError
from uar_megatron.reporting.page_data import SIGNALS, STEPS, page_data
from uar_megatron.reporting.runlog import RUN_LOG
from uar_megatron.reporting.summary import summarise
from uar_megatron.reporting.view import View

_PAGE = Path(__file__).parent / "page"


def render(views: Sequence[View], unigram: dict[str, float] | None = None) -> str:
    """Return the page for one or several runs.

    Args:
        views: the runs.
        unigram: perplexity of a unigram model of the training data on each validation set.

    Raises:
        UARError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise UARError(
            "the report needs jinja2\n  remedy:  pip install 'uar-megatron[plots]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    environment.filters["percent"] = lambda value: f"{value:.0%}"
    summaries = [summarise(view.run, unigram) for view in views]
    script = "\n".join((_PAGE / name).read_text("utf-8") for name in ("charts.js", "page.js"))
    return environment.get_template("report.html.j2").render(
        title=views[0].label if len(views) == 1 else f"{len(views)} runs compared",
        css=Markup((_PAGE / "report.css").read_text("utf-8")),
        script=Markup(script),
        data=Markup(_embedded(page_data(views))),
        runs=[_run(view, summary) for view, summary in zip(views, summaries, strict=True)],
        validation_rows=[
            {"run": view.label, "name": name} | values
            for view, summary in zip(views, summaries, strict=True)
            for name, values in summary["validation"].items()
        ],
        differences=differences(views),
        missing_signals=missing_signals(views),
        commands=_commands(views),
        version=_version(),
        drawn=STEPS,
    )


def differences(views: Sequence[View]) -> list[tuple[str, list[str]]]:
    """Settings and versions that differ between runs: name, value in each run."""
    tables = [dict(_environment(view)) for view in views]
    names = sorted({name for table in tables for name in table})
    rows = [(name, [table.get(name, "–") for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def missing_signals(views: Sequence[View]) -> list[str]:
    """Which observed signals are not in the logs, and the setting that turns them on."""
    texts = []
    for view in views:
        seen = [m for o in view.run.observations for m in o.layers]
        lacking: dict[str, list[str]] = {}
        for name, signal in SIGNALS.items():
            if all(getattr(m, name) is None for m in seen):
                lacking.setdefault(signal.setting, []).append(signal.title)
        for name, title in (
            ("histogram", "joint histogram of H and F"),
            ("classes", "token classes"),
        ):
            if all(getattr(m, name) is None for m in seen):
                lacking.setdefault("uar.observe.interval", []).append(title)
        if all(m.cache_hit_rates is None for m in seen):
            lacking.setdefault("uar.observe.probe_interval", []).append("cache hit rates")
        of = f"{view.label}: " if len(views) > 1 else ""
        texts += [
            f"{of}Not in the log: {', '.join(titles)}. Set {setting} to the steps between two "
            "of them."
            for setting, titles in lacking.items()
        ]
    return texts


def _run(view: View, summary: dict[str, Any]) -> dict[str, Any]:
    overall, layers = view.phases
    run = view.run
    start = run.starts[-1] if run.starts else None
    if run.end is None:
        status = "running, or killed" if run.steps else "nothing logged yet"
    else:
        status = run.end.reason
    parts = [f"{summary['steps']} steps"]
    if start:
        parts += [
            f"{start.world_size} rank(s)", f"{start.num_experts} experts, top-{start.topk}",
            f"policy {start.config.get('uar', {}).get('policy', '?')}",
        ]  # fmt: skip
    if run.resumed_at:
        parts.append("resumed at " + ", ".join(map(str, run.resumed_at)))
    return {
        "label": view.label,
        "status": status,
        "finished": run.end is not None and run.end.reason == "finished",
        "subtitle": " · ".join(parts),
        "tiles": _tiles(summary),
        "phases": overall,
        "layer_phases": layers,
        "findings": view.findings,
        "notes": view.notes,
        "environment": _environment(view),
        "logged": view.logged,
    }


def _tiles(summary: dict[str, Any]) -> list[dict[str, str]]:
    k_eff = summary["k_eff"]
    first = next(iter(summary["validation"].items()), None)
    loss, set_name = "–", "no validation logged"
    if first is not None:
        loss = _shown(first[1]["final_loss"], 4)
        set_name = f"{first[0]}, perplexity {_shown(first[1]['perplexity'], 2)}"
    return [
        {"name": name, "value": value, "remark": remark}
        for name, value, remark in (
            ("Training loss", _shown(summary["train_loss"], 4), f"at step {summary['steps']}"),
            ("Validation loss", loss, set_name),
            (
                "Active experts",
                _shown(k_eff["late"], 2),
                f"late; early {_shown(k_eff['early'], 2)}",
            ),
            ("FLOPs × Top-K", _shown(summary["flops_ratio_late"], 3), "last quarter"),
            ("MaxVio", _shown(summary["max_vio_late"], 2), "per batch, last quarter"),
            ("Tokens per second", _shown(summary["tokens_per_second"], 0), "all ranks, mean"),
        )
    ]


def _environment(view: View) -> list[tuple[str, str]]:
    if not view.run.starts:
        return []
    start = view.run.starts[-1]
    rows = [(f"version of {name}", value) for name, value in sorted(start.versions.items())]
    rows.append(("ranks", str(start.world_size)))
    rows.append(("tokens per step", str(start.tokens_per_step)))
    return rows + [(name, _text(value)) for name, value in _flat(start.config)]


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(views: Sequence[View]) -> str:
    sources = [
        shlex.quote(str(view.path.parent if view.path.name == RUN_LOG else view.path))
        for view in views
    ]
    lines = ["uar report " + " ".join(sources)]
    lines += [f"uar log export {source} --format csv" for source in sources]
    return "\n".join(lines + [_train_again(view) for view in views])


def _train_again(view: View) -> str:
    """The command for the same training in a folder beside the old one's."""
    config = view.run.starts[-1].config if view.run.starts else {}
    folder = (config.get("run") or {}).get("dir")
    if folder is None:
        return f"# {view.label}: started by a script; its arguments are listed above"
    # The resolved configuration has whole paths.
    paths = {"run.dir": folder} | {
        name: value
        for name, value in config.items()
        if isinstance(value, str) and value.startswith(f"{folder}/")
    }
    changes = [f"{name}={folder}-again{path[len(folder) :]}" for name, path in paths.items()]
    return shlex.join(["uar", "train", str(view.path.parent / "config.yaml"), *changes])


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _version() -> str:
    try:
        return version("uar-megatron")
    except PackageNotFoundError:
        return "(not installed)"


def _shown(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
