"""Export to an architecture that transformers has itself, where it computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uar_megatron.config import nearest
from uar_megatron.errors import ConfigError
from uar_megatron.export.architecture import model_config
from uar_megatron.export.routing import constant_k
from uar_megatron.export.source import Source, build_tokenizer
from uar_megatron.export.write import convert, cuts_of, new_folder, save_tokenizer
from uar_megatron.reporting.runlog import read_run

# What both compute, in the terms of our configuration.
_COMPUTES = {
    "norm": "rms",
    "is_norm_zero_centered": False,
    "hidden_act": "silu",
    "is_gated": True,
    "qkv_bias": False,
    "position_embedding": "rope",
    "shared_expert_intermediate_size": 0,
}
_ROUTES = {"score_function": "softmax", "group_topk": None, "scaling": 1.0, "bias_dtype": None}
_ROPE = {"interleaved": False, "interpolation": 1.0}


@dataclass(frozen=True)
class Architecture:
    """One of transformers' own.

    Attributes:
        kind: name of its classes.
        qk_norm: whether queries and keys are normalised, head by head.
        has_dense: whether some layers may be dense.
        weights: rules of the experts' weights, as in ``routing.py``.
    """

    kind: str
    qk_norm: bool
    has_dense: bool
    weights: tuple[str, ...]


ARCHITECTURES = {
    "mixtral": Architecture("Mixtral", False, False, ("softmax_after",)),
    "qwen3_moe": Architecture("Qwen3Moe", True, True, ("softmax_after", "as_they_are")),
}


def export_stock(
    source: Source,
    output: Path,
    name: str,
    freeze_k: int | None = None,
    tokenizer: Path | None = None,
) -> list[str]:
    """Write a model of an architecture that gives every token the same number of experts.

    Args:
        source: the checkpoint.
        output: a folder that does not exist yet.
        name: one of ``ARCHITECTURES``.
        freeze_k: that number; None for the checkpoint's own.
        tokenizer: where the tokenizer is now, if not where it was in training.

    Returns:
        Sentences about what is lost; empty if nothing is.

    Raises:
        ConfigError: the architecture is not known, computes something else, or would route
            otherwise and ``freeze_k`` does not allow it.
        DataError: as in :func:`~uar_megatron.export.write.export_model`.
    """
    if name not in ARCHITECTURES:
        allowed = ("uar", *ARCHITECTURES)
        raise ConfigError(
            "architecture",
            f"{name!r} is not known",
            allowed=", ".join(allowed),
            remedy=nearest(name, allowed),
        )
    architecture = ARCHITECTURES[name]
    vocab = build_tokenizer(source.args, tokenizer).vocab_size
    config = model_config(source, vocab)
    _check(architecture, name, config)
    k, found = _common_k(source, config, name, freeze_k)
    dtype = config["routing"]["dtype"]
    if dtype not in (None, config["dtype"]):
        found.append(
            f"router logits are computed in {config['dtype']}, and were in {dtype}: where two "
            "experts are almost equal, the other may be taken"
        )
    with new_folder(output) as folder:
        ids = save_tokenizer(source.args, folder, tokenizer)
        model = _build(architecture, config, k, ids)
        weights, _ = convert(source, cuts_of(config))
        model.load_state_dict(_renamed(weights, has_head=not config["tie_word_embeddings"]))
        model.save_pretrained(folder)
    return found


def _check(architecture: Architecture, name: str, config: dict[str, Any]) -> None:
    """Refuse what the architecture does not compute."""
    routers = [spec for spec in config["routers"] if spec is not None]
    wanted = [(key, config[key], value) for key, value in _COMPUTES.items()]
    wanted += [(f"routing.{key}", config["routing"][key], value) for key, value in _ROUTES.items()]
    wanted += [(f"rope.{key}", config["rope"][key], value) for key, value in _ROPE.items()]
    wanted.append(("rope.dim", config["rope"]["dim"], config["head_dim"]))
    wanted.append(("qk_norm", config["qk_norm"], architecture.qk_norm))
    if not architecture.has_dense:
        wanted.append(("dense layers", len(config["routers"]) - len(routers), 0))
    for key, value, allowed in wanted:
        if value != allowed:
            raise _mismatch(name, f"{key} is {value!r}, and {allowed!r} there")
    for spec in routers:
        rule = "ReLU gates" if spec["rule"] == "relu" else spec["weights"]
        if rule not in architecture.weights:
            allowed = " or ".join(architecture.weights)
            raise _mismatch(name, f"the weights of experts are {rule}, and {allowed} there")


def _mismatch(name: str, problem: str) -> ConfigError:
    return ConfigError(
        "architecture",
        f"{name} computes something else: of this model {problem}",
        remedy="export with the architecture uar",
    )


def _common_k(
    source: Source, config: dict[str, Any], name: str, freeze_k: int | None
) -> tuple[int, list[str]]:
    """The k of every token, and what that loses."""
    own = {constant_k(spec) for spec in config["routers"] if spec is not None}
    (k,) = own if len(own) == 1 else (None,)
    if freeze_k is not None and not 1 <= freeze_k <= config["num_experts"]:
        raise ConfigError("freeze_k", f"{freeze_k}", allowed=f"1 … {config['num_experts']}")
    if k is not None and freeze_k in (None, k):
        return k, []
    if freeze_k is None:
        raise ConfigError(
            "architecture",
            f"{name} gives every token the same number of experts, and this model does not",
            remedy="export with the architecture uar, or accept the loss with --freeze-k K",
        )
    return freeze_k, [describe_loss(source, freeze_k)]


def describe_loss(source: Source, k: int) -> str:
    """Say how many tokens get another number of experts, where the run's log knows."""
    text = f"every token gets {k} experts in every layer, whatever the uncertainty about it"
    load = source.located.load
    log = next((f / "run.jsonl" for f in (load.parent, load) if (f / "run.jsonl").is_file()), None)
    iteration = source.located.iteration
    steps = [] if log is None else [s for s in read_run(log).steps if s.layers]
    steps = [s for s in steps if isinstance(iteration, int) and s.step <= iteration]
    if not steps:
        return f"{text}; how often that differs was not measured: there is no run log"
    layers = steps[-1].layers
    same = [layer.k_histogram[k] if k < len(layer.k_histogram) else 0.0 for layer in layers]
    share = 1.0 - sum(same) / len(same)
    mean = sum(layer.k_eff for layer in layers) / len(layers)
    return (
        f"{text}: another number for {share:.1%} of the tokens and layers of step "
        f"{steps[-1].step}, the last logged before the checkpoint, which had {mean:.2f} on average"
    )


