"""``uar sweep`` with :mod:`fake_trainer` in place of the training: ``fake_sweep.py GRID JOBS``."""

from __future__ import annotations

import sys
from pathlib import Path

from uar_megatron.sweep import runner
from uar_megatron.sweep.command import run_sweep

TRAINER = Path(__file__).with_name("fake_trainer.py")

if __name__ == "__main__":
    runner.PATIENCE_SECONDS = 2.0
    runner.POLL_SECONDS = 0.1
    code = run_sweep(
        Path(sys.argv[1]),
        check=lambda experiments: None,
        jobs=int(sys.argv[2]),
        retries=4,
        timeout=40.0,
        command=lambda config: (sys.executable, str(TRAINER), str(config)),
    )
    sys.exit(code)
