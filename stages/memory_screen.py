"""Costs of a run on the screen, from JSON values alone: `rlhf check` before it, `rlhf show` after.

A stage's entry is what its `memory.json` holds: `predicted` and `measured`, each bytes of weights,
gradients and optimiser state by role, in one process; `processes`, how many there were; and `peak`,
the most that this one has held.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

PARTS = ("weights", "gradients", "optimiser")
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
# What a stage's `memory.json` may hold of its roles, in the order in which it is printed.
KINDS = ("predicted", "measured")


def memory_table(stages: Mapping[str, Mapping[str, Any]]) -> Group | None:
    """Bytes by stage and role; predicted and measured numbers stand side by side."""
    shown = {name: entry for name, entry in stages.items() if any(map(entry.get, KINDS))}
    if not shown:
        return None
    kinds = [kind for kind in KINDS if any(entry.get(kind) for entry in shown.values())]
    totals = [_total(entry.get(kind) or {}) for entry in shown.values() for kind in kinds]
    unit = _unit(max(totals))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"memory, {unit}", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for title in (*PARTS, "total"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage, entry in shown.items():
        accounts = [entry.get(kind) for kind in kinds]
        roles = list(dict.fromkeys(role for account in accounts for role in account or ()))
        for role in roles:
            costs = [account and account.get(role, {}) for account in accounts]
            table.add_row(stage if role == roles[0] else "", role, *_cells(costs, unit))
        sums = [account and _sum(account.values()) for account in accounts]
        table.add_row("", "all", *_cells(sums, unit), style="bold", end_section=True)
    lines = [f"Each number is {' / '.join(kinds)}; activations and rollouts come on top."]
    numbers = {(entry.get("processes") or {}).get("number", 1) for entry in shown.values()}
    if numbers != {1}:
        lines.append(f"They are of one process of {' or '.join(map(str, sorted(numbers)))}.")
    peaks = {name: entry["peak"] for name, entry in shown.items() if entry.get("peak")}
    if peaks:
        texts = (
            f"{name} {', '.join(f'{_bytes(size)} {place}' for place, size in peak.items())}"
            for name, peak in peaks.items()
        )
        lines.append(f"Most that the process had held by the end of: {'; '.join(texts)}.")
    return Group(table, *(Text(line, style="dim") for line in lines))


def disk_table(files: Sequence[tuple[str, str, int]], free: int, folder: str) -> Group:
    """Weight files as (stage, what, bytes), beside what is free; a warning if that is less."""
    unit = _unit(sum(size for _, _, size in files))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("disk", no_wrap=True)
    table.add_column("weight files")
    table.add_column(unit, justify="right", no_wrap=True)
    for stage, what, size in files:
        table.add_row(stage, what, _number(size, unit))
    needed = sum(size for _, _, size in files)
    table.add_row("", "all", _number(needed, unit), style="bold")
    if needed <= free:
        note = Text(f"{_bytes(free)} are free in {folder}", style="dim")
    else:
        note = Text(
            f"warning: {_bytes(needed)} of weight files do not fit in {folder}, which has "
            f"{_bytes(free)} free: make room, or set run.folder to another disk",
            style="yellow",
        )
    return Group(table, note)


def _cells(costs: Sequence[Mapping[str, int] | None], unit: str) -> list[str]:
    """Parts and total, each as `predicted / measured`; a dash where there is no number."""

    def cell(*names: str) -> str:
        return " / ".join(
            "-" if cost is None else _number(sum(cost.get(name, 0) for name in names), unit)
            for cost in costs
        )

    return [*(cell(part) for part in PARTS), cell(*PARTS)]


def _sum(costs: Any) -> dict[str, int]:
    costs = list(costs)
    return {part: sum(cost[part] for cost in costs) for part in PARTS}


def _total(account: Mapping[str, Mapping[str, int]]) -> int:
    return sum(_sum(account.values()).values())


def _unit(size: float) -> str:
    return next((unit for unit, scale in UNITS.items() if size >= scale), "kB")


def _number(size: float, unit: str) -> str:
    return "0" if size == 0 else f"{size / UNITS[unit]:,.2f}"


def _bytes(size: float) -> str:
    unit = _unit(size)
    return f"{size / UNITS[unit]:.1f} {unit}"
