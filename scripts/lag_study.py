"""How the lag of the moving statistics drives the number of active experts, early in training.

Trains the demo model once per setting of ``uar.statistics`` and draws, per MoE layer, the mean ẑ
(how far the tokens lie above the ū they are normalised with, in σ) above the active experts. Where
ẑ is not 0, k follows the trend of the free energy, not its level. Needs ``make demo``'s corpus.
Settings that are complete are not trained again; remove the output folder to start over.

    python scripts/lag_study.py --steps 150
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import matplotlib
import pandas
import typer

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError
from uar_megatron.reporting.runlog import Run, read_run

SETTINGS = {
    "moving, momentum 0": ("uar.statistics.momentum=0.0",),
    "moving, momentum 0.9": ("uar.statistics.momentum=0.9",),
    "moving, momentum 0.99": ("uar.statistics.momentum=0.99",),
    "batch": ("uar.statistics.mode=batch",),
}


def main(
    steps: Annotated[int, typer.Option(min=20, help="optimizer steps per setting")] = 150,
    config: Annotated[Path, typer.Option(help="experiment")] = Path("configs/demo.yaml"),
    output: Annotated[Path, typer.Option(help="folder of the runs and the figure")] = Path(
        "runs/lag"
    ),
) -> None:
    """Train with each setting; write lag.png and lag.csv."""
    runs = {
        name: train(config, output / f"{number}", steps, options)
        for number, (name, options) in enumerate(SETTINGS.items())
    }
    table = pandas.DataFrame([row(name, run) for name, run in runs.items()])
    table.to_csv(output / "lag.csv", index=False)
    print(table.to_string(index=False))
    draw(runs, output / "lag.png")
    print(output / "lag.png")


def train(config: Path, run_dir: Path, steps: int, options: tuple[str, ...]) -> Run:
    """Train without load masks, so that nothing but the statistics differs; log every step."""
    log = run_dir / "run.jsonl"
    if not is_complete(log, steps):
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        command = [sys.executable, "-m", "uar_megatron.cli", "train", str(config)]
        command += [
            "routing=uar_ae",
            f"run.dir={run_dir}",
            f"train_iters={steps}",
            "log_interval=1",
        ]
        command += ["save=null", "load=null", f"eval_interval={10 * steps}", *options]
        with (run_dir / "train.log").open("w") as stream:
            print(f"training: {', '.join(options)}", flush=True)
            if subprocess.run(command, stdout=stream, stderr=stream, env=os.environ).returncode:
                raise UARError(f"training failed; see {run_dir / 'train.log'}")
    return read_run(log)


def is_complete(log: Path, steps: int) -> bool:
    """Whether an earlier call has trained this setting to its end."""
    return log.exists() and any(
        e.reason == "finished" and e.step == steps for e in read_run(log).ends
    )


def row(name: str, run: Run) -> dict[str, object]:
    """The figures of one setting."""
    lag = [max(abs(m.zscore_mean) for m in step.layers) for step in run.steps]
    k = [m.k_eff for step in run.steps for m in step.layers]
    third = len(lag) // 3
    return {
        "statistics": name,
        "worst layer's |mean ẑ|: largest": round(max(lag), 2),
        "mean of first third": round(sum(lag[:third]) / third, 2),
        "mean of last third": round(sum(lag[-third:]) / third, 2),
        "a layer's k_eff: lowest": round(min(k), 2),
        "highest": round(max(k), 2),
    }


def draw(runs: dict[str, Run], path: Path) -> None:
    """One column per setting: lag above active experts."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(runs), figsize=(3.4 * len(runs), 5), sharex=True, sharey="row", layout="constrained"
    )
    for column, (name, run) in enumerate(runs.items()):
        above, below = axes[0][column], axes[1][column]
        for index, layer in enumerate(run.steps[0].layers):
            steps = [step.step for step in run.steps]
            zscores = [step.layers[index].zscore_mean for step in run.steps]
            experts = [step.layers[index].k_eff for step in run.steps]
            above.plot(steps, zscores, linewidth=1, label=f"layer {layer.layer}")
            below.plot(steps, experts, linewidth=1)
        above.axhline(0, color="gray", linestyle=":")
        above.set_title(name, fontsize=10)
        below.set_xlabel("optimizer step")
        for axis in (above, below):
            axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("lag: mean ẑ (σ)")
    axes[1][0].set_ylabel("active experts")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    run_command(main)
