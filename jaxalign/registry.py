"""Lazy tables from a registry name to `module:attribute`. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError, nearest


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing. `kind` is the word an error message uses for it."""

    kind: str
    entries: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Any:
        """The object registered under `name`; raises `UserError` with the nearest name."""
        if name not in self.entries:
            known = ", ".join(self.entries)
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, self.entries)}", remedy=f"known: {known}"
            )
        module, attribute = self.entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)


# A model family is keyed by the `model_type` of transformers' config.json.
FAMILIES = Registry(
    "model family",
    {
        "llama": "jaxalign.models.llama:FAMILY",
        "mistral": "jaxalign.models.mistral:FAMILY",
        "qwen2": "jaxalign.models.qwen2:FAMILY",
        "qwen3": "jaxalign.models.qwen3:FAMILY",
        "gemma2": "jaxalign.models.gemma2:FAMILY",
        "gemma3_text": "jaxalign.models.gemma3:FAMILY",
    },
)

ADAPTERS = Registry("adapter", {"lora": "jaxalign.models.adapters:LoraConfig"})

OBJECTIVES = Registry("training method", {"sft": "jaxalign.objectives.sft:SFT"})

OPTIMIZERS = Registry(
    "optimizer",
    {name: f"jaxalign.train.optim:{name}" for name in ("adamw", "adafactor", "lion", "sgd")},
)

SCHEDULES = Registry(
    "schedule",
    {name: f"jaxalign.train.optim:{name}" for name in ("cosine", "linear", "constant", "wsd")},
)
