"""What the kernels cost, without a GPU: code generated for sm_90, launches, and bytes moved.

Every launch that the ops list for the report is compiled ahead of time for an H800 and its machine
code counted (kernel_code.py); bytes are formulas of the ops, beside those of Megatron's unfused
path and of Transformer Engine (kernel_costs.py). Writes kernels/report.json and kernels/REPORT.md,
and prints the latter.

    python scripts/kernel_report.py
    python scripts/kernel_report.py --check --only "plan"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import triton
import typer

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError

if triton.knobs.runtime.interpret:
    raise SystemExit("error: TRITON_INTERPRET is set, so nothing can be compiled; unset it")

# Beside this file, which is where a script's imports are looked for first.
import kernel_code  # type: ignore[import-not-found]
import kernel_costs  # type: ignore[import-not-found]

# A figure that is this much worse than in the committed report is an error.
TOLERANCE = 1.10
COMPARED = (
    "registers",
    "stack_bytes",
    "spill_instructions",
    "warp_instructions_per_token",
    "warp_instructions_per_token_in_all",
    "rows_128bit_share",
    "kernels",
    "torch_operations",
    "host_syncs",
    "ratio",
    "share_of_permutation",
)
HIGHER_IS_BETTER = "rows_128bit_share"
PERMUTATION = ("permute", "permute backward", "unpermute", "unpermute backward")
# What the kernels were written to meet: what, in which table, which figure, the limit.
LIMITS = (
    ("routing forward", "code", "registers", 96),
    ("routing backward", "code", "registers", 128),
    ("plan count_kernel", "code", "registers", 64),
    ("plan rank_kernel", "code", "registers", 64),
    *((name, "code", "registers", 48) for name in PERMUTATION),
    *((name, "code", "rows_128bit_share", 1) for name in PERMUTATION),
    ("router forward", "launches", "kernels", 1),
    ("router forward, two launches", "launches", "kernels", 2),
    ("router backward", "launches", "kernels", 1),
    ("plan", "launches", "kernels", 2),
    *((name, "launches", "kernels", 1) for name in PERMUTATION),
    ("logits to permuted rows", "launches", "kernels", 5),
    ("logits to permuted rows", "launches", "host_syncs", 0),
    ("router forward", "bytes", "ratio", 1.15),
    ("router forward, two launches", "bytes", "ratio", 2.0),
    ("router backward", "bytes", "ratio", 1.1),
    ("plan", "bytes", "share_of_permutation", 0.03),
    *((name, "bytes", "ratio", 1.03) for name in PERMUTATION),
)
# Warp-instructions per token at K=8, for each number of experts.
INSTRUCTION_LIMITS = {
    "routing forward": {8: 65, 16: 85, 64: 350, 256: 1000},
    "routing backward": {8: 40, 16: 50, 64: 130, 256: 380},
}
PLAN_INSTRUCTION_LIMIT = 100  # counting and ranking together
INTRODUCTION = (
    "Written by `make kernel-report`; `report.json` has every figure. **Nothing is measured**: "
    "code is compiled for sm_90 by Triton {} and counted; bytes and times are computed."
)
TARGETS_HEADER = "target, limit, worst, where, met"
TARGETS_HELP = (
    "The limits the kernels were written to meet; met when no case is over the limit. Of the "
    "router's forward the loops over tokens are held against it; for what comes on top see *in "
    "all* below."
)
CODE_HEADER = (
    "kernel, registers, spills, shared bytes, warp-instructions per token, in all, outside loops, "
    "last program, rows in 128 bits"
)
CODE_HELP = (
    "Per token: of the router's forward its loops over tiles and statistics; *in all* shares out a "
    "launch of 32768 tokens, with each program's sums (*outside loops*: instructions of a warp), "
    "without what the *last program* does once a launch."
)
LAUNCHES_HEADER = "operation, kernels, torch operations, host syncs, Megatron at least, TE at least"
LAUNCHES_HELP = (
    "Ours are counted by calling the public functions with kernels that only count; Megatron's "
    "and Transformer Engine's are read from their sources."
)
BYTES_HEADER = (
    "operation, minimum, ours/minimum, of the permutation, Megatron/minimum, TE/minimum, ours µs, "
    "Megatron µs, TE µs"
)
BYTES_HELP = (
    "µs: bytes at 3.35 TB/s (H800), **computed, not measured**. Megatron and TE: lower bounds, "
    "read from their sources, for k equal to our mean k; ours have twice as many columns. Two "
    "launches: the second reads the logits again, here from DRAM. The minimum of the permutation "
    "has 12 bytes a row for ids and probabilities, of which unpermute needs fewer."
)
SHOWN = re.compile(r"T=16384($|, H=2048)")  # of the table of bytes
Figures = dict[str, Any]


def main(
    check: Annotated[
        bool, typer.Option("--check", help="compile again and compare with the report")
    ] = False,
    only: Annotated[
        str, typer.Option(help="with --check: kernels and formulas whose name contains this")
    ] = "",
    report: Annotated[Path, typer.Option(help="report.json; REPORT.md goes beside it")] = Path(
        "kernels/report.json"
    ),
) -> None:
    """Write the report, or say what got worse by more than 10 %."""
    if only and not check:
        raise UARError("--only goes with --check: a report has all kernels")
    committed = json.loads(report.read_text()) if check else {"triton": triton.__version__}
    compares_code = committed["triton"] == triton.__version__
    figures: Figures = {
        "triton": triton.__version__,
        "code": {
            name: kernel_code.code(entry)
            for name, entry in kernel_code.entries()
            if compares_code and only in name
        },
        "launches": {n: count for n, count in kernel_costs.launches().items() if only in n},
        "bytes": {n: row for n, row in kernel_costs.traffic() if only in n},
    }
    if check:
        if not compares_code:
            print(
                f"the report is of Triton {committed['triton']}, this is {triton.__version__}: "
                "what the compiler makes of the kernels is NOT compared"
            )
            committed["code"] = {}
        worse = differences(committed, figures, only)
        if worse:
            print(*worse, sep="\n")
            print(f"{len(worse)} figures are worse than in {report}, or not the same figures")
            raise typer.Exit(1)
        print(f"{len(dict(compared(figures)))} figures compared, none is worse by more than 10 %")
        return
    figures["targets"] = targets(figures)
    report.write_text(json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    text = markdown(figures)
    report.with_name("REPORT.md").write_text(text)
    print(text)


def compared(figures: Figures, only: str = "") -> Iterator[tuple[str, float]]:
    """Every figure that must not get worse, with its name."""
    for table in ("code", "launches", "bytes"):
        for case, row in figures[table].items():
            for figure in COMPARED:
                if figure in row and only in case:
                    yield f"{case}: {figure}", row[figure]


def differences(committed: Figures, figures: Figures, only: str) -> list[str]:
    """What is worse than in the committed report, missing or new, a line each."""
    before, now = dict(compared(committed, only)), dict(compared(figures))
    lines = [f"{name}: not in the report; write it again" for name in sorted(now.keys() - before)]
    lines += [f"{name}: gone; write the report again" for name in sorted(before.keys() - now)]
    for name in sorted(now.keys() & before):
        good, bad = before[name], now[name]
        if name.endswith(HIGHER_IS_BETTER):
            good, bad = bad, good
        if bad > good * TOLERANCE:
            lines.append(f"{name}: {before[name]} in the report, now {now[name]}")
    return lines


def targets(figures: Figures) -> Figures:
    """For each target the limit, the figure that is nearest to it or over it, and all over it."""
    code = figures["code"]
    found: dict[str, tuple[float, dict[str, float]]] = {}
    for what, table, figure, limit in LIMITS:
        rows = {
            name: row[figure]
            for name, row in figures[table].items()
            if name == what or name.startswith(f"{what}: ")
        }
        found[f"{what}: {figure}"] = limit, rows
    for kernel, limits in INSTRUCTION_LIMITS.items():
        for experts, limit in limits.items():
            name = f"{kernel}: E={experts}, K=8"
            rows = {name: code[name]["warp_instructions_per_token"]}
            found[f"{name}: warp_instructions_per_token"] = limit, rows
    ranks = [name for name in code if name.startswith("plan rank_kernel")]
    rows = {
        name.replace("plan rank_kernel", "plan"): round(
            sum(
                code[kernel]["warp_instructions_per_token"]
                for kernel in (name, name.replace("rank_kernel", "count_kernel"))
            ),
            1,
        )
        for name in ranks
    }
    found["plan: warp_instructions_per_token"] = PLAN_INSTRUCTION_LIMIT, rows
    spills = {name: row["spill_instructions"] + row["stack_bytes"] for name, row in code.items()}
    found["all kernels: spills"] = 0, spills
    return {name: against(limit, rows, name) for name, (limit, rows) in found.items()}


def against(limit: float, rows: dict[str, float], name: str) -> Figures:
    """The row of a target."""
    sign = -1 if name.endswith(HIGHER_IS_BETTER) else 1
    worst = max(rows, key=lambda case: sign * rows[case])
    over = {case: value for case, value in rows.items() if sign * value > sign * limit}
    return {"limit": limit, "worst": rows[worst], "case": worst, "over": over}


def markdown(figures: Figures) -> str:
    """The report in tables."""
    goals, code, bytes_ = figures["targets"], figures["code"], figures["bytes"]
    per_token = "warp_instructions_per_token"
    targets_table = [
        [name, f"{'≥' if name.endswith(HIGHER_IS_BETTER) else '≤'} {goal['limit']}",
         round(goal["worst"], 3), goal["case"], "no" if goal["over"] else "yes"]
        for name, goal in goals.items()
    ]  # fmt: skip
    code_table = [
        [name, row["registers"], row["spill_instructions"], row["shared_bytes"], row[per_token],
         row.get(f"{per_token}_in_all", ""), row.get("instructions_outside_loops", ""),
         row.get("instructions_of_last_program", ""), row.get(HIGHER_IS_BETTER, "")]
        for name, row in code.items()
    ]  # fmt: skip
    shown = [(name, row) for name, row in bytes_.items() if SHOWN.search(name)]
    bytes_table = [
        [name, row["minimum"], row["ratio"], row.get("share_of_permutation", ""),
         *(round(row[other] / row["minimum"], 2) for other in ("megatron", "te")),
         *(row[f"{who}_us"] for who in ("ours", "megatron", "te"))]
        for name, row in shown
    ]  # fmt: skip
    launch_table = [
        [name, *row.values(), *(kernel_costs.least_launches(name))]
        for name, row in figures["launches"].items()
    ]
    sections = (
        ("Targets", TARGETS_HELP, table(TARGETS_HEADER, targets_table)),
        ("Generated code", CODE_HELP, table(CODE_HEADER, code_table)),
        ("Launches", LAUNCHES_HELP, table(LAUNCHES_HEADER, launch_table)),
        ("Bytes, 16384 tokens, hidden size 2048", BYTES_HELP, table(BYTES_HEADER, bytes_table)),
    )
    text = f"# What the kernels cost\n\n{INTRODUCTION.format(figures['triton'])}\n"
    return text + "".join(f"\n## {title}\n\n{note}\n\n{rows}" for title, note, rows in sections)


def table(header: str, lines: list[list[Any]]) -> str:
    """A Markdown table."""
    columns = header.split(", ")
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


if __name__ == "__main__":
    run_command(main)
