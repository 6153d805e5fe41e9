"""Our entry, on whose rank 1 a gradient becomes NaN at one step, as a broken device would have it.

Run under torchrun as ``poisoned_pretrain.py STEP CONFIG key=value …``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from uar_megatron.errors import UARError
from uar_megatron.experiment import load_experiment
from uar_megatron.pretrain import _prepare_process, fail, run


def main() -> None:
    poisoned_step, config, *overrides = sys.argv[1:]
    experiment = load_experiment(config, overrides)
    _prepare_process(experiment)
    from uar_megatron.mcore.compat import current_iteration
    from uar_megatron.mcore.step import StepBoundary

    boundary = StepBoundary.__call__

    def poison_first(self: Any, model: list[Any], *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and current_iteration() == int(poisoned_step):
            next(iter(model[0].parameters())).main_grad[0] = float("nan")
        return boundary(self, model, *args, **kwargs)

    StepBoundary.__call__ = poison_first  # type: ignore[method-assign]
    try:
        run(experiment)
    except UARError as error:
        fail(error)


if __name__ == "__main__":
    main()
