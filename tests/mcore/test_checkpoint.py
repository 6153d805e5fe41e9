"""What is said of a checkpoint before it is loaded."""

from __future__ import annotations

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.mcore.async_save import check_async_save
from uar_megatron.mcore.checkpoint import (
    TRACKER,
    check_checkpoint,
    check_on_every_rank,
    find_problem,
    load_data_only,
    name_newest_checkpoint,
    unsafe_checkpoints_refused,
)


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def save(load: Path, step: int, common: Any = None) -> Path:
    """A small checkpoint in Megatron's ``torch_dist`` format."""
    folder = load / f"iter_{step:07d}"
    state = {"weight": torch.zeros(100), "common_state/shard_0_1": common or [{"iteration": step}]}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (load / TRACKER).write_text(str(step))
    return folder


def arguments(load: Path | None, **changes: Any) -> Namespace:
    given = {
        "load": None if load is None else str(load),
        "save": None if load is None else str(load),
        "pretrained_checkpoint": None,
        "moe_use_upcycling": False,
        "ckpt_step": None,
        "exit_on_missing_checkpoint": False,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "no_load_optim": False,
        "finetune": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
    }
    return Namespace(**(given | changes))


@pytest.fixture
def load(tmp_path: Path) -> Path:
    """Two complete checkpoints; the tracker names the second."""
    save(tmp_path / "checkpoints", 10)
    save(tmp_path / "checkpoints", 20)
    return tmp_path / "checkpoints"


def test_complete_checkpoints_pass(load: Path) -> None:
    check_checkpoint(arguments(load))
    check_checkpoint(arguments(load, ckpt_step=10))
    assert find_problem(load / "iter_0000020") is None


def test_optimizer_state_stays_with_one_or_several_expert_parallel_ranks(tmp_path: Path) -> None:
    saved = {"args": Namespace(expert_model_parallel_size=2), "optimizer": {"state": 1}}
    save(tmp_path, 10, common=[saved])
    check_checkpoint(arguments(tmp_path, expert_model_parallel_size=4))
    with pytest.raises(ConfigError, match="no_load_optim"):
        check_checkpoint(arguments(tmp_path))
    check_checkpoint(arguments(tmp_path, no_load_optim=True))
    save(tmp_path, 10, common=[{"args": saved["args"]}])
    check_checkpoint(arguments(tmp_path))


def test_optimizer_state_that_is_not_loaded_need_not_fit(tmp_path: Path) -> None:
    saved = {"args": Namespace(expert_model_parallel_size=2), "optimizer": {"state": 1}}
    pretrained, new = tmp_path / "pretrained", str(tmp_path / "new")
    folder = save(pretrained, 10, common=[saved])
    check_checkpoint(arguments(tmp_path / "new", pretrained_checkpoint=str(pretrained)))
    folder.rename(pretrained / "release")
    (pretrained / TRACKER).write_text("release")
    check_checkpoint(arguments(pretrained, save=new))


SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@pytest.mark.parametrize("size", SIZES)
def test_the_distributed_optimizer_in_another_layout(size: str, tmp_path: Path) -> None:
    saved = {"args": Namespace(**dict.fromkeys(SIZES, 2)), "optimizer": {}}
    content = {"distrib_optim_sharding_type": "dp_reshardable"}
    layout: dict[str, int] = dict.fromkeys(SIZES, 2)
    save(tmp_path, 10, common=[saved | {"content_metadata": content}])
    check_checkpoint(arguments(tmp_path, **layout))
    with pytest.raises(ConfigError, match=r"no_load_optim(.|\n)*optim_fully_reshardable") as caught:
        check_checkpoint(arguments(tmp_path, **layout | {size: 4}))
    assert caught.value.field == size
    check_checkpoint(arguments(tmp_path, **layout | {size: 4}, no_load_optim=True))
    content = {"distrib_optim_sharding_type": "fully_reshardable"}
    save(tmp_path, 10, common=[saved | {"content_metadata": content}])
    check_checkpoint(arguments(tmp_path, **layout | {size: 4}))


