"""Ahead-of-time compilation for an H800 (sm_90), and counts of the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uar_kernels.permutation import op as permutation_op
from uar_kernels.plan import op as plan_op
from uar_kernels.routing import bytes as routing_bytes
from uar_kernels.routing import kernel as routing_kernel
from uar_kernels.routing import op as routing_op

TARGET = GPUTarget("cuda", 90, 32)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Of the launch that a program's share of the whole is given for.
TOKENS = 32768


def entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and ``compilations()`` entry of everything that is compiled."""
    for op in (routing_op, plan_op, permutation_op):
        for entry in op.compilations():
            yield f"{entry['kernel'].replace('plan.', 'plan ')}: {entry['case']}", entry


def code(entry: dict[str, Any]) -> dict[str, float]:
    """Compile one launch and count its machine code.

    ``warp_instructions_per_token`` is the steady state: of the router's forward its loops over
    tokens, of the others all that a program executes.
    """
    fn, attrs = entry["fn"], entry["attrs"]
    signature = {name: entry["signature"].get(name, "constexpr") for name in fn.arg_names}
    if not isinstance(attrs, dict):
        attrs = {(i,): [["tt.divisibility", 16]] for i in attrs}
    kernel = triton.compile(
        ASTSource(fn, signature, entry["constexprs"], attrs),
        target=TARGET,
        options={"num_warps": entry["num_warps"], **entry.get("options", {})},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [TOOL, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    text = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    instructions = {int(at, 16): it for at, it in text if not it.startswith("NOP")}
    resources = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    result: dict[str, float] = {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"] + resources["LOCAL"],
        "spill_instructions": len(matching(instructions, r"\b(STL|LDL)\b")),
        "shared_bytes": kernel.metadata.shared,
    }
    if fn is routing_kernel.forward:
        return result | router_forward(instructions, entry)
    executed = len(instructions)
    for loop, trips in zip(loops(instructions), trips_of_loops(instructions, entry), strict=True):
        executed += len(loop) * (trips - 1)
    per_token = executed * entry["num_warps"] / entry["tokens_per_program"]
    result["warp_instructions_per_token"] = round(per_token, 1)
    if "BLOCK_H" in entry["constexprs"]:
        result["rows_128bit_share"] = share_of_wide_rows(instructions, entry)
    return result


def router_forward(instructions: dict[int, str], entry: dict[str, Any]) -> dict[str, float]:
    """The parts of the forward: loop over tiles, loop of the statistics, the last program's sums.

    The first two loops are those. What follows the ticket, the last atomic that returns a value, is
    executed by one program in all. ``…_in_all`` shares a whole launch of 32768 tokens out.

    Raises:
        RuntimeError: the code is not made up like that any more.
    """
    tile, statistics, *others = loops(instructions)
    ticket = max(matching(instructions, r"\bATOMG\b"))
    if any(len(loop) > len(tile) for loop in others) or not tile[-1] < statistics[-1] < ticket:
        raise RuntimeError(f"{entry['case']}: cannot tell the loops of the router's forward apart")
    last = sum(at > ticket for at in instructions)
    program = len(instructions) - last - len(tile) - len(statistics)
    block, warps = entry["tokens_per_program"], entry["num_warps"]
    programs = routing_bytes.programs(TOKENS, entry["constexprs"]["E"])
    span = -(-TOKENS // (programs * block)) * block
    passes = -(-span // routing_kernel.TOKENS_AT_ONCE.value)
    over_tokens = len(tile) * span // block + len(statistics) * passes
    return {
        "warp_instructions_per_token": round(over_tokens * warps / span, 1),
        "warp_instructions_per_token_in_all": round((over_tokens + program) * warps / span, 1),
        "instructions_of_tile_loop": len(tile),
        "instructions_outside_loops": program,
        "instructions_of_statistics_loop": len(statistics),
        "instructions_of_last_program": last,
    }


def loops(instructions: dict[int, str]) -> list[list[int]]:
    """Addresses in each loop, in the order of the code; a branch to itself is no loop."""
    found = []
    for at, text in instructions.items():
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and (first := int(branch[1], 16)) < at:
            found.append([x for x in instructions if first <= x <= at])
    return sorted(found)


def trips_of_loops(instructions: dict[int, str], entry: dict[str, Any]) -> list[int]:
    """How often each loop runs. LLVM unrolls a loop fully, or a plan's last one in part."""
    found = loops(instructions)
    if not found:
        return []
    constants = entry["constexprs"]
    if "UNROLL" in constants:
        return [-(-constants["K"] // constants["UNROLL"])]
    trips = list(entry["trips"][-len(found) :])
    # The last trips are the entries of a thread, each of which it loads once.
    loads = matching({at: instructions[at] for at in found[-1]}, r"\bLDG\b")
    trips[-1] = -(-trips[-1] // len(loads))
    return trips


def share_of_wide_rows(instructions: dict[int, str], entry: dict[str, Any]) -> float:
    """The share of a thread's 16 bytes of each row that it accesses at once.

    Row ids and probabilities are accessed in fewer bytes; they are told apart by the number of
    accesses that the rows need.

    Raises:
        RuntimeError: other accesses are wide too.
    """
    constants = entry["constexprs"]
    looped = bool(loops(instructions))
    slots = constants["UNROLL"] * (1 if looped else -(-constants["K"] // constants["UNROLL"]))
    itemsize = 4 if "fp32" in entry["case"] else 2
    vectors = constants["BLOCK_H"] * itemsize / (16 * 32 * entry["num_warps"])
    wide = len(matching(instructions, r"\b(LDG|STG)\.\S*128"))
    share = wide / (vectors * (1 + slots))
    if share > 1:
        raise RuntimeError(f"{entry['case']}: more 128-bit accesses than the rows need")
    return round(share, 3)


def matching(instructions: dict[int, str], pattern: str) -> list[int]:
    """Addresses of the instructions that match."""
    return [at for at, text in instructions.items() if re.search(pattern, text)]
