"""What a method is that samples answers itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxalign.config import Config


@dataclass(frozen=True)
class Method:
    """One entry of the registry's `ONLINE`.

    config     the class of its keys
    run        (model, prompts, output folder, configuration) -> how it ended
    objective  the offline method that each of its rounds trains by, or ""
    loss       the class of its objective where it samples while it learns, or None
    """

    config: type[Config]
    run: Callable[..., Any]
    objective: str = ""
    loss: Any = None
