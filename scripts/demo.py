"""`make demo`: corpus, training that is stopped half-way and resumed, figures, summary.

What is finished already is not done again, so a second call takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from uar_megatron.errors import UARError
from uar_megatron.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/demo.yaml"
MANIFEST = "data/demo/manifest.json"


def main() -> None:
    """Run every part of the demo that is still to do."""
    os.chdir(ROOT)
    experiment = load_experiment(CONFIG)
    run_dir = Path(experiment.run.dir)
    steps = int(experiment.megatron["train_iters"])
    print(f"== corpus: real text into {Path(MANIFEST).parent}", flush=True)
    subprocess.run([sys.executable, "scripts/demo_corpus.py"], check=True)

    half = steps // 2
    if saved_step(run_dir) < half:
        print(f"== training, first half: stops at step {half} of {steps}", flush=True)
        train(run_dir, f"exit_interval={half}")
    if saved_step(run_dir) < steps:
        print(f"== training, second half: resumes from step {saved_step(run_dir)}", flush=True)
        train(run_dir)
    print(f"== figures and summary in {run_dir}", flush=True)
    uar("report", str(run_dir), "--manifest", MANIFEST)


def saved_step(run_dir: Path) -> int:
    """The step of the latest checkpoint, 0 without one."""
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def train(run_dir: Path, *overrides: str) -> None:
    """Train in a child; show our lines, keep everything Megatron says in ``train.log``."""
    wandb = ("wandb_project=uar-demo", "wandb_exp_name=demo", f"wandb_save_dir={run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    log_path = run_dir / "train.log"
    started = time.monotonic()
    command = [sys.executable, "-m", "uar_megatron.cli", "train", CONFIG, *wandb, *overrides]
    with (
        log_path.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env={"WANDB_MODE": "offline", **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            if line.startswith((" uar |", "error:")):
                print(line, end="", flush=True)
    if child.returncode != 0:
        raise UARError(f"training failed with exit code {child.returncode}; see {log_path}")
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def uar(*arguments: str) -> None:
    """Run the ``uar`` command."""
    subprocess.run([sys.executable, "-m", "uar_megatron.cli", *arguments], check=True)


if __name__ == "__main__":
    try:
        main()
    except UARError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:
        # The child has said why.
        sys.exit(error.returncode)
