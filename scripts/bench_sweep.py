"""Step time of the rows of a finished sweep, side by side in one process.

Each row's model is loaded from its first seed's checkpoint, so that it routes as at the end of its
training, and all take steps on the same batches of the training data in turn. Writes what
``uar table --bench`` reads: medians of the ratios to the sweep's baseline within a round.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_overhead import Variant, measure, report

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError
from uar_megatron.experiment import Experiment, check_writable
from uar_megatron.reporting.summary import replace_text
from uar_megatron.sweep.grid import Point, Sweep, load_sweep
from uar_megatron.sweep.state import read_state

BATCHES = 8


def main(
    sweep: Annotated[Path, typer.Argument(help="sweep YAML file, or the folder of a sweep")],
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    rounds: Annotated[int, typer.Option(min=5, help="paired rounds")] = 40,
) -> None:
    """Measure a step of every row against the baseline's."""
    check_writable("--output", output.parent)
    loaded = load_sweep(sweep)
    points = first_seeds(loaded)
    baseline = loaded.baseline or next(iter(points))
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}

    from uar_megatron.pretrain import _prepare_process

    _prepare_process(points[baseline].experiment)
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import global_vars
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron

    arguments = {row: arguments_of(point.experiment) for row, point in points.items()}
    global_vars.set_global_variables(arguments[baseline])
    initialize_megatron(pretrain_cfg_container_from_args(arguments[baseline], None))
    variants = []
    for row, args in arguments.items():
        # Megatron loads what its global arguments name.
        global_vars._GLOBAL_ARGS = args
        args.padded_vocab_size = arguments[baseline].padded_vocab_size
        variants.append(Variant(row, points[row].experiment.uar.model_dump(), args))
    global_vars._GLOBAL_ARGS = arguments[baseline]
    batches = RerunDataIterator(training_batches(arguments[baseline]))
    results = measure(variants, batches, rounds, baseline)
    torch.distributed.destroy_process_group()
    report(f"{sweep}: ratios to {baseline}, {rounds} paired rounds", results)
    ratios = {
        row: (result.step_time_ratio, result.standard_error)
        for row, result in results.items()
        if row != baseline
    }
    replace_text(output, json.dumps(ratios, indent=1, ensure_ascii=False) + "\n")


def first_seeds(sweep: Sweep) -> dict[str, Point]:
    """The first finished point of each row.

    Raises:
        UARError: a row has none.
    """
    points: dict[str, Point] = {}
    for point in sweep.points:
        if point.row not in points and read_state(point).finished:
            points[point.row] = point
    missing = {point.row for point in sweep.points} - points.keys()
    if missing:
        raise UARError(
            f"{sweep.folder}: no finished run of {', '.join(sorted(missing))}\n"
            "  remedy:  run the sweep to its end first: uar sweep"
        )
    return points


def arguments_of(experiment: Experiment) -> Any:
    """Megatron's arguments for steps that hardly move the trained model."""
    from megatron.training.arguments import parse_args, validate_args

    from uar_megatron.mcore.arguments import to_argv
    from uar_megatron.pretrain import _argv

    steps = {"lr": 1e-9, "min_lr": 1e-9, "lr_warmup_iters": 0, "save": None, "finetune": True}
    steps |= {"load": experiment.megatron["save"], "tensorboard_dir": None}
    with _argv(to_argv(experiment.megatron | steps)):
        args = parse_args()
        validate_args(args)
    return args


def training_batches(args: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of the training data, the first few of them for ever."""
    from uar_megatron.mcore.gpt import dataset_provider

    train, *_ = dataset_provider([BATCHES * args.micro_batch_size, None, 0])
    samples = map(train.__getitem__, range(BATCHES * args.micro_batch_size))
    batches = [
        torch.utils.data.default_collate(list(batch))
        for batch in itertools.batched(samples, args.micro_batch_size)
    ]
    yield from itertools.cycle(batches)


if __name__ == "__main__":
    run_command(main)
