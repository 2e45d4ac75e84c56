"""Answers by the wish of the prompt (SteerLM, arXiv:2310.05344): each one is learned with what it is like.

A condition is a line such as `polite: 4, brief: 0`, a level for every reward: the system turn of a chat or,
where the prompt has one, its last line; before a text a line of its own. Later rounds ask for the highest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.records import Message, Prompt
from jaxalign.rl.selection import Judged

TAILS = 0.01  # share of the values beyond the lowest and the highest level: a few far ones do not set them


class Conditioned(Config):
    """All answers, each with the levels of its own rewards as a condition."""

    rewarded: ClassVar[bool] = True

    levels: int = Field(5, ge=2)
    """levels of each reward, 0 to one less; they divide the span of its values over the first answers"""

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """One row for each answer, to imitate."""
        for i, (text, grades) in enumerate(zip(judged.texts, judged.grades, strict=True)):
            prompt = conditioned(judged.prompt, grades)
            about = {"id": f"{judged.prompt.id}:{i}", "parent": judged.prompt.id}
            if prompt.messages is None:
                yield {**about, "prompt": prompt.text, "completion": text}
            else:
                turns = [*prompt.messages, Message("assistant", text)]
                yield {**about, "messages": [{"role": m.role, "content": m.content} for m in turns]}

    def asked(self, prompt: Prompt, policy: int, names: Sequence[str]) -> Prompt:
        """With the highest levels as its condition, once a policy has learned what they are."""
        return conditioned(prompt, dict.fromkeys(names, self.levels - 1)) if policy else prompt


def conditioned(prompt: Prompt, grades: Mapping[str, int]) -> Prompt:
    """The prompt with these levels, by the name of the reward, as its condition."""
    line = ", ".join(f"{name}: {level}" for name, level in grades.items())
    if prompt.messages is None:
        return replace(prompt, text=f"{line}\n{prompt.text}")
    first, rest = prompt.messages[0], prompt.messages[1:]
    if first.role == "system":
        return replace(prompt, messages=(Message("system", f"{first.content}\n{line}"), *rest))
    return replace(prompt, messages=(Message("system", line), *prompt.messages))


def graded(parts: Mapping[str, np.ndarray], levels: int, file: Path) -> list[dict[str, int]]:
    """The levels of every answer, of `parts` [N] by name: within the span that `file` holds, or that of these
    values, which is written there. A value that is no number has no level."""
    if not file.exists():
        spans = {name: np.nanquantile(v, (TAILS, 1 - TAILS)).tolist() for name, v in parts.items()}
        file.write_text(json.dumps(spans))
    spans = json.loads(file.read_text())
    found: list[dict[str, int]] = [{} for _ in next(iter(parts.values()))]
    for name, values in parts.items():
        low, high = spans[name]
        share = np.clip((values - low) / max(high - low, 1e-8), 0, 1) * (levels - 1)
        for grades, level in zip(found, share, strict=True):
            if np.isfinite(level):
                grades[name] = round(float(level))
    return found
