"""What the command line prints: keys, plans and checks, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from jaxalign.config import Row
    from jaxalign.doctor import Check
    from jaxalign.plan import Fact, Plan

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_PREFIXES = ("", "k", "M", "G", "T", "P")


def show_keys(rows: Iterable[Row]) -> None:
    """Every key with its type and default, its help below."""
    console = Console(highlight=False)
    for row in rows:
        console.print(f"[bold]{row.key}[/]  [dim]{escape(row.type)}, default[/] {escape(row.default)}")
        if row.help:
            console.print(Padding(escape(row.help), (0, 0, 0, 4)))


def show_checks(checks: Iterable[Check]) -> None:
    """The findings of `doctor`, advice under what needs it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        mark = f"[{_COLOURS[check.status]}]{check.status}[/]"
        text = "\n".join(escape(part) for part in (check.value, check.advice) if part)
        table.add_row(mark, check.area, check.name, text)
    Console(highlight=False).print(table)


def show_plan(plan: Plan) -> None:
    """The facts of a plan by section, then what would stop the run."""
    console = Console(highlight=False)
    for section, facts in groupby(plan.facts, key=lambda fact: fact.section):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=20)
        table.add_column(justify="right", width=12)
        table.add_column(style="dim")
        for fact in facts:
            table.add_row(fact.name, human(fact), escape(fact.note))
        console.print(f"[bold]{section}[/]", table, sep="\n")
    for problem in plan.problems:
        console.print(f"[red]problem[/]  {escape(problem)}")


def show_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line; numbers with thousands apart."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(f"{value:,}" if type(value) is int else str(value)))
    Console(highlight=False).print(table)


def human(fact: Fact) -> str:
    """A fact's number with its unit: `16.1 GB`, `261 TFLOPs`, `1 h 12 min`, `8.03 G`."""
    if fact.unit == "s":
        return _duration(fact.value)
    unit = {"bytes": "B", "FLOPs": "FLOPs"}.get(fact.unit, "")
    value, prefix = float(fact.value), 0
    while abs(value) >= 1000 and prefix < len(_PREFIXES) - 1:
        value, prefix = value / 1000, prefix + 1
    number = f"{value:.3g}" if prefix or value != int(value) else f"{value:.0f}"
    return f"{number} {_PREFIXES[prefix]}{unit}".strip()


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
