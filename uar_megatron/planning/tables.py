"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uar_megatron.planning.hardware import GIB
from uar_megatron.planning.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the tables, the assumptions and the warnings."""
    job, layout = plan.job, plan.job.layout
    console.print(
        f"{layout.world} × {job.hardware.name}: tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}{f' × {layout.virtual} chunks' if layout.virtual > 1 else ''}, context "
        f"{layout.context}, data {layout.data}; experts: expert {layout.expert}, tensor "
        f"{layout.expert_tensor}, data {layout.expert_data}; {layout.micro_batches} micro-batches "
        f"of {layout.micro_batch} × {layout.seq_length} tokens",
        highlight=False,
    )
    for table in (_model(plan), _memory(plan), _traffic(plan), _time(plan)):
        console.print(table)
    console.print("Assumptions:", *(f"  · {escape(line)}" for line in plan.assumptions), sep="\n")
    for line in plan.warnings:
        console.print(f"[bold red]warning:[/] {escape(line)}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _model(plan: Plan) -> Table:
    table = _table("Model", "", *plan.k)
    table.add_row("experts per token", *(f"{k:.2f}" for k in plan.k.values()))
    total = plan.parameters
    table.add_row(
        f"active parameters of {total / 1e9:.3f} B",
        *(f"{active / 1e9:.3f} B" for active in plan.active.values()),
    )
    table.add_row(
        "FLOPs per token, forward and backward",
        *(f"{flops / 1e9:.2f} G" for flops in plan.flops_per_token.values()),
    )
    return table


def _memory(plan: Plan) -> Table:
    expected, worst = plan.expected, plan.worst
    room = plan.job.usable_memory
    table = _table("Memory of the fullest rank, GiB", "", "expected", "worst case")
    rows = [
        ("weights", expected.state.weights, worst.state.weights),
        ("gradients", expected.state.gradients, worst.state.gradients),
        ("optimizer", expected.state.optimizer, worst.state.optimizer),
    ]
    parts = dict.fromkeys([*expected.activations, *worst.activations])
    for part in parts:
        first, second = (memory.activations.get(part, 0.0) for memory in (expected, worst))
        if first or second:
            rows.append((f"activations: {part}", first, second))
    rows.append(("passing buffers", expected.passing, worst.passing))
    for name, *sizes in rows:
        table.add_row(name, *(f"{size / GIB:.2f}" for size in sizes))
    totals = (
        f"[{'bold' if memory.total <= room else 'bold red'}]{memory.total / GIB:.2f}[/]"
        for memory in (expected, worst)
    )
    table.add_row(f"[bold]total[/] (usable: {room / GIB:.1f})", *totals)
    return table


def _traffic(plan: Plan) -> Table:
    table = _table(
        "All-to-all of one MoE layer, micro-batch and rank, at the expected k",
        *("", "dispatch", "combine", "weights", "sum", "time"),
    )
    traffic, found = plan.traffic, plan.traffic.exchange
    directions = {
        "forward": (found.weights, found.forward, traffic.forward_seconds),
        "backward": (found.weight_gradients, found.backward, traffic.backward_seconds),
    }
    for name, (weights, total, seconds) in directions.items():
        sizes = (found.dispatch, found.combine, weights, total)
        table.add_row(name, *(f"{size / 1e6:.2f} MB" for size in sizes), f"{seconds * 1e3:.3f} ms")
    counts = f"{found.counts / 1e3:.2f} kB of counts"
    table.caption = (
        f"{found.leaving:.1%} leaves the rank, {found.between_nodes:.1%} the node; {counts}"
    )
    return table


def _time(plan: Plan) -> Table:
    time = plan.time
    imbalance = plan.job.imbalance
    table = _table("Optimizer step (estimate)", "", "seconds", "share")
    rows = {
        "dense computation": time.dense,
        f"experts (fullest rank: {max(i.expected for i in imbalance):.2f} × mean)": time.experts,
        "recomputation": time.recomputation,
        "all-to-all": time.all_to_all,
        "tensor parallel": time.tensor_parallel,
        "pipeline bubble": time.bubble,
        "gradients and parameters": time.gradients,
        "[bold]total[/]": time.total,
    }
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / time.total:.0%}")
    budget = ""
    if plan.days is not None and plan.job.tokens is not None:
        budget = f"; {plan.days:.2f} days for {plan.job.tokens / 1e9:.1f} B tokens"
    table.caption = f"{plan.tokens_per_second / 1e6:.3f} M tokens/s{budget}"
    return table
