"""What ``uar eval`` does: on every rank load the model, on rank 0 evaluate it and write results."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from uar_megatron.data.check import check_dataset
from uar_megatron.errors import ConfigError, DataError, UARError
from uar_megatron.evaluation.checkpoint import Located, evaluation_experiment, locate
from uar_megatron.evaluation.failures import first_line
from uar_megatron.evaluation.identity import identity_of
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.perplexity import check_attention, names_of, perplexity
from uar_megatron.evaluation.results import KIND, VERSION, add_tasks, kept_results, save_results
from uar_megatron.evaluation.tasks import Task, benchmarks, choose, write_tasks
from uar_megatron.experiment import check_writable


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, on what.

    Attributes:
        checkpoint: folder of a run, of its checkpoints, or of one of them.
        overrides: dotted overrides of the run's configuration.
        config: the run's resolved configuration, where it is not beside the checkpoint.
        tasks: benchmarks, ``uar`` for all ten, or other tasks of lm-eval.
        data: folder with the data of the benchmarks.
        data_paths: prefixes of Megatron data, for perplexity.
        shots: ``task=number`` where it is not the paper's.
        limit: documents of each task, and sequences of each data set; None for all.
        batch_size: sequences of a micro-batch.
        cache: prefix of the files that keep answered requests, so that a run can go on; each
            checkpoint and configuration has its own.
        output: the results file; ``RUN/evaluation/ITERATION.json`` where None. One that is there
            is added to, if it is of the same checkpoint, configuration and limit, else refused.
    """

    checkpoint: Path
    overrides: Sequence[str] = ()
    config: Path | None = None
    tasks: Sequence[str] = ()
    data: Path | None = None
    data_paths: Sequence[str] = ()
    shots: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 8
    cache: Path | None = None
    output: Path | None = None


def evaluate(options: EvalOptions) -> tuple[dict[str, Any], Path] | None:
    """Evaluate; return the results and where they are, on rank 0, None on the others.

    Raises:
        UARError: checkpoint, tasks, data or layout cannot be used. What can be seen without the
            model is refused before it is loaded.
    """
    if not options.tasks and not options.data_paths:
        raise ConfigError(
            "tasks",
            "neither tasks nor data for perplexity are named",
            allowed=f"--tasks uar, or some of {', '.join(benchmarks())}; --data-path PREFIX",
        )
    located = locate(options.checkpoint, options.config)
    output = options.output or _default_output(located)
    check_writable("output", output.parent)
    if options.cache is not None:
        check_writable("cache", options.cache.parent)
    ours, others = split_tasks(options)
    if options.tasks:
        check_lm_eval()
    experiment = evaluation_experiment(located, options.overrides)
    head = {
        "identity": identity_of(located, experiment),
        "run": experiment.run.name,
        "limit": options.limit,
    }
    wanted = {task.name: {"shots": task.shots, "note": task.note} for task in ours}
    kept = kept_results(output, head, wanted)
    # lm-eval's key of an answer has the text of the request alone.
    cache = f"{options.cache}_{head['identity']}" if options.cache else None
    if options.data_paths:
        check_attention(experiment.megatron)
    for prefix in options.data_paths:
        check_dataset(prefix)
    model = CheckpointModel(
        options.checkpoint, options.overrides, config=options.config, batch_size=options.batch_size
    )
    if model.rank != 0:
        model.serve()
        return None
    with model:
        results = {"kind": KIND, "version": VERSION, **model.describe(), **head, **kept}
        for prefix in options.data_paths:
            check_dataset(prefix, model.args.padded_vocab_size)
        if ours or others:
            found = run_tasks(model, ours, others, options, cache)
            results["tasks"] = add_tasks(kept["tasks"], found)
            save_results(results, output)
        for name, prefix in names_of(options.data_paths, kept["perplexity"]).items():
            found = perplexity(model, prefix, options.limit, options.batch_size)
            results["perplexity"][name] = found
            save_results(results, output)
    return results, output


