"""Our entry, with ``torch.utils.flop_counter`` around every training step.

Run under torchrun as ``counted_pretrain.py OUTPUT CONFIG key=value …``. Each rank writes the FLOPs
of each step by module, forward and backward, to ``OUTPUT.rank``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uar_megatron.errors import UARError
from uar_megatron.experiment import load_experiment
from uar_megatron.pretrain import _prepare_process, fail, run


def grouped_mm_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of ``aten._grouped_mm``, which torch's counter does not know.

    Either [rows, in] with [experts, in, out], or [in, rows] with [rows, out].
    """
    return int(2 * a_shape[0] * a_shape[1] * b_shape[-1])


def main() -> None:
    output, config, *overrides = sys.argv[1:]
    experiment = load_experiment(config, overrides)
    _prepare_process(experiment)
    from megatron.training import training

    train_step = training.train_step
    steps: list[dict[str, int]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        formulas = {torch.ops.aten._grouped_mm: grouped_mm_flops}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            result = train_step(*args, **kwargs)
        flops = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
        steps.append(flops)
        Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(steps))
        return result

    training.train_step = counted
    try:
        run(experiment)
    except UARError as error:
        fail(error)


if __name__ == "__main__":
    main()
