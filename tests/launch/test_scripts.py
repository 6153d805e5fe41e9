"""The scripts of ``launch/``: settings filled in, and what is refused before SLURM sees it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from jobs import TINY

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import Experiment, load_experiment, save_resolved
from uar_megatron.launching.command import launch_slurm, shown, torchrun_command
from uar_megatron.launching.scripts import fill_in, script_dir
from uar_megatron.launching.slurm import Batch, SlurmOptions, batch_script, minutes_of, submit
from uar_megatron.sweep.grid import load_sweep
from uar_megatron.sweep.slurm import submit_sweep
from uar_megatron.sweep.state import RUN, take_lock


def unchecked(experiments: object) -> None:
    """In place of Megatron's validation."""


def tiny(folder: Path, *overrides: str) -> Experiment:
    return load_experiment(TINY, [f"run.dir={folder}", *overrides])


def script_of(*runs: Experiment, **options: object) -> str:
    is_array = len(runs) > 1
    batch = Batch("a sweep", Path("here"), runs, is_array=is_array, at_a_time=3)
    return batch_script(batch, SlurmOptions(**options))  # type: ignore[arg-type]


def test_settings_are_read_back_by_bash(tmp_path: Path) -> None:
    words = ["plain", "two words", "it's", r"back\slash", "$HOME", "", "a=b c"]
    template = (script_dir() / "slurm.sbatch").read_text()
    text = fill_in(template, {}, {"runs": words, "container_image": words[2], "overrides": []})
    start, end = text.index("# ---- settings"), text.index("# -----------")
    print_all = r"""printf '%s\n' "${#overrides[@]}" "$container_image" "${runs[@]}" """
    said = subprocess.run(
        ["bash", "-uc", text[start:end] + print_all], capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["0", "it's", *words]


@pytest.mark.parametrize(
    "name", ["run", "the shared drive of our group " * 5, "it's: here", "a #1"]
)
def test_the_script_finds_the_checkpoints(tmp_path: Path, name: str) -> None:
    run, save = tiny(tmp_path), f"{tmp_path}/{name}/checkpoints"
    save_resolved(dataclasses.replace(run, megatron=run.megatron | {"save": save}), tmp_path)
    script = (script_dir() / "slurm.sbatch").read_text()
    (lines,) = re.findall(r"^save=\$\(.*?\)\n", script, re.MULTILINE | re.DOTALL)
    said = subprocess.run(
        ["bash", "-euc", f'{lines}\necho "$save"'],
        env=os.environ | {"run": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == f"{save}\n"


def test_directives_are_replaced_or_added(tmp_path: Path) -> None:
    text = script_of(
        tiny(tmp_path, "launch.nnodes=4"),
        time="2:00:00", partition="gpu", more=("--mem=0", "--signal=B:USR1@60", "--exclusive"),
    )  # fmt: skip
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=4" in lines
    assert "#SBATCH --partition=gpu" in lines
    assert "#SBATCH --exclusive" in lines
    assert [line for line in lines if "signal" in line] == ["#SBATCH --signal=B:USR1@60"]
    assert not any("array" in line or "gpus" in line for line in lines)
    assert text.index("#SBATCH --exclusive") < text.index("trap"), (
        "SLURM stops at the first command"
    )
    assert "overrides=(\n  exit_duration_in_mins=110\n)" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_an_array_has_a_task_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [tiny(tmp_path / f"point {i}") for i in range(3)]
    text = script_of(*runs, container="image.sqsh")
    assert "#SBATCH --array=0-2%3" in text
    assert "#SBATCH --job-name=a_sweep" in text
    assert f"  '{tmp_path}/point 1'\n" in text
    assert "\npython=python3\n" in text, "the one inside the container"
    with pytest.raises(ConfigError, match="the same nodes for every task"):
        script_of(runs[0], tiny(tmp_path, "launch.nproc_per_node=2"))


def test_what_a_container_would_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "link").symlink_to(there)
    (here / "blend.json").write_text(json.dumps({"train": ["0.5", f"{there}/a/web_train"]}))
    (there / "t.json").touch()
    monkeypatch.chdir(here)

    def start(*overrides: str, folder: str = "runs", mounts: str | None = None) -> str:
        run = tiny(Path(folder), *overrides)
        return script_of(run, container="image.sqsh", mounts=mounts)

    outside, blend = f"{there}:{there}", "per_split_data_args_path"
    start()
    start("tokenizer_model=org/name", "data_path=[1,data/x]")
    script_of(tiny(there / "runs"))  # no container
    for field, overrides, missing in (
        ("run.dir", (f"run.dir={there}/runs",), f"{there}/runs:{there}/runs"),
        ("run.dir", ("run.dir=link/runs",), f"{there}/runs:{there}/runs"),
        ("save", (f"save={there}/c", f"load={there}/c"), f"{there}/c:{there}/c"),
        ("tokenizer_model", (f"tokenizer_model={there}/t.json",), outside),
        ("train_data_path", (f"train_data_path=[0.3,{there}/web]",), outside),
        (blend, (f"{blend}=blend.json",), f"{there}/a:{there}/a"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="is not in the container") as refused:
            start(*overrides, mounts="/x:/y")
        assert refused.value.field == field
        remedy = f"--mounts /x:/y,{missing}"
        assert remedy in str(refused.value)
        start(*overrides, mounts=remedy.removeprefix("--mounts "))
        start(*overrides, mounts=outside)


def test_gpus_follow_from_the_configuration(tmp_path: Path) -> None:
    several, one = (
        tiny(tmp_path, "launch.device=cuda", "launch.nproc_per_node=8", *more)
        for more in (("launch.nnodes=2",), ("num_workers=3",))
    )
    text = script_of(several)
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --exclusive\n#SBATCH --mem=0\n" in text
    assert "--cpus-per-task" not in text
    assert "\nnproc_per_node=8\n" in text
    text = script_of(one)
    assert "#SBATCH --cpus-per-task=32\n" in text, "a core for each rank and each of its loaders"
    assert "SBATCH --exclusive" not in text
    megatron = {key: value for key, value in one.megatron.items() if key != "num_workers"}
    by_default = dataclasses.replace(one, megatron=megatron)
    assert "#SBATCH --cpus-per-task=24\n" in script_of(by_default)


def test_what_the_user_says_of_cores_and_memory_wins(tmp_path: Path) -> None:
    run = tiny(tmp_path, "launch.device=cuda")
    assert "#SBATCH --cpus-per-task=5\n" in script_of(run, more=("--cpus-per-task=5",))
    assert "#SBATCH --cpus-per-task" not in script_of(run, more=("--cpus-per-gpu=5",))
    several = tiny(tmp_path, "launch.device=cuda", "launch.nnodes=2")
    assert "#SBATCH --mem=" not in script_of(several, more=("--mem-per-gpu=90G",))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("load=null", "load"),
        ("save=null", "save"),
        ("load=elsewhere", "load"),
        ("exit_signal_handler=false", "exit_signal_handler"),
    ],
)
def test_what_could_not_come_back_is_refused(tmp_path: Path, override: str, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        script_of(tiny(tmp_path, override))
    assert refused.value.field == field
    assert "remedy" in str(refused.value)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90), ("90:30", 90), ("2:30:00", 150), ("1-0", 1440), ("1-2:30", 1590),
        ("0-0:5:0", 5), ("infinite", None), ("0", None), ("0-0", None), ("0:00:00", None),
        ("0:30", 1), ("0:00:01", 1),
    ],
)  # fmt: skip
def test_time_limits(time: str, minutes: int | None) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize("time", ["", "soon", "1h", "1:2:3:4", "-5", "1-"])
def test_no_time_limits(time: str) -> None:
    with pytest.raises(ConfigError, match="is not a time"):
        minutes_of(time)


