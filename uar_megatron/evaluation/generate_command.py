"""``uar generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="folder of a run, of its checkpoints, or one iter_… folder")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides: parallel=cpu uar.budget.alpha=0 …")
    ] = None,
    prompt: Annotated[str, typer.Option(help="what the text begins with")] = "",
    max_tokens: Annotated[int, typer.Option(help="tokens of the answer at most")] = 64,
    temperature: Annotated[
        float, typer.Option(help="of the softmax; 0: most probable token")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="probability of the tokens that take part")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    no_colour: Annotated[
        bool, typer.Option("--no-colour", "--no-color", help="the text alone")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="resolved configuration, if none lies beside it")
    ] = None,
) -> None:
    """Continue a text on this machine, and show on which tokens the model spends its experts.

    Colour is the number of experts, weight the energy, both means over the MoE layers. Without a
    terminal the text alone is printed. Every token is a forward of the whole text (no cache).
    """
    from rich.console import Console

    from uar_megatron.evaluation.generate import Sampling, generate
    from uar_megatron.evaluation.model import CheckpointModel
    from uar_megatron.evaluation.quiet import quiet_libraries
    from uar_megatron.evaluation.show import Painter, stream, summary

    quiet_libraries()
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    with CheckpointModel(checkpoint, overrides or [], config=config, batch_size=1) as model:
        from uar_megatron.mcore.policies import layer_policies  # the CPU layer is on now

        policies = layer_policies(model.experiment.uar, model.args)
        fewest = min(p.settings.budget.k_min if p.fixed_k is None else p.fixed_k for p in policies)
        painter = Painter(fewest, max(policy.max_k for policy in policies))
        console = Console(no_color=no_colour or None, highlight=False)
        tokens = stream(generate(model, prompt, sampling), painter, console)
        if not model.is_per_token:
            note = "note: experts are shared out among the tokens of the text anew at every token"
            typer.echo(note, err=True)
        Console(stderr=True).print(summary(tokens))