def _default_output(located: Located) -> Path:
    run = located.load.parent if located.load.name == "checkpoints" else located.load
    return run / "evaluation" / f"{located.folder.name}.json"


def split_tasks(options: EvalOptions) -> tuple[list[Task], list[str]]:
    """Benchmarks of ours, and other tasks of lm-eval, which it gets from the hub."""
    known = {*benchmarks(), "uar"}
    shots = numbers_of_shots(options.shots)
    ours = [name for name in options.tasks if name in known]
    others = [name for name in options.tasks if name not in known]
    if others and options.data is not None:
        choose(others, options.data)  # refuses: a folder has our benchmarks alone
    return choose(ours, options.data, shots), others


def numbers_of_shots(texts: Sequence[str]) -> dict[str, int]:
    """Return numbers of examples by task, from ``TASK=NUMBER``.

    Raises:
        ConfigError: a text is not of that form.
    """
    shots = {}
    for text in texts:
        task, _, number = text.partition("=")
        if not number.isdecimal():
            raise ConfigError("shots", f"{text!r}", allowed="TASK=NUMBER, e.g. mmlu=0")
        shots[task] = int(number)
    return shots


def check_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        UARError: it is not installed.
    """
    try:
        metadata.version("lm-eval")
    except metadata.PackageNotFoundError as error:
        raise UARError("tasks need lm-eval\n  remedy:  pip install 'uar-megatron[eval]'") from error


def run_tasks(
    model: CheckpointModel,
    ours: Sequence[Task],
    others: Sequence[str],
    options: EvalOptions,
    cache: str | None = None,
) -> dict[str, Any]:
    """Run lm-eval; return metrics, shots, notes and the use of experts by task.

    The use of experts is over the requests that the model has answered in this run; where a cache
    has answered others, ``requests`` and ``usage_of`` say how many there are and over how many it
    is.

    Args:
        model: on rank 0, while the others serve.
        ours: benchmarks.
        others: further tasks of lm-eval.
        options: what was asked for.
        cache: prefix of the file of answers of this very model; None for none.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from uar_megatron.evaluation.lm import UARMegatronLM

    lm = UARMegatronLM(model=model, batch_size=options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(ours, Path(folder))
        # lm-eval's own index takes 20 s to build.
        manager = TaskManager(include_path=folder, include_defaults=bool(others))
        load, loaded = manager.load, {}

        def load_named(names: list[str]) -> Any:
            built: list[Any] = []
            for name in names:
                with _named_if_unusable(name, options):  # a fault of the model is none of the data
                    of = load([name])
                built += list(of["groups"].values())[:1] or of["tasks"].values()
            with _named_if_unusable(", ".join(names), options):
                found = load(built)  # refuses a task that is in two of them
            loaded.update(found["tasks"])
            for name, task in loaded.items():  # loading looks at the first document alone
                guard = _named_if_unusable(name, options)
                task.build_all_requests = guard(task.build_all_requests)
            for benchmark in ours:
                _check_examples(benchmark, loaded)
            return found

        manager.load = load_named
        found = simple_evaluate(
            model=lm,
            tasks=[*(task.name for task in ours), *others],
            task_manager=manager,
            limit=options.limit,
            use_cache=cache,
            bootstrap_iters=1000,
            log_samples=False,
        )
    assert found is not None
    notes = {task.name: task for task in ours}
    members = found.get("group_subtasks", {})
    of_group = {member: group for group, names in members.items() for member in names}
    of_group = {name: group for name, group in of_group.items() if group != "uar"}
    results: dict[str, Any] = {}
    for name, metrics in {**found["results"], **found.get("groups", {})}.items():
        entry: dict[str, Any] = {
            "metrics": named_metrics(metrics),
            "shots": found.get("n-shot", {}).get(name),
            "documents": (found.get("n-samples", {}).get(name) or {}).get("effective"),
            "group": of_group.get(name),
        }
        if name in notes:
            entry["shots"], entry["note"] = notes[name].shots, notes[name].note
        tasks = members.get(name) or [name]
        entry["usage"] = lm.describe_usage_of(tasks) | _coverage(loaded, tasks, lm.answered)
        results[name] = entry
    return results


def named_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's ``metric,filter``: the filter stays in the name where it is not ``none``."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float) and key not in ("sample_len", "sample_count")
    }