def test_short_jobs_are_warned_half_way(tmp_path: Path) -> None:
    text = script_of(tiny(tmp_path), time="4")
    assert "#SBATCH --signal=B:USR1@120" in text
    assert "overrides=()" in text, "no time for Megatron to stop by itself"
    own = script_of(tiny(tmp_path, "exit_duration_in_mins=7"), time="120")
    assert "overrides=()" in own, "the configuration says when"
    assert "#SBATCH --signal=B:USR1@30" in script_of(tiny(tmp_path), time="0:30")
    unlimited = script_of(tiny(tmp_path), time="0")
    assert "#SBATCH --time=0" in unlimited
    assert "#SBATCH --signal=B:USR1@300" in unlimited
    assert "overrides=()" in unlimited


def test_values_of_directives_are_quoted_for_sbatch(tmp_path: Path) -> None:
    text = script_of(
        tiny(tmp_path), more=(r"""--output=/a b/"it's" #1\%j.log""", "--mem=5", "--comment=x y")
    )
    assert r"""#SBATCH --output="/a b/\"it's\" #1\\%j.log" """[:-1] in text.splitlines()
    assert '#SBATCH --comment="x y"' in text
    assert "#SBATCH --mem=5\n" in text


def test_a_bad_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mem=0' is no option of sbatch"):
        script_of(tiny(tmp_path), more=("mem=0",))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    text = launch_slurm(
        TINY, [f"run.dir={tmp_path / 'run'}"], 2, unchecked, SlurmOptions(), dry_run=True
    )
    assert "#SBATCH --nodes=2" in text
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {TINY}\ndir: {tmp_path / 'runs'}\nseeds: [1, 2]\n")
    text = submit_sweep(grid, unchecked, SlurmOptions(), at_a_time=1, dry_run=True)
    assert "#SBATCH --array=0-1%1" in text
    assert text.endswith(f"# submitted with: sbatch {tmp_path / 'runs' / 'slurm.sbatch'}")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UARError, match="sbatch: not found"):
        submit(tmp_path, "")


