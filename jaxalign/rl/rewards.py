"""Rewards of answers: a weighted sum of registered kinds, and what becomes of those that cannot be scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError

from jaxalign.config import Config
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.registry import REWARDS


@dataclass(frozen=True)
class Answer:
    """One sampled answer to `prompt`. `finish` is "stop", or "length" where max_tokens cut it off."""

    prompt: Prompt
    text: str
    finish: str = "stop"


class Reward(Protocol):
    """An entry of the registry's `REWARDS`, a `Config` whose fields are its keys."""

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float | None]:
        """One number an answer, higher is better; None or NaN where there is none."""
        ...


class RewardConfig(Config):
    """What every kind of reward has beside its own keys."""

    weight: float = 1.0
    """its part in the sum"""


FUNCTIONS: dict[str, Callable[..., Any]] = {}  # that this process was given, by name


def in_words(function: Callable[..., Any]) -> dict[str, Any]:
    """The block that names `function`."""
    name = f"{function.__module__}:{function.__qualname__}"
    FUNCTIONS[name] = function
    return {"kind": "python", "function": name}


def _named(value: Any) -> Any:
    """Functions given from Python, by their name: a configuration is text."""
    if not isinstance(value, dict):
        return value
    return {name: in_words(block) if callable(block) else block for name, block in value.items()}


Blocks = Annotated[dict[str, Any], BeforeValidator(_named)]  # rewards by name


class RewardsConfig(Config):
    """The keys of a method that learns from rewards."""

    rewards: Blocks = Field(default_factory=dict)
    """what raises the reward, by name: {length: {most: 50}, polite: {kind: regex, pattern: please}}. The
    kind is the name where none is said; the reward is the sum of weight x value"""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """taken from the reward of an answer that max_tokens cut off"""
    normalise: bool = False
    """take each reward less its mean over the answers of the model at the start, over their standard
    deviation, before they are weighed: rewards of several scales, and a model of rewards with a mean of 0"""
    clip_reward: float | None = Field(None, gt=0)
    """the most that the reward of an answer may be from 0, before the penalty; null does not clip"""


@dataclass
class Faults:
    """What could not be scored: how many answers, by the name of the reward and the reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Counts one answer. What follows `, first` is kept of the first of its kind."""
        key = next((k for k in self.counts if k.split(", first")[0] == reason.split(", first")[0]), reason)
        self.counts[key] = self.counts.get(key, 0) + 1

    def lines(self) -> list[str]:
        """One line a reason."""
        return [f"{n} answers without a reward: {reason}" for reason, n in self.counts.items()]


@dataclass(frozen=True)
class Scored:
    """Rewards of N answers: `total` float64 [N], NaN where a part has none, and its `parts` by name."""

    total: np.ndarray
    parts: dict[str, np.ndarray]


Moments = dict[str, tuple[float, float]]  # (mean, standard deviation) of rewards by name


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of `parts`, {name: reward}. The other keys are those of `RewardsConfig`."""

    parts: Mapping[str, Any]
    missing_eos_penalty: float = 0.0
    clip: float | None = None
    normalise: bool = False

    def __call__(self, answers: Sequence[Answer], faults: Faults, start: Path | None = None) -> Scored:
        """Scores the answers. One that a part cannot score has no reward, and is counted in `faults`.

        start: the file of the moments that rewards are normalised by; where it is not there yet, those of
        these answers are written to it. Raises `UserError` where a part scores none of the answers, or gives
        another number of values.
        """
        parts = {name: _scored(name, reward, answers, faults) for name, reward in self.parts.items()}
        known = _moments(start, parts) if self.normalise and start else {}
        total = np.zeros(len(answers))
        for name, reward in self.parts.items():
            mean, std = known.get(name, (0.0, 1.0))
            total = total + reward.weight * (parts[name] - mean) / std
        if self.clip is not None:
            total = np.clip(total, -self.clip, self.clip)
        cut = np.array([answer.finish == "length" for answer in answers], float)
        return Scored(total - self.missing_eos_penalty * cut, parts)


def _moments(file: Path, parts: Mapping[str, np.ndarray]) -> Moments:
    """The moments in the file, or those of `parts` [N], written there. What is the same for all answers has a
    deviation of 1."""
    if not file.exists():
        found = {name: (float(np.nanmean(v)), float(np.nanstd(v))) for name, v in parts.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps({n: (m, s if s > 1e-8 else 1.0) for n, (m, s) in found.items()}))
        draft.replace(file)
    return {name: (mean, std) for name, (mean, std) in json.loads(file.read_text()).items()}


def build_rewards(config: Any, key: str = "rewards") -> Rewards:
    """The rewards that the key `key` names, by the keys of `RewardsConfig`; of other keys than `rewards` the
    bare sum. Raises `UserError` for none, an unknown kind, or keys it has not."""
    blocks = getattr(config, key)
    if not blocks:
        raise UserError(
            "no reward: nothing says which answers are good",
            place=key,
            remedy=f"name one, such as {key}.length.most=50; kinds: {', '.join(REWARDS)}",
        )
    parts = {name: _build(key, name, block) for name, block in blocks.items()}
    if key != "rewards":
        return Rewards(parts)
    return Rewards(parts, config.missing_eos_penalty, config.clip_reward, config.normalise)


def _build(key: str, name: str, block: Any) -> Any:
    keys = dict(block or {})
    kind = REWARDS[str(keys.pop("kind", name))]
    try:
        return kind.model_validate(keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join((key, name, *map(str, first["loc"])))
        known = ", ".join(kind.model_fields)
        raise UserError(first["msg"], place=place, remedy=f"its keys: {known}") from error


def _scored(name: str, reward: Any, answers: Sequence[Answer], faults: Faults) -> np.ndarray:
    """float64 [N] of one part."""
    try:
        values: list[Any] = list(reward(answers))
    except UserError:
        raise
    except Exception:  # whatever a user's function raises
        values = [_alone(reward, answer) for answer in answers]
    if len(values) != len(answers):
        raise UserError(
            f"it gave {len(values)} values for {len(answers)} answers",
            place=f"rewards.{name}",
            remedy="return one number for every answer, in their order",
        )
    if values and all(isinstance(value, Exception) for value in values):
        raise UserError(
            f"it raises {_said(values[0])} on every answer, first on that of row {answers[0].prompt.id}: "
            f"{answers[0].text[:80]!r}",
            place=f"rewards.{name}",
            remedy="mend it; the same command goes on from here",
        ) from values[0]
    pairs = zip(answers, values, strict=True)
    return np.array([_number(name, answer, value, faults) for answer, value in pairs], float)


def _alone(reward: Any, answer: Answer) -> Any:
    """The value of one answer, or what its reward raised."""
    try:
        (value,) = reward([answer])
    except Exception as reason:  # as above
        return reason
    return value


def _said(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}"


def _number(name: str, answer: Answer, value: Any, faults: Faults) -> float:
    if isinstance(value, Exception):
        faults.add(f"rewards.{name} raised {type(value).__name__}, first on row {answer.prompt.id}")
        return math.nan
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"it gave {type(value).__name__} in place of a number",
            place=f"rewards.{name}",
            remedy="return one number for every answer",
        ) from error
    if not math.isfinite(number):
        faults.add(f"rewards.{name} gave no number")
        return math.nan
    return number
