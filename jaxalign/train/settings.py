"""The configuration of a training run: `TrainConfig`, and its extension by a method's own keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from jaxalign.config import Config
from jaxalign.models.adapters import LoraConfig
from jaxalign.registry import OBJECTIVES
from jaxalign.sharding import MeshConfig
from jaxalign.train.optim import OptimConfig

# Keys that a run may change when it is resumed: none of them changes a step that was already made.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "eval_batch_size",
    "max_nonfinite",
    "resume",
    "remat",
    "mesh",
)


class TrainConfig(OptimConfig):
    """Everything about a training run but the method, the model, the data and the output folder."""

    max_length: int = Field(1024, ge=8)
    """longest row in tokens"""
    batch_size: int | None = Field(None, ge=1)
    """rows of one forward pass, over all devices together; null takes 8, or more where there are more devices"""
    grad_accumulation: int = Field(1, ge=1)
    """forward passes whose gradients are added up before one update"""
    max_steps: int | None = Field(None, ge=1)
    """updates of the run; null trains for `epochs`"""
    epochs: float = Field(3.0, gt=0)
    """passes over the data, where max_steps is null"""
    seed: int = 0
    """draws the adapter's start, the order of the rows and all training noise"""
    packing: bool = False
    """put several short rows into one of max_length; they do not see each other"""
    truncation: Literal["drop", "keep_start", "keep_end"] = "drop"
    """what happens to a row over max_length"""
    loss_on: Literal["completion", "assistant", "all"] = "assistant"
    """which tokens are learnt: the last answer, every assistant turn, or everything"""
    neftune_alpha: float = Field(0.0, ge=0)
    """strength of NEFTune's noise on the embeddings while training; 5 is usual, 0 is off"""

    lora: LoraConfig | None = LoraConfig()
    """low-rank adapters on a frozen base; null trains every weight"""
    mesh: MeshConfig = MeshConfig()
    """how the devices share the work"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of matrix products; sums, losses and trained weights are float32 always. auto takes bf16 where
    the hardware has it"""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """activations computed again in the backward pass instead of kept: none is fastest, full needs least memory;
    auto takes the first that fits the device"""

    eval_data: Path | None = None
    """rows to evaluate on; null takes eval_fraction of the data"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """share of the data that is held out for evaluation, where eval_data is null"""
    eval_every: int | None = Field(None, ge=1)
    """steps between two evaluations; null evaluates after every epoch"""
    eval_batch_size: int | None = Field(None, ge=1)
    """rows of one evaluation pass; null takes batch_size"""
    log_every: int = Field(10, ge=1)
    """steps between two lines of metrics; a line is the mean over the steps since the last one"""
    checkpoint_every: int = Field(200, ge=1)
    """steps between two checkpoints; the last step always gets one"""
    keep_checkpoints: int = Field(2, ge=1)
    """newest checkpoints that are kept"""
    max_nonfinite: int = Field(5, ge=1)
    """steps in a row with a loss or gradient that is not a number before the run stops; each one is skipped"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the output folder's run stopped; never refuses a folder with a run in it"""


@cache
def config_for(method: str) -> type[TrainConfig]:
    """`TrainConfig` with the fields of the method's objective added. Raises `UserError` on an unknown method."""
    objective = OBJECTIVES[method]
    if dataclasses.is_dataclass(objective):
        own = {f.name: (f.type, _default(f)) for f in dataclasses.fields(objective)}
    else:
        own = {name: (info.annotation, info) for name, info in objective.model_fields.items()}
    return create_model(f"{method}_config", __base__=TrainConfig, __doc__=objective.__doc__, **own)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def objective_for(method: str, config: TrainConfig) -> Any:
    """The method's objective, built from its own fields of `config`."""
    objective = OBJECTIVES[method]
    names = (
        [f.name for f in dataclasses.fields(objective)]
        if dataclasses.is_dataclass(objective)
        else list(objective.model_fields)
    )
    return objective(**{name: getattr(config, name) for name in names})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs and may not. Both are JSON dumps of a configuration."""
    before, after = flatten(old), flatten(new)
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    return [
        f"{k}: {before.get(k)} -> {after.get(k)}"
        for k in changed
        if k.split(".")[0] not in FREE_KEYS and not _longer(k, before.get(k), after.get(k))
    ]


def _longer(key: str, old: Any, new: Any) -> bool:
    """A run may be made longer, never shorter than it already is."""
    return key in ("max_steps", "epochs") and old is not None and new is not None and new >= old


def digest(values: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
