"""Run Megatron-LM's own MoE unit tests twice, with the stock classes and with ours in their place.

Ours are switched off (α = 0, β = K), so what passes with Megatron's classes must pass with ours.
The tests are not part of the megatron-core wheel: check out Megatron-LM at the tag of the installed
version first. Without a GPU the CPU layer stands in, and tests that need a GPU fail on both sides.

    git clone --branch core_v0.19.0 --depth 1 https://github.com/NVIDIA/Megatron-LM
    python scripts/megatron_unit_tests.py Megatron-LM --ranks 1 --ranks 2
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError

SUITES = (
    "transformer/moe/test_routers.py",
    "transformer/moe/test_aux_loss.py",
    "transformer/moe/test_moe_layer.py",
    "transformer/moe/test_token_dispatcher.py",
    "transformer/moe/test_a2a_token_dispatcher.py",
    "transformer/moe/test_shared_experts.py",
    "transformer/moe/test_qb_routing.py",
    "transformer/moe/test_router_replay.py",
)
# Every test makes process groups anew, and gloo never gives a group's threads back.
TESTS_PER_JOB = 8
DID_NOT_RUN = "did not run"
PLUGIN = "UAR_MEGATRON_TESTS"  # which classes a child runs, told by the parent


def install(classes: str) -> None:
    """Put our classes where Megatron's tests and layer specs look for theirs."""
    from uar_megatron.mcore import cpu

    if not torch.cuda.is_available():
        cpu.enable()
        # The tests ask for NCCL by name. A test that fails on one rank makes the others wait.
        for name in ("init_process_group", "new_group"):
            start = getattr(torch.distributed, name)
            start = functools.partial(_start_group, start)
            setattr(torch.distributed, name, start)
    if classes != "ours":
        return
    from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
    from megatron.core.transformer.moe import moe_layer, router, token_dispatcher

    from uar_megatron.config import UARConfig
    from uar_megatron.mcore.moe_layer import UARMoELayer
    from uar_megatron.mcore.router import UARRouter
    from uar_megatron.mcore.token_dispatcher import UARAlltoAllTokenDispatcher

    class Router(UARRouter):
        """Ours, off, with the arguments of Megatron's."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            k = config.moe_router_topk
            budget = {"alpha": 0.0, "beta": float(k), "k_min": 0, "k_max": max(k, 1)}
            uar = UARConfig.model_validate({"policy": "uar", "budget": budget})
            super().__init__(config, *args, uar=uar, **kwargs)

    class Layer(UARMoELayer):
        """Ours, for specs that name no router or Megatron's."""

        def __init__(self, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
            if submodules is not None and submodules.router is stock_router:
                submodules.router = Router
            super().__init__(config, submodules, *args, **kwargs)

    stock_router = router.TopKRouter
    _replaced[stock_router] = Router
    _replaced[moe_layer.MoELayer] = Layer
    _replaced[token_dispatcher.MoEAlltoAllTokenDispatcher] = UARAlltoAllTokenDispatcher
    for module in (gpt_layer_specs, moe_module_specs):
        _replace_in(module)
    # Megatron's own module calls its layer by name; only the dispatcher is exchanged there.
    moe_layer.MoEAlltoAllTokenDispatcher = UARAlltoAllTokenDispatcher


def _start_group(start: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return start(*args, **kwargs | {"backend": "gloo", "timeout": timedelta(seconds=60)})


_replaced: dict[type, type] = {}


def _replace_in(module: Any) -> None:
    for name, value in vars(module).copy().items():
        if isinstance(value, type) and value in _replaced:
            setattr(module, name, _replaced[value])


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: every rank writes a report of its own."""
    if config.option.xmlpath:
        config.option.xmlpath += f".{os.environ.get('RANK', '0')}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """As a plugin: a rank that has failed tests must not have torchrun kill the others."""
    session.exitstatus = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """As a plugin: tests that want CUDA are collected; the CPU layer may do for them."""
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        return (yield)
    finally:
        torch.cuda.is_available = available


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """As a plugin: the tests' own imports become ours too."""
    for module in {item.module for item in items}:
        _replace_in(module)


def main(
    megatron_lm: Annotated[Path, typer.Argument(help="checkout of Megatron-LM")],
    ranks: Annotated[list[int] | None, typer.Option(help="gloo ranks; several times")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="files under tests/unit_tests")] = None,
    timeout: Annotated[int, typer.Option(help="seconds per job of a few tests")] = 300,
) -> None:
    """Compare the outcome of every test; exit code 1 if one passes with stock and not with ours.

    What fails with ours gets a second try.
    """
    folder = megatron_lm / "tests" / "unit_tests"
    if not folder.is_dir():
        raise UARError(f"{folder}: no such folder; give a checkout of Megatron-LM")
    worse = []
    for count in ranks or [1]:
        for name in suite or SUITES:
            stock = outcomes(megatron_lm, folder / name, count, "stock", timeout)
            ours = outcomes(megatron_lm, folder / name, count, "ours", timeout)
            if set(stock.values()) <= {DID_NOT_RUN}:
                raise UARError(f"{name}, {count} ranks: no test ran with Megatron's own classes")
            passed = {test for test, outcome in stock.items() if outcome == "passed"}
            lost = sorted(test for test in passed if ours.get(test) != "passed")
            if lost:  # some tests draw random data without a seed
                again = outcomes(megatron_lm, folder / name, count, "ours", timeout)
                lost = [test for test in lost if again.get(test) != "passed"]
            worse += lost
            print(
                f"{name}, {count} ranks: {len(stock)} tests, {len(passed)} pass with Megatron's "
                f"classes, {len(passed) - len(lost)} of these with ours; did not run: "
                f"{_not_run(stock)} with Megatron's, {_not_run(ours)} with ours",
                flush=True,
            )
            for test in lost:
                print(f"  {test}: {ours.get(test, DID_NOT_RUN)}", flush=True)
    raise SystemExit(1 if worse else 0)


def outcomes(root: Path, file: Path, ranks: int, classes: str, timeout: int) -> dict[str, str]:
    """Run one file under torchrun; return each test's outcome, "passed" if it is so on all ranks.

    A job that runs out of time leaves no report; its tests did not run.
    """
    search = os.pathsep.join((str(Path(__file__).parent), str(root.absolute())))
    environment = os.environ | {PLUGIN: classes, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    options = ("-p", Path(__file__).stem, "-p", "no:cacheprovider", "-q", "-o", "addopts=")
    command = ["-m", "pytest", *options, "-W", "ignore"]
    collect = [sys.executable, *command, "--collect-only", str(file.absolute())]
    listing = subprocess.run(
        collect, cwd=root, env=environment, capture_output=True, text=True, check=False
    ).stdout
    tests = [line for line in listing.splitlines() if "::" in line]
    found = {_reported_name(test): DID_NOT_RUN for test in tests}
    for some in itertools.batched(tests, TESTS_PER_JOB):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc_per_node", str(ranks), *command, *some]
        found |= _report_of(torchrun, root, environment, timeout, ranks)
    return found


def _reported_name(test: str) -> str:
    """The name that a report has for ``folder/file.py::Class::name[parameters]``."""
    address, bracket, parameters = test.partition("[")
    file, *classes, name = address.split("::")
    module = file.removesuffix(".py").replace("/", ".")
    return f"{'.'.join([module, *classes])}::{name}{bracket}{parameters}"


def _not_run(outcomes: dict[str, str]) -> int:
    return list(outcomes.values()).count(DID_NOT_RUN)


def _report_of(
    command: list[str], root: Path, environment: dict[str, str], timeout: int, ranks: int
) -> dict[str, str]:
    report = Path(f".megatron_unit_tests.{os.getpid()}.xml").absolute()
    job = subprocess.Popen(
        [*command, f"--junitxml={report}"],
        cwd=root,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        job.wait(timeout)
        return _worst([ElementTree.parse(f"{report}.{rank}") for rank in range(ranks)])
    except (subprocess.TimeoutExpired, OSError, ElementTree.ParseError):
        return {}
    finally:
        # Whatever ranks are left would go on waiting for each other.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for rank in range(ranks):
            Path(f"{report}.{rank}").unlink(missing_ok=True)


def _worst(reports: list[Any]) -> dict[str, str]:
    """The outcome of each test over all ranks: "passed" only if it is so on every one."""
    found: dict[str, str] = {}
    passes: Counter[str] = Counter()
    for tree in reports:
        for case in tree.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            passes[name] += not kinds
            found[name] = next(iter(kinds), found.get(name, DID_NOT_RUN))
    return found | {name: "passed" for name, count in passes.items() if count == len(reports)}


if __name__ == "__main__":
    run_command(main)
elif PLUGIN in os.environ:
    # Imported by pytest as a plugin, before Megatron's own conftest.
    install(os.environ[PLUGIN])
