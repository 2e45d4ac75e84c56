"""The configuration of a training run: `TrainConfig`, and its extension by a method's own keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.spans import LossOn
from jaxalign.data.tokenize import Truncation
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.decoder import Adapter
from jaxalign.models.prefix import PrefixConfig, PromptConfig
from jaxalign.models.quant import Quantise
from jaxalign.registry import ADAPTERS, OBJECTIVES
from jaxalign.sharding import MeshConfig
from jaxalign.train.optim import OptimConfig
from jaxalign.train.reference import REFERENCE, ReferenceConfig
from jaxalign.train.stages import StagesConfig

# Keys that a run may change when it is resumed: none of them changes a step that was already made.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "eval_batch_size",
    "max_nonfinite",
    "limits",
    "resume",
    "remat",
    "mesh",
    "grad_accumulation",
)

# Keys that say how long the run is: it may be made longer, which `folder.py` checks in steps.
LENGTH_KEYS = ("max_steps", "epochs")


def _lora(before: dict[str, Any]) -> LoraConfig | None:
    """The default of `lora`: on, unless a block before it is."""
    return None if any(before.get(name) for name in ADAPTERS) else LoraConfig()


class TrainConfig(OptimConfig):
    """Everything about a training run but the method, the model, the data and the output folder."""

    batch_size: int | None = Field(None, ge=1)
    """rows of one update, over all devices together; null takes 8, or more where there are more devices"""
    grad_accumulation: int = Field(1, ge=1)
    """parts into which an update's rows are cut, one forward pass each: less memory, the same update"""
    max_steps: int | None = Field(None, ge=1)
    """updates of the run; null trains for `epochs`"""
    epochs: float = Field(3.0, gt=0)
    """passes over the data, where max_steps is null"""
    seed: int = 0
    """draws the adapter's start, the order of the rows and all training noise"""
    max_length: int = Field(1024, ge=2)
    """longest row in tokens"""
    truncation: Truncation = "keep_start"
    """what happens to a row over max_length"""
    packing: bool = False
    """put several short examples into one row of max_length; they do not see each other"""
    loss_on: LossOn | None = None
    """tokens that are learned; null takes what the row's form asks for: every assistant turn of a chat, the
    completion of a prompt, all of a text"""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's chat template"""
    max_bad_rows: float = Field(0.1, ge=0, le=1)
    """largest share of unreadable rows; they are left out and reported, and more of them stop the run"""
    neftune_alpha: float = Field(0.0, ge=0)
    """strength of NEFTune's noise on the embeddings while training; 5 is usual, 0 is off"""

    prefix: PrefixConfig | None = None
    """prefix tuning instead of lora: keys and values that every layer attends to, on a frozen base"""
    prompt: PromptConfig | None = None
    """prompt tuning instead of lora: vectors before the embeddings of every row, on a frozen base"""
    lora: LoraConfig | None = Field(default_factory=_lora)
    """low-rank adapters on a frozen base; null, without prefix and prompt, trains every weight"""
    quantise: Quantise = "none"
    """the frozen base's kernels in 4 bits (nf4, QLoRA) or 8 (int8): less memory, slower steps"""
    mesh: MeshConfig = MeshConfig()
    """how the devices share the work"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of matrix products; sums, losses and trained weights are float32 always. auto takes bf16
    where the hardware has it"""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """activations computed again in the backward pass instead of kept: none is fastest (dots on a
    CPU), full needs least memory; auto takes the fastest that fits the device"""

    eval_data: Path | None = None
    """rows to evaluate on; null takes eval_fraction of the data"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """share of the data that is held out for evaluation, where eval_data is null"""
    eval_every: int | None = Field(None, ge=1)
    """steps between two evaluations; null evaluates after every epoch"""
    eval_batch_size: int | None = Field(None, ge=1)
    """rows of one evaluation pass; null takes as many as a forward pass of training"""
    log_every: int = Field(10, ge=1)
    """steps between two lines of metrics; a line is the mean over the steps since the last one"""
    checkpoint_every: int = Field(200, ge=1)
    """steps between two checkpoints; the last step always gets one"""
    keep_checkpoints: int = Field(2, ge=1)
    """newest checkpoints that are kept"""
    max_nonfinite: int = Field(5, ge=1)
    """steps in a row with a loss or gradient that is not finite before the run stops; each one is skipped"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the output folder's run stopped; never refuses a folder with a run in it"""

    @field_validator("prompt", "lora")
    @classmethod
    def _one_adapter(cls, value: Adapter | None, info: ValidationInfo) -> Adapter | None:
        others = [name for name in ADAPTERS if info.data.get(name) is not None]
        if value is not None and others:
            raise ValueError(f"a run trains one adapter: set {others[0]}=null or {info.field_name}=null")
        return value

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that trains, of whatever kind; None where every weight does."""
        return self.prefix or self.prompt or self.lora

    @property
    def names_adapter(self) -> bool:
        """Whether what trains was said, and not left to the default or to the model that is trained on."""
        return "lora" in self.model_fields_set or self.adapter != self.lora

    def spelled(self, encode: Callable[[str], Sequence[int]]) -> Self:
        """The same with a prompt's words as the tokens that `encode` makes of them."""
        return self.model_copy(update={"prompt": self.prompt.spelled(encode)}) if self.prompt else self

    def with_adapter(self, adapter: Adapter | None) -> Self:
        """The same with `adapter` as what trains."""
        kinds = {name: adapter if adapter and adapter.key == name else None for name in ADAPTERS}
        return self.model_copy(update=kinds)