def test_a_new_run_has_nothing_to_load(tmp_path: Path) -> None:
    check_checkpoint(arguments(None))
    check_checkpoint(arguments(tmp_path / "new"))


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lost data": (lambda f: data_file(f).unlink(), "__0_0.distcp is missing"),
    "data cut short": (lambda f: cut(data_file(f)), "bytes and should have"),
    "no description": (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
    "description cut short": (lambda f: cut(f / ".metadata"), ".metadata is damaged"),
    "description empty": (lambda f: (f / ".metadata").write_bytes(b""), ".metadata is damaged"),
    "another description": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "it does not describe a checkpoint",
    ),
    "no metadata.json": (lambda f: (f / "metadata.json").unlink(), "metadata.json, written last"),
    "empty metadata.json": (
        lambda f: (f / "metadata.json").write_text(""),
        "metadata.json is damaged",
    ),
    "damaged common.pt": (
        lambda f: (f / "common.pt").write_bytes(b"PK\x03\x04"),
        "the common state in common.pt is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_refused_with_the_way_out(damage: str, load: Path) -> None:
    inflict, problem = DAMAGE[damage]
    inflict(load / "iter_0000020")
    with pytest.raises(DataError) as caught:
        check_checkpoint(arguments(load))
    assert problem in str(caught.value)
    assert "ckpt_step=10" in str(caught.value)
    check_checkpoint(arguments(load, ckpt_step=10))


def test_the_only_checkpoint_is_broken(tmp_path: Path) -> None:
    data_file(save(tmp_path, 5)).unlink()
    with pytest.raises(DataError, match="no other checkpoint there is complete"):
        check_checkpoint(arguments(tmp_path))


@pytest.mark.parametrize("text", ["", "twenty", "-3", "20 30", "\x00\xff"])
def test_a_tracker_that_is_no_number_is_refused(text: str, load: Path) -> None:
    (load / TRACKER).write_text(text)
    elsewhere = str(load.parent / "other")
    for step in (None, 20):  # Megatron reads the tracker in any case
        with pytest.raises(DataError, match=r"should hold an iteration(.|\n)*write 20 into") as no:
            check_checkpoint(arguments(load, save=elsewhere, ckpt_step=step))
    assert "ckpt_step" not in str(no.value)
    (load / TRACKER).write_text("20")
    check_checkpoint(arguments(load, save=elsewhere))


def test_a_tracker_may_be_lost_or_name_nothing(load: Path, tmp_path: Path) -> None:
    (load / TRACKER).write_text("30")
    with pytest.raises(DataError, match=r"iter_0000030 does not exist(.|\n)*ckpt_step=20"):
        check_checkpoint(arguments(load))
    (load / TRACKER).unlink()
    elsewhere = str(tmp_path / "other")
    with pytest.raises(DataError, match="has checkpoints, but no"):
        check_checkpoint(arguments(load, save=elsewhere))
    check_checkpoint(arguments(load, save=elsewhere, ckpt_step=20))


@pytest.mark.parametrize("text", [None, ""])
def test_a_run_killed_before_it_named_its_checkpoint_goes_on(
    text: str | None, load: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = load / TRACKER
    (save(load, 30) / ".metadata").unlink()  # and killed in the middle of the next save
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    before = sorted(load.iterdir())
    check_checkpoint(arguments(load))  # as a dry run does
    assert sorted(load.iterdir()) == before
    name_newest_checkpoint(arguments(load, save=str(load / "other")))
    assert sorted(load.iterdir()) == before
    name_newest_checkpoint(arguments(load))
    assert tracker.read_text() == "20"
    assert {path.name for path in load.iterdir()} == {TRACKER, *(f"iter_00000{n}0" for n in "123")}
    assert "going on from the newest, 20" in caplog.text
    check_checkpoint(arguments(load))
    shutil.rmtree(load / "iter_0000010")
    shutil.rmtree(load / "iter_0000020")
    tracker.write_text("")
    check_checkpoint(arguments(load))
    name_newest_checkpoint(arguments(load))
    assert not tracker.exists()
    check_checkpoint(arguments(load))


def refuse_to_read(*args: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_whatever_goes_wrong_every_rank_hears_of_it(
    load: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda verdict, src: said.append(verdict[0])
    )
    check_on_every_rank(arguments(load))
    (load / "iter_0000020").rename(load / "iter_0000020.bad")
    with pytest.raises(DataError, match=r"does not exist(.|\n)*ckpt_step=10"):
        check_on_every_rank(arguments(load))
    save(load / "non_persistent", 25)
    (load / TRACKER).write_text("10")
    (load / "non_persistent" / TRACKER).write_text("release")
    with pytest.raises(DataError, match="is no checkpoint that a run saves"):
        check_on_every_rank(arguments(load, non_persistent_ckpt_type="global"))
    monkeypatch.setattr("uar_megatron.mcore.checkpoint.find_problem", refuse_to_read)
    with pytest.raises(DataError, match=r"cannot be checked: PermissionError") as caught:
        check_on_every_rank(arguments(load))
    assert said[0] is None
    assert said[-1] == str(caught.value)


def test_a_place_to_load_from_must_have_something(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing to load"):
        check_checkpoint(arguments(tmp_path / "typo", save=str(tmp_path)))
    with pytest.raises(DataError, match="there is nothing to load"):
        check_checkpoint(arguments(tmp_path, exit_on_missing_checkpoint=True))


def test_the_pretrained_checkpoint_is_looked_at(load: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path / "new", pretrained_checkpoint=str(load))
    check_checkpoint(args)
    data_file(load / "iter_0000020").unlink()
    with pytest.raises(DataError, match="is missing"):
        check_checkpoint(args)


def test_a_non_persistent_checkpoint_is_looked_at(load: Path) -> None:
    folder = save(load / "non_persistent", 25)
    args = arguments(load, non_persistent_ckpt_type="global")
    check_checkpoint(args)
    data_file(folder).unlink()
    with pytest.raises(DataError, match="iter_0000025 is incomplete"):
        check_checkpoint(args)


def test_the_legacy_format(tmp_path: Path) -> None:
    part = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    part.parent.mkdir(parents=True)
    assert "missing or empty" in str(find_problem(tmp_path / "iter_0000005"))
    torch.save({}, part)
    assert find_problem(tmp_path / "iter_0000005") is None


def test_no_pickle_of_a_checkpoint_runs_a_program(load: Path, tmp_path: Path) -> None:
    """In common.pt, in the common state of today's format, and in torch's own description."""
    harm = tmp_path / "harm"
    torch.save({"iteration": 10, "args": Malice(harm)}, load / "iter_0000010" / "common.pt")
    save(load, 20, common=[{"args": Malice(harm)}])
    (save(load, 30) / ".metadata").write_bytes(pickle.dumps(Malice(harm)))
    for step in (10, 20):
        with pytest.raises(DataError, match=r"not just data: reading it would call posix.mkdir"):
            check_checkpoint(arguments(load, ckpt_step=step))
    with pytest.raises(DataError, match=r"it names posix.mkdir, which does not belong there"):
        check_checkpoint(arguments(load))
    assert not harm.exists()


def test_names_with_dots_reach_nothing(load: Path) -> None:
    """A pickle may name an attribute of an attribute: torch.distributed….filesystem's os.mkdir."""
    (load / "iter_0000020" / ".metadata").write_bytes(
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93."
    )
    with pytest.raises(DataError, match=r"it names torch.distributed.checkpoint.filesystem.os"):
        check_checkpoint(arguments(load))


def test_loading_is_safe_afterwards(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch asks for the opposite, as in torch.distributed.checkpoint."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    load_data_only()
    save(load, 20, common=[{"args": Malice(tmp_path / "harm")}])
    state: dict[str, Any] = {"common_state/shard_0_1": None}
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with (
        pytest.raises(DataError, match=r"is not just data(.|\n)*from a source that you trust"),
        unsafe_checkpoints_refused(str(load)),
    ):
        torch.distributed.checkpoint.load(
            state, checkpoint_id=load / "iter_0000020", planner=planner, no_dist=True
        )
    assert not (tmp_path / "harm").exists()


def test_unsafe_loading_is_not_for_the_environment_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        load_data_only()


def test_async_save_says_what_it_needs() -> None:
    args = Namespace(async_save=True, use_persistent_ckpt_worker=False, async_strategy="mcore")
    with pytest.raises(ConfigError, match="use_persistent_ckpt_worker: true"):
        check_async_save(args)
    args.use_persistent_ckpt_worker, args.async_strategy = True, "nvrx"
    with pytest.raises(ConfigError, match="set async_strategy: mcore"):
        check_async_save(args)
    args.async_strategy = "mcore"
    check_async_save(args)