def _coverage(
    loaded: Mapping[str, Any], tasks: Sequence[str], answered: Mapping[str, int]
) -> dict[str, int]:
    """Requests of some tasks, and how many of them the model has answered, if not all."""
    known = [task for task in tasks if task in loaded]
    asked = sum(request.repeats for task in known for request in loaded[task].instances)
    own = sum(answered.get(task, 0) for task in known)
    return {"requests": asked, "usage_of": own} if own < asked else {}


def _check_examples(benchmark: Task, loaded: Mapping[str, Any]) -> None:
    """Refuse files with fewer examples than shots; lm-eval's samplers would fail."""
    if not benchmark.shots or benchmark.shots_from is None:
        return
    # Of the split that is evaluated, lm-eval takes one more, for the document itself.
    own = benchmark.shots_from == benchmark.split
    for subject, files in (benchmark.files or {}).items():
        name = f"{benchmark.name}_{subject}" if subject else benchmark.name
        count = len(loaded[name].sampler.df)
        if count < benchmark.shots + own:
            raise DataError(
                f"tasks: {name}: {files[benchmark.shots_from]} has {count} examples for "
                f"{benchmark.shots} shots\n"
                f"  allowed: {benchmark.shots + own} or more\n"
                f"  remedy:  --shots {benchmark.name}={max(count - own, 0)}, or more examples"
            )


@contextlib.contextmanager
def _named_if_unusable(task: str, options: EvalOptions) -> Iterator[None]:
    """Say what to do where data are absent, cannot be read or are not what the task expects."""
    try:
        yield
    except UARError:
        raise
    except Exception as error:  # datasets and a task's own code have no class of errors
        where = f"in {options.data}" if options.data else "from the hub"
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise DataError(
            f"tasks: {task}: lm-eval cannot use the data {where}: {first_line(error)}{cause}\n"
            "  remedy:  scripts/prepare_benchmarks.py makes a folder of data; name it with --data"
        ) from error


def show(results: dict[str, Any]) -> str:
    """The results as lines for the terminal."""
    lines = [f"{results['run']} at iteration {results['iteration']} ({results['policy']})"]
    for name, task in results["tasks"].items():
        if task["group"]:
            continue  # in the figures of its group
        metrics = ", ".join(
            f"{metric} {value:.4f}"
            for metric, value in task["metrics"].items()
            if "_stderr" not in metric
        )
        lines.append(f"{name} ({task['shots']}-shot): {metrics}{_show_usage(task.get('usage'))}")
        if task.get("note"):
            lines.append(f"  {task['note']}")
    for name, of in results["perplexity"].items():
        text = (
            f"{name}: perplexity {of['perplexity']:.3f}, MaxVio global {of.get('max_vio', 0):.3f}"
        )
        lines.append(text + _show_usage(of))
    return "\n".join(lines)


def _show_usage(usage: dict[str, Any] | None) -> str:
    if not usage:
        return ""
    partly = ""
    if "usage_of" in usage:
        partly = f" (over {usage['usage_of']} of {usage['requests']} requests, not the cached)"
    if not usage.get("tokens"):
        return "; k_eff unknown" + partly if partly else ""
    flops = f"FLOPs {usage['flops_ratio']:.3f}×, " if "flops_ratio" in usage else ""
    return (
        f"; k_eff {usage['k_eff']:.3f}, {flops}"
        f"energy {usage['energy']:.3f}, entropy {usage['entropy']:.3f}{partly}"
    )