def test_a_refusal_of_sbatch_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    with pytest.raises(UARError, match="invalid partition"):
        submit(tmp_path / "run", "#!/bin/sh\n")
    assert not (tmp_path / "run" / "slurm.job").exists()


def test_the_command_of_every_node(tmp_path: Path) -> None:
    where = f"run.dir={tmp_path}"
    words = torchrun_command(TINY, [where, "lr=1e-3"], 3, unchecked, None, 5)
    assert Path(words[0]) == script_dir() / "torchrun.sh"
    assert words[1:5] == ["--nodes", "3", "--rendezvous", "HOST:29500"]
    assert words[-4:] == [str(TINY), where, "lr=1e-3", "launch.nnodes=3"]
    assert shown(words).startswith("PYTHON=")
    single = torchrun_command(TINY, [where], 1, unchecked, None, 0)
    assert single[1:-3] == ["--nproc", "1", "--max-restarts", "0"]


def test_torchrun_sh_leaves_ranks_time_to_save(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"\n')
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    done = subprocess.run(
        [str(script_dir() / "torchrun.sh"), "my.yaml", "lr=1"],
        capture_output=True, text=True, check=True, env=kept | {"PYTHON": str(python)},
    )  # fmt: skip
    assert done.stdout.startswith("600 -m torch.distributed.run ")
    assert done.stdout.endswith("--config my.yaml lr=1\n")
    from torch.distributed.launcher import LaunchConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        config = LaunchConfig(1, 1, 1)
    assert getattr(config, "shutdown_timeout", 600) == 600, "torch reads the variable"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage"),
        (("--nodes", "2", "x.yaml"), "needs --rendezvous"),
        (("--node", "2", "x.yaml"), "no option --node"),
        (("--nodes",), "usage"),
    ],
)
def test_torchrun_sh_refuses(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [str(script_dir() / "torchrun.sh"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr


def queue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SLURM that takes no job, and has every job in its queue."""
    for name, text in (("sbatch", "exit 1"), ("squeue", "echo RUNNING")):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_a_refused_submission_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch)
    grid, folder = tmp_path / "grid.yaml", tmp_path / "runs"
    grid.write_text(f"base: {TINY}\ndir: {folder}\nseeds: [1, 2]\n")
    for run in (folder, tmp_path / "run"):
        run.mkdir()
        (run / "slurm.job").write_text("7\n")
        (run / "config.yaml").write_text("seed: 9\n")
    with pytest.raises(UARError, match=r"job 7 .* is still in the queue \(running\)"):
        launch_slurm(TINY, [f"run.dir={run}"], 1, unchecked, SlurmOptions(), dry_run=False)
    with pytest.raises(UARError, match=r"job 7 .* is still in the queue"):
        submit_sweep(grid, unchecked, SlurmOptions(), at_a_time=None, dry_run=False)
    with pytest.raises(UARError, match=r"job 7 .* is still in the queue"):
        torchrun_command(TINY, [f"run.dir={run}"], 1, unchecked, None, 0)
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n")
    with pytest.raises(UARError, match=r"squeue: Unable to contact .*: is job 7 of .* still"):
        torchrun_command(TINY, [f"run.dir={run}"], 1, unchecked, None, 0)
    squeue.write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n"
    )
    torchrun_command(TINY, [f"run.dir={run}"], 1, unchecked, None, 0)
    (folder / "slurm.job").unlink()
    point = load_sweep(grid).points[1]
    point.folder.mkdir(parents=True)
    lock = take_lock(point.folder, RUN)
    assert lock is not None
    with pytest.raises(UARError, match="is being trained on this machine"):
        submit_sweep(grid, unchecked, SlurmOptions(), at_a_time=None, dry_run=False)
    os.close(lock)
    assert [path.read_text() for path in tmp_path.rglob("config.yaml")] == ["seed: 9\n"] * 2


def test_a_run_is_not_continued_with_another_configuration(tmp_path: Path) -> None:
    def launched(*overrides: str, nodes: int = 1) -> None:
        words = [f"run.dir={tmp_path}", *overrides]
        launch_slurm(TINY, words, nodes, unchecked, SlurmOptions(), dry_run=True)
        torchrun_command(TINY, words, nodes, unchecked, None, 0)

    save_resolved(tiny(tmp_path), tmp_path)
    launched("lr=0.02")  # nothing has been trained yet
    (tmp_path / "run.jsonl").touch()
    launched("exit_duration_in_mins=7", "launch.nproc_per_node=2", nodes=2)  # the same training
    for start in (
        lambda words: launch_slurm(TINY, words, 1, unchecked, SlurmOptions(), dry_run=True),
        lambda words: torchrun_command(TINY, words, 1, unchecked, None, 0),
    ):
        with pytest.raises(ConfigError, match=r"another configuration: lr was .*, is 0\.02") as no:
            start([f"run.dir={tmp_path}", "lr=0.02"])
        assert f"edit {tmp_path / 'config.yaml'} first" in str(no.value)
    save_resolved(tiny(tmp_path, "lr=0.02"), tmp_path)
    launched("lr=0.02")
