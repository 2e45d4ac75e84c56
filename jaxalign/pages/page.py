"""Self-contained HTML pages beside their data as JSON: they load nothing, and escape every text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent / "templates"  # what pages have in common: parts.html, page.css


def write_page(
    folder: Path, template: Path, data: Mapping[str, Any], *, numbers: str = "report.json", **more: Any
) -> Path:
    """`write_files` of `data` and the page that the file `template` makes of it and of `more`."""
    page = environment(template.parent).get_template(template.name).render({**data, **more})
    return write_files(folder, data, page, numbers)


def write_files(folder: Path, data: Mapping[str, Any], page: str, numbers: str = "report.json") -> Path:
    """Write `data` into the file `numbers` of `folder` and the page into its `report.html`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in ((numbers, text), ("report.html", page)):
        draft = folder / f"{name}.tmp"
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, folder / name)  # a reader sees the old file or the new one
    return folder / "report.html"


def environment(templates: Path) -> Any:
    """The jinja2 environment of the pages whose templates lie in that folder; a name that is missing is an
    error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader([templates, PARTS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, points=points, p_value=p_value, clock=clock, measured=measured)
    return env


def percent(value: float | None) -> str:
    """A share as `86.7 %`, and `not measured` for None."""
    return "not measured" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, signed: `+86.7`."""
    return "not measured" if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """`p = 0.031`, or `p < 0.0001`."""
    if value is None:
        return "p not defined"
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def measured(mean: dict[str, Any]) -> str:
    """A mean and its interval in words: `0.512 (0.480 to 0.550)`."""
    if mean["mean"] is None:
        return "not measured"
    if mean["low"] is None:
        return f"{mean['mean']:.3f} (one prompt: no interval)"
    return f"{mean['mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"


def clock(seconds: float) -> str:
    """`8.3 s` under a minute, else `4 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"
