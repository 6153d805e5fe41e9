"""Our entry without UAR: the installed Megatron's own routers and dispatchers, same data and loop.

Run under torchrun as ``stock_pretrain.py CONFIG OUTPUT key=value … [-- --flag …]``. The ``uar``
section is not used, but for ``observe`` where WATCH is a folder for the monitor; what follows
``--`` goes to Megatron as it is (``--spec``). The last rank writes the training losses, in full
precision, to OUTPUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uar_megatron.experiment import load_experiment
from uar_megatron.monitor import watch_training
from uar_megatron.pretrain import _argv, _prepare_process


def main() -> None:
    config, output, *rest = sys.argv[1:]
    split = rest.index("--") if "--" in rest else len(rest)
    experiment = load_experiment(config, rest[:split])
    argv = [*_prepare_process(experiment), *rest[split + 1 :]]
    if "WATCH" in os.environ:
        watch_training(os.environ["WATCH"], observe=experiment.uar.observe)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.utils import is_last_rank

    from uar_megatron.mcore.compat import observe_training
    from uar_megatron.mcore.gpt import dataset_provider, forward_step

    with _argv(argv):
        args = parse_and_validate_args()
    losses: dict[int, float] = {}

    def on_step(call: dict[str, Any], seconds: Callable[[], float]) -> None:
        if "lm loss" in call["loss_dict"]:
            losses[call["iteration"]] = float(call["loss_dict"]["lm loss"])

    observe_training(on_step, list, lambda step, losses, layers: None)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        dataset_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if is_last_rank():
        Path(output).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