def _build(architecture: Architecture, config: dict[str, Any], k: int, ids: dict[str, Any]) -> Any:
    """The empty model."""
    import transformers

    routers = config["routers"]
    dense = [layer for layer, spec in enumerate(routers) if spec is None]
    rules = {spec["weights"] for spec in routers if spec is not None}
    is_mixtral = not architecture.has_dense
    width = config["moe_intermediate_size"]
    both = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "dtype"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
        "initializer_range",
    )
    settings = {
        **{name: config[name] for name in both},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **ids,
        "rms_norm_eps": config["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config["rope"]["theta"])},
        "num_experts_per_tok": k,
        "sliding_window": None,
        "intermediate_size": width if is_mixtral else config["intermediate_size"],
        "num_local_experts" if is_mixtral else "num_experts": config["num_experts"],
    }
    if not is_mixtral:
        settings["moe_intermediate_size"] = width
        settings["mlp_only_layers"] = dense
        settings["norm_topk_prob"] = rules == {"softmax_after"}
    of_kind = getattr(transformers, f"{architecture.kind}Config")(**settings)
    model = getattr(transformers, f"{architecture.kind}ForCausalLM")(of_kind)
    return model.to(of_kind.dtype)


def _renamed(weights: dict[str, torch.Tensor], *, has_head: bool) -> dict[str, torch.Tensor]:
    """The weights by transformers' names; tied to the embeddings, the head has one there too."""
    found = {
        name.replace("mlp.router.", "mlp.gate.").replace("up_proj", "gate_up_proj")
        if ".router." in name or ".experts." in name
        else name: tensor
        for name, tensor in weights.items()
        if ".frozen." not in name
    }
    return found if has_head else {**found, "lm_head.weight": found["model.embed_tokens.weight"]}
