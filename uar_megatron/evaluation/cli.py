"""The commands ``uar eval``, ``uar tasks`` and ``uar lm-eval``. Starts fast: typer alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="folder of a run, of its checkpoints, or of one of them")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="dotted overrides of the run: expert_model_parallel_size=2 parallel=cpu"
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="uar (all ten benchmarks), some of them, or other lm-eval tasks")
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(help="folder of benchmark data (scripts/prepare_benchmarks.py makes one)"),
    ] = None,
    data_path: Annotated[
        list[str] | None, typer.Option(help="prefix of Megatron data, for perplexity; repeatable")
    ] = None,
    shots: Annotated[
        list[str] | None, typer.Option(help="TASK=NUMBER instead of the paper's; repeatable")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks that share the model")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences of a micro-batch")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="documents of a task; for a first look")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="file (prefix) of answered requests, to go on later")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="the run's config.yaml, if not beside the checkpoint")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="results; RUN/evaluation/ITERATION.json if not given")
    ] = None,
) -> None:
    """Evaluate a checkpoint with the routing that it was trained with: tasks, perplexity.

    Its parallel sizes are 1 unless overridden; further ranks (--nproc) share the sequences.
    """
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*start, "--nproc_per_node", str(nproc), "-m", "uar_megatron.cli"]
        command += _without_nproc(sys.argv[1:])
        sys.stdout.flush()
        os.execv(sys.executable, command)
    from uar_megatron.evaluation.command import EvalOptions, show
    from uar_megatron.evaluation.command import evaluate as run

    options = EvalOptions(
        checkpoint=checkpoint,
        overrides=overrides or [],
        config=config,
        tasks=[name for name in tasks.split(",") if name],
        data=data,
        data_paths=data_path or [],
        shots=shots or [],
        limit=limit,
        batch_size=batch_size,
        cache=cache,
        output=output,
    )
    found = run(options)
    if found is not None:
        print(show(found[0]))
        print(found[1])


def write_tasks(
    folder: Annotated[Path, typer.Argument(help="of task definitions for lm_eval")],
    tasks: Annotated[str, typer.Option(help="uar (all ten benchmarks), or some of them")] = "uar",
    data: Annotated[
        Path | None,
        typer.Option(help="folder of benchmark data (scripts/prepare_benchmarks.py makes one)"),
    ] = None,
    shots: Annotated[
        list[str] | None, typer.Option(help="TASK=NUMBER instead of the paper's; repeatable")
    ] = None,
) -> None:
    """Write the benchmarks' definitions for lm-eval's own command, and say how to call it.

    A task that is named by its file makes `lm_eval` import the model `uar_megatron`.
    """
    from uar_megatron.evaluation import command
    from uar_megatron.evaluation import tasks as definitions
    from uar_megatron.experiment import check_writable

    command.check_lm_eval()
    chosen = definitions.choose(tasks.split(","), data, command.numbers_of_shots(shots or []))
    check_writable("folder", folder)
    names = ",".join(definitions.write_tasks(chosen, folder))
    model = "--model uar_megatron --model_args checkpoint=RUN"
    print(f"lm_eval {model} --tasks {names} --include_path {folder}")


def _without_nproc(words: list[str]) -> list[str]:
    """torchrun takes ``--nproc`` for an abbreviation of its own option wherever it meets it."""
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        if word == "--nproc":
            words.pop(0)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command, with the model `uar_megatron` in it.

    Such as: uar lm-eval --model uar_megatron --model_args checkpoint=RUN --tasks lambada_openai
    """
    from uar_megatron.evaluation.command import check_lm_eval

    check_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import uar_megatron.evaluation.lm  # noqa: F401 (registers the model)

    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
