"""What an evaluation is: its keys, its work, and what it says at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.config import Config

TEMPLATES = Path(__file__).parent / "templates"  # of the pages that evaluations write


@dataclass(frozen=True)
class Evaluation:
    """One entry of the registry's `EVALUATIONS`.

    config  the class of its keys
    run     (model, data, output folder, configuration) -> the report, which it has written too
    lines   the report for a terminal
    """

    config: type[Config]
    run: Callable[..., dict[str, Any]]
    lines: Callable[[dict[str, Any]], list[str]]
