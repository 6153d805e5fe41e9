"""Composition, overrides, resolution, and the messages of what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from uar_megatron.config import UARConfig, parse_section
from uar_megatron.errors import ConfigError
from uar_megatron.experiment import (
    builtin_config_dir,
    load_experiment,
    load_uar_section,
    save_resolved,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """An experiment with groups of its own beside it."""
    write(tmp_path / "model" / "small.yaml", "num_layers: 2\nhidden_size: 64\n")
    write(tmp_path / "model" / "large.yaml", "defaults:\n  - model: small\nnum_layers: 9\n")
    write(tmp_path / "routing" / "ae.yaml", "uar: {policy: uar, budget: {alpha: 0.5, k_max: 3}}\n")
    return write(
        tmp_path / "mine.yaml",
        "defaults:\n  - model: small\n  - routing: ae\n"
        "run: {name: me, dir: 'out/${run.name}'}\nsave: ${run.dir}/ckpt\nlr: 1e-3\n"
        "seed: ${oc.env:MY_SEED,7}\nuar: {budget: {alpha: 0.75}}\n",
    )


def test_later_wins_and_the_command_line_wins_over_all(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(mine)
    assert experiment.megatron == {
        "num_layers": 2, "hidden_size": 64, "save": "out/me/ckpt", "lr": 1e-3, "seed": "7",
    }  # fmt: skip
    assert isinstance(experiment.megatron["lr"], float)
    # What comes from the environment is text; the argument's own type reads it.
    assert experiment.uar.budget.alpha == 0.75
    assert experiment.uar.budget.k_max == 3
    monkeypatch.setenv("MY_SEED", "11")
    overrides = ["model=large", "uar.budget.alpha=2", "run.name=you", "lr=5e-4", "min_lr=null"]
    changed = load_experiment(mine, overrides)
    assert changed.megatron["num_layers"] == 9
    assert changed.megatron["hidden_size"] == 64
    assert changed.megatron["save"] == "out/you/ckpt"
    assert (changed.megatron["lr"], changed.megatron["min_lr"]) == (5e-4, None)
    assert (changed.megatron["seed"], changed.uar.budget.alpha) == ("11", 2.0)


def test_a_group_can_be_added_and_comes_from_the_package(mine: Path) -> None:
    experiment = load_experiment(mine, ["parallel=cpu_ep2"])
    assert experiment.launch.device == "cpu"
    assert experiment.launch.nproc_per_node == 2
    assert experiment.megatron["expert_model_parallel_size"] == 2


def test_a_group_that_only_another_group_builds_upon_is_added(mine: Path) -> None:
    write(mine.parent / "cluster" / "big.yaml", "defaults:\n  - parallel: wide\nlr: 5e-4\n")
    write(mine.parent / "parallel" / "wide.yaml", "tensor_model_parallel_size: 8\n")
    write(mine.parent / "parallel" / "narrow.yaml", "tensor_model_parallel_size: 1\n")
    chosen = load_experiment(mine, ["cluster=big"]).megatron
    assert chosen["tensor_model_parallel_size"] == 8
    chosen = load_experiment(mine, ["cluster=big", "parallel=narrow"]).megatron
    assert chosen["tensor_model_parallel_size"] == 1


def test_the_resolved_configuration_loads_as_the_same(mine: Path, tmp_path: Path) -> None:
    experiment = load_experiment(mine)
    save_resolved(experiment, tmp_path / "saved")
    assert load_experiment(tmp_path / "saved" / "config.yaml") == experiment
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["config.yaml"]
    assert load_uar_section(tmp_path / "saved" / "config.yaml") == experiment.uar


@pytest.mark.parametrize("name", ["1e-3", "1e5", "12e03", "nan", "0x1f", "yes", "it's", "a: b", ""])
def test_text_that_looks_like_something_else_stays_text(
    mine: Path, tmp_path: Path, name: str
) -> None:
    experiment = load_experiment(mine)
    run = experiment.run.model_copy(update={"name": name})
    experiment = dataclasses.replace(experiment, run=run)
    save_resolved(experiment, tmp_path / "saved")
    assert load_experiment(tmp_path / "saved" / "config.yaml") == experiment


def test_the_uar_section_may_stand_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "uar.yaml", "policy: uar\nbudget: {k_max: 2}\n")
    assert load_uar_section(path).budget.k_max == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults:\n  - model: smal\n", ["small", "did you mean"]),
        ("defaults:\n  - mine\n", ["include each other"]),
        ("defaults:\n  - {a: b, c: d}\n", ["group: name"]),
        ("uar: {clb: {start: 3}}\n", ["uar.clb.start", "did you mean 'start_step'"]),
        ("uar: {budget: 3}\n", ["uar.budget"]),
        ("uarr: {policy: uar}\n", ["uarr", "did you mean 'uar'"]),
        ("lr: ${run.nothing}\n", ["nothing"]),
        ("uar: {clb: {lambda_lo: 3}}\n", ["uar.clb.lambda_lo", "above lambda_hi = 1.0"]),
        ("launch: {nproc_per_node: 0}\n", ["launch.nproc_per_node", "greater than or equal to 1"]),
        ("a: [1\n", ["line 2"]),
    ],
)
def test_what_is_refused_says_why(mine: Path, text: str, words: list[str]) -> None:
    mine.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_experiment(mine)
    for word in words:
        assert word in str(error.value)
    assert "pydantic" not in str(error.value)


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_section(UARConfig, {"temperature": -1, "budget": {"alpha": "much"}}, "uar")
    assert "uar.temperature" in str(error.value)
    assert "uar.budget.alpha" in str(error.value)


def leaves(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            found += leaves(type(field.default), (*prefix, name))
        else:
            found.append((*prefix, name))
    return found


# What these may be is known to the policies alone, which refuse it at start-up.
OPEN = {("policy",): str, ("options",): dict}


@given(
    path=st.sampled_from(leaves(UARConfig)),
    value=st.one_of(st.just(float("nan")), st.just(["x"]), st.just({"a": 1}), st.just("nonsense")),
)
@settings(deadline=None)
def test_any_field_refuses_nonsense_under_its_own_name(
    path: tuple[str, ...], value: object
) -> None:
    assume(not isinstance(value, OPEN.get(path, ())))
    nested: object = value
    for part in reversed(path):
        nested = {part: nested}
    with pytest.raises(ConfigError, match=r"\.".join(("uar", *path))):
        parse_section(UARConfig, nested, "uar")


@pytest.mark.parametrize("path", sorted(builtin_config_dir().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_loads(path: Path) -> None:
    experiment = load_experiment(path)
    assert yaml.safe_load(experiment.to_yaml())["uar"]["policy"] in ("topk", "uar")


@pytest.mark.parametrize(
    "routing", sorted(file.stem for file in (builtin_config_dir() / "routing").glob("*.yaml"))
)
def test_every_routing_goes_with_the_demo(routing: str) -> None:
    load_experiment(builtin_config_dir() / "demo.yaml", [f"routing={routing}"])
