"""One table to the terminal and a JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stats import Spread


def cell(value: Any) -> str:
    """A table cell: four significant digits for a number, `median (low-high)` for a spread, - for None."""
    if value is None:
        return "-"
    if isinstance(value, Spread):
        return f"{cell(value.median)} ({cell(value.low)}-{cell(value.high)})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of these columns, padded to read well on a terminal. A missing value is a dash."""
    cells = [list(columns)] + [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def header(machine: Mapping[str, Any], versions: Mapping[str, Mapping[str, str]]) -> str:
    """The lines above a table: what it was measured on and with."""
    lines = [f"- {key}: {value}" for key, value in machine.items() if value not in ("", None)]
    for name, found in versions.items():
        lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    return "\n".join(lines)


def write(path: Path, title: str, table: str, record: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Writes `path` (JSON: everything measured) and the table with its machine beside it as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    head = header(record["machine"], record.get("versions", {}))
    text = "\n\n".join([f"# {title}", head, table, *(f"- {n}" for n in notes)])
    path.with_suffix(".md").write_text(text + "\n")


def _plain(value: Any) -> Any:
    """Spreads become dictionaries; anything else unknown to JSON is an error."""
    if isinstance(value, Spread):
        return vars(value)
    raise TypeError(f"{type(value).__name__} does not go into a result file")
