"""The training entry: ``torchrun … -m uar_megatron.pretrain --config FILE key=value …``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uar_megatron.errors import ConfigError, DataError, TrainingError, UARError
from uar_megatron.experiment import Experiment, check_writable, load_experiment, save_resolved

_FIRST_RANK_SPEAKS_WITHIN = 30.0
"""Seconds: ranks of a node import torch and Megatron at different speeds."""


def validate(experiment: Experiment, world_size: int) -> argparse.Namespace:
    """Check an experiment as far as possible without a process group; return Megatron's arguments.

    Switches the CPU layer on where the experiment asks for it. Megatron's own validation runs for
    rank 0 of ``world_size`` ranks, so what it refuses is refused before anything starts.

    Args:
        experiment: the composed configuration.
        world_size: ranks of the job.

    Raises:
        UARError: something is wrong; the message says what and how to mend it.
    """
    argv = _prepare_process(experiment)
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import (
        core_transformer_config_from_args,
        parse_args,
        validate_args,
    )

    from uar_megatron.data.check import check_dataset
    from uar_megatron.mcore.async_save import check_async_save
    from uar_megatron.mcore.compatibility import check_compatible
    from uar_megatron.mcore.observer import check_observe

    with _environment(WORLD_SIZE=str(world_size), RANK="0"), _megatron_refusals(), _argv(argv):
        args = parse_args()
        check_compatible(experiment.uar, args)
        check_async_save(args)
        validate_args(args)
        core_transformer_config_from_args(args)
    check_observe(experiment.uar, args)
    _check_schedule(args)
    _check_tokenizer(args)
    with _megatron_refusals():
        build_tokenizer(args)  # sets the vocabulary that the data must fit
    for prefix in _data_prefixes(args):
        check_dataset(prefix, args.padded_vocab_size)
    return args


def run(experiment: Experiment) -> None:
    """Train: this process is one rank of a torchrun job.

    Raises:
        UARError: the configuration, the data or the machine cannot be used.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    resolved = validate(experiment, world_size)
    check_outputs(experiment)
    argv = _prepare_process(experiment)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from uar_megatron.mcore.async_save import keep_writers_alive
    from uar_megatron.mcore.checkpoint import (
        check_checkpoint,
        check_on_every_rank,
        name_newest_checkpoint,
        unsafe_checkpoints_refused,
    )
    from uar_megatron.mcore.compat import keep_saving_in_this_process
    from uar_megatron.mcore.gpt import dataset_provider, forward_step
    from uar_megatron.mcore.lost_rank import lost_ranks_named
    from uar_megatron.mcore.spec import assert_uar_routers, uar_layer_spec
    from uar_megatron.run_recorder import RunRecorder

    if resolved.use_checkpoint_args:
        # Every rank reads it before there is a process group.
        name_newest_checkpoint(resolved)
        check_checkpoint(resolved)
    with _argv(argv), _megatron_refusals(), failed_loads_named(resolved):
        args = parse_and_validate_args()
        model_config = gpt_config_from_args(args)
    if args.async_save:
        keep_writers_alive(args.exit_signal)
    else:
        keep_saving_in_this_process()
    model_config.transformer_layer_spec = uar_layer_spec(experiment.uar)
    recorder = RunRecorder(experiment.run, experiment.uar, experiment.resolved, args)

    def after_build(model: list[Any]) -> list[Any]:
        check_on_every_rank(args)  # Megatron loads next
        assert_uar_routers(model)
        recorder.attach(model)
        return model

    model_config.post_wrap_hooks.append(after_build)
    if args.rank == 0:
        for folder in filter(None, output_folders(experiment).values()):
            save_resolved(experiment, Path(folder))
    reason = "killed by an error"
    try:
        with (
            lost_ranks_named(),
            unsafe_checkpoints_refused(args.load),
            failed_loads_named(args),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                dataset_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            )
        reason = "finished"
    except SystemExit as stop:
        reason, code = _why_stopped(args, stop.code)
        raise SystemExit(code) from stop
    except UARError as error:
        reason = str(error).splitlines()[0]
        raise
    finally:
        recorder.close(reason)