PairPolicy = Literal[
    "all_pairs", "adjacent", "best_vs_worst", "best_vs_rest", "best_vs_random_lower", "best_vs_random_other"
]


class ComparisonConfig(TrainConfig):
    """`TrainConfig` of methods that learn from answers that are compared or judged."""

    pairs: PairPolicy = "all_pairs"
    """which pairs a list of scored or ranked answers gives; ties give none, but in best_vs_random_other"""
    best_answers: int | None = Field(None, ge=2)
    """how many of a list's best answers are taken; null takes all"""
    threshold: float | None = None
    """score from which an answer counts as wanted, where labels are made of scores"""
    select: dict[str, str] = Field(default_factory=dict)
    """keys of a row's meta with the value that they must have, such as {aspect: harmless}"""
    share_prompt: bool = True
    """compute the prompt that answers share once, several groups to a row, where that saves work; the loss
    stays the same"""
    stages: StagesConfig | None = None
    """learn pairs in stages, from easy to hard or file by file (Curry-DPO, sDPO); null learns all together"""

    @property
    def options(self) -> GroupOptions:
        """What becomes of the rows."""
        return GroupOptions(self.pairs, self.best_answers, self.threshold, self.select, self.seed)


class InspectConfig(ComparisonConfig):
    """The keys of `inspect data`: those of training that say how rows are read, and as what."""

    kind: Literal["sft", "pairs", "binary", "lists"] | None = None
    """what the rows are read as; null takes what the first row is"""


@cache
def config_for(method: str) -> type[TrainConfig]:
    """`TrainConfig` with the fields of the method's objective, and its own defaults for those they share.

    Methods that compare with a reference policy have the block `reference`. Raises `UserError` on an unknown
    method.
    """
    objective = OBJECTIVES[method]
    own: dict[str, Any] = {name: (info.annotation, info) for name, info in objective.model_fields.items()}
    for name, default in objective.defaults.items():
        shared = copy(TrainConfig.model_fields[name])
        shared.default = default
        own[name] = (shared.annotation, shared)
    if "ref" in objective().needs:
        own["reference"] = (ReferenceConfig, FieldInfo(default=REFERENCE, description=_ABOUT_REFERENCE))
    base = TrainConfig if objective.data == "sft" else ComparisonConfig
    whole: Any = {"_objective_can_be_built": model_validator(mode="after")(partial(_built, objective))}
    about = {"__doc__": objective.__doc__, "__validators__": whole}
    return create_model(f"{method}_config", __base__=base, **about, **own)


def _built(objective: Any, config: Any) -> Any:
    """The configuration. Raises `ValueError` for keys of the method that are at odds with each other."""
    try:
        objective(**{name: getattr(config, name) for name in objective.model_fields})
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    return config


_ABOUT_REFERENCE = "the policy that the loss compares with"


def objective_for(method: str, config: TrainConfig) -> Any:
    """The method's objective, built from its own fields of `config`."""
    objective = OBJECTIVES[method]
    return objective(**{name: getattr(config, name) for name in objective.model_fields})


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
        if k.split(".")[0] not in (*FREE_KEYS, *LENGTH_KEYS)
    ]


def digest(values: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
