"""Aligns language models in JAX: fine-tune, sample, export, by one call each.

    import jaxalign

    jaxalign.train("sft", model="smollm2-135m-instruct", data="rows.jsonl", out="out", max_steps=100)
    jaxalign.generate(model="out", data="prompts.jsonl", out="answers.jsonl", temperature=0)
    jaxalign.export(model="out", out="merged", format="hf")

Keys are those of the YAML files and the command line. Importing this package imports neither JAX nor anything
optional, and touches no device.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxalign.api import (
        build,
        chat,
        evaluate,
        export,
        generate,
        inspect_data,
        inspect_model,
        plan,
        pull,
        serve,
        train,
    )
    from jaxalign.errors import UserError

_CALLS = (
    "build",
    "chat",
    "evaluate",
    "export",
    "generate",
    "inspect_data",
    "inspect_model",
    "plan",
    "pull",
    "serve",
    "train",
)

__all__ = [
    "UserError",
    "build",
    "chat",
    "evaluate",
    "export",
    "generate",
    "inspect_data",
    "inspect_model",
    "plan",
    "pull",
    "serve",
    "train",
]


def _call(name: str) -> Any:
    return getattr(importlib.import_module("jaxalign.api"), name)


class _CallableModule(ModuleType):
    """A module that shares its name with a call: `jaxalign.train` is both a package and a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a submodule on its package, where it would hide the call of that name.
        if name in _CALLS and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        return _call(name)
    if name == "UserError":
        return importlib.import_module("jaxalign.errors").UserError
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxalign")
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
