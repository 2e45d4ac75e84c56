"""Libraries that only some features read with: the extras of `pyproject.toml`."""

from __future__ import annotations

import importlib
from typing import Any

from jaxalign.errors import UserError


def optional(module: str, package: str, *, extra: str, place: str) -> Any:
    """The module, which `package` brings. Raises `UserError` that names the key `place` and the `extra` to
    install where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"pip install 'jaxalign[{extra}]'"
        raise UserError(f"{package} is not installed", place=place, remedy=remedy) from error