@contextlib.contextmanager
def failed_loads_named(args: argparse.Namespace) -> Iterator[None]:
    """Turn the bare ``sys.exit()`` of a load that failed into an error.

    Its exit code would be 0, that of a finished job; Megatron's training loop leaves with a number.

    Raises:
        TrainingError: Megatron could not load; perhaps this rank alone knows.
    """
    from uar_megatron.mcore.checkpoint import folder_to_load

    try:
        yield
    except SystemExit as stop:
        if stop.code is not None:
            raise
        raise TrainingError(
            f"load: Megatron could not load the checkpoint in {folder_to_load(args)}; its last "
            "lines say why"
        ) from stop


def _why_stopped(args: argparse.Namespace, code: Any) -> tuple[str, Any]:
    """Say why Megatron left its loop early, on every rank alike, and with which exit code.

    Megatron leaves with 0 after a signal, which a batch system would take for a finished job.
    """
    from megatron.core.rerun_state_machine import EXIT_CODE_RESUME_TO_DISAMBIGUATE

    from uar_megatron.mcore.compat import signal_received

    if args.exit_signal_handler and signal_received():
        saved = "checkpoint saved" if args.save else "nothing saved: there is no --save"
        return f"{args.exit_signal.name} received, {saved}", 128 + args.exit_signal
    if code:
        why = f"Megatron's validation of results stopped it with exit code {code}"
        if code == EXIT_CODE_RESUME_TO_DISAMBIGUATE:
            why += (
                "; resume on other devices, which shows whether one is broken, or on the same ones "
                "with rerun_mode=disabled"
            )
        return why, code
    return "exit_interval or exit_duration_in_mins reached", code


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and turn every UARError into one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m uar_megatron.pretrain", description=__doc__)
    parser.add_argument("--config", required=True, help="experiment YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    options = parser.parse_args(arguments)
    try:
        experiment = load_experiment(options.config, options.overrides)
        if options.dry_run:
            print(describe(experiment))
        else:
            run(experiment)
    except UARError as error:
        fail(error)


def describe(experiment: Experiment) -> str:
    """Return what ``--dry-run`` prints: the resolved YAML and the Megatron argument list."""
    world_size = experiment.launch.nnodes * experiment.launch.nproc_per_node
    # What Megatron prints while it validates is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        args = validate(experiment, world_size)
    from uar_megatron.mcore.arguments import to_argv
    from uar_megatron.mcore.checkpoint import check_checkpoint

    check_checkpoint(args)

    arguments = "\n".join(
        f"#   {line}" for line in _one_option_per_line(to_argv(experiment.megatron))
    )
    return f"{experiment.to_yaml()}\n# Megatron arguments for {world_size} ranks:\n{arguments}"


def fail(error: UARError) -> None:
    """Print the error and leave with its exit code, on every rank.

    Every rank meets a bad configuration, so the first rank of a node prints that. torchrun ends all
    ranks as soon as one has left: the others stay until then, and speak only if nobody did. In
    training a single rank may be the only one that knows what went wrong.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, TrainingError):
        time.sleep(_FIRST_RANK_SPEAKS_WITHIN)
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code)


def _one_option_per_line(argv: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines


def global_arguments(experiment: Experiment) -> argparse.Namespace:
    """Return this rank's validated arguments, and make them and the tokenizer Megatron's globals.

    Raises:
        UARError: the configuration cannot be used.
    """
    argv = _prepare_process(experiment)
    from megatron.training.arguments import parse_and_validate_args

    with _argv(argv), _megatron_refusals():
        return parse_and_validate_args()


def prepare_device(experiment: Experiment) -> None:
    """Switch the CPU layer on if asked for; nothing of Megatron may have been imported before.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    import torch

    from uar_megatron.mcore import cpu

    if experiment.launch.device == "cpu":
        cpu.enable()
    elif not torch.cuda.is_available():
        raise ConfigError(
            "launch.device",
            "cuda was asked for, but torch finds no CUDA device here",
            allowed="cuda (with a GPU), cpu",
            remedy="start with parallel=cpu (or launch.device=cpu) to run on the CPU",
        )


def _prepare_process(experiment: Experiment) -> list[str]:
    """Prepare the device, check versions, and compile Megatron's arguments."""
    prepare_device(experiment)
    from uar_megatron.mcore.arguments import to_argv
    from uar_megatron.mcore.checkpoint import load_data_only

    load_data_only()
    sizes = ("tensor_model_parallel_size", "context_parallel_size")
    if any(experiment.megatron.get(size) not in (None, 1) for size in sizes):
        # CUDA reads it when it starts; before Blackwell Megatron refuses to run without it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return to_argv(experiment.megatron)


def _check_schedule(args: argparse.Namespace) -> None:
    """Refuse a warm-up that the learning rate's decay never begins after (Megatron asserts it)."""
    steps = args.lr_decay_iters or args.train_iters
    if steps and args.lr_warmup_iters >= steps:
        raise ConfigError(
            "lr_warmup_iters",
            f"{args.lr_warmup_iters} of {steps} steps",
            allowed=f"0 … {steps - 1}",
            remedy="shorten the warm-up, or lengthen lr_decay_iters or train_iters",
        )
    if args.multiple_validation_sets and not args.full_validation:
        raise ConfigError(
            "multiple_validation_sets",
            "Megatron evaluates several sets only in full",
            remedy="set full_validation: true, or name one set",
        )


def _check_tokenizer(args: argparse.Namespace) -> None:
    """Refuse a tokenizer path that does not exist, before a library looks for it on a hub."""
    tokenizer = args.tokenizer_model
    if tokenizer and os.sep in tokenizer and not Path(tokenizer).exists():
        raise DataError(
            f"tokenizer_model: {tokenizer} does not exist\n"
            "  remedy:  prepare the data first (`make demo` or `uar data --help`), or correct "
            "the path"
        )


def _data_prefixes(args: argparse.Namespace) -> list[str]:
    """The dataset prefixes among Megatron's data-path lists, whose weights are numbers."""
    if args.mock_data:
        return []
    words = [
        word
        for paths in (
            args.data_path,
            args.train_data_path,
            args.valid_data_path,
            args.test_data_path,
        )
        for word in paths or ()
    ]
    if args.per_split_data_args_path:
        words += _words_of_blend(Path(args.per_split_data_args_path))
    if not words and not (args.data_args_path or args.per_split_data_args_path):
        raise ConfigError(
            "data_path",
            "no training data is named",
            allowed="data_path, train_data_path + valid_data_path, or mock_data: true",
            remedy="choose a data group, e.g. data=demo after `make demo`, or data=mock",
        )
    return list(dict.fromkeys(word for word in words if not _is_number(word)))


def _words_of_blend(path: Path) -> list[str]:
    """Weights and prefixes of every split in a file for ``--per-split-data-args-path``."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        lists = [splits[split] or [] for split in ("train", "valid", "test")]
        # Megatron takes a list of words, or a string of them.
        split_up = [words.split() if isinstance(words, str) else words for words in lists]
        return [str(word) for words in split_up for word in words]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"per_split_data_args_path: {path} cannot be read: {error!r}\n"
            "  remedy:  prepare the data first (`uar corpus build`), or correct the path"
        ) from error


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_outputs(experiment: Experiment) -> None:
    """Make sure that the output folders can be written to, before a long run needs them.

    Raises:
        ConfigError: a folder cannot be written to.
    """
    for field, folder in output_folders(experiment).items():
        if folder is not None:
            check_writable(field, folder)


def output_folders(experiment: Experiment) -> dict[str, str | None]:
    """Folders that a run writes to, by the field that names them."""
    return {"run.dir": experiment.run.dir, "save": experiment.megatron.get("save")}


@contextlib.contextmanager
def _megatron_refusals() -> Iterator[None]:
    """Turn what Megatron's own validation asserts into a ConfigError."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            "megatron",
            f"Megatron refuses this configuration: {error or 'an assertion without a message'}"
            f" ({_place(error)})",
            remedy="change the arguments the message names; --dry-run shows all of them",
        ) from error


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"


@contextlib.contextmanager
def _argv(argv: Sequence[str]) -> Iterator[None]:
    """Megatron's parser reads ``sys.argv``."""
    saved = sys.argv
    sys.argv = [saved[0], *argv]
    try:
        yield
    finally:
        sys.argv = saved


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main()
