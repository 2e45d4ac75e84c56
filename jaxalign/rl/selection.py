"""What a round teaches: from the answers to a prompt and their rewards to rows that an offline method reads.

A selection is a `Config`; its fields are keys of the methods that use it. It gives rows as they stand in a
file: the prompt's keys with `completions` and `scores`, or with `chosen` and `rejected`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.records import Prompt


@dataclass(frozen=True)
class Judged:
    """The answers to one prompt that have words and a reward, in the order in which they were sampled.
    `grades` are the levels of each one's rewards by name, where a selection has `levels`."""

    prompt: Prompt
    texts: Sequence[str]
    rewards: Sequence[float]
    seed: int
    grades: Sequence[Mapping[str, int]] = ()


class Selection(Protocol):
    """`rewarded`: whether it looks at rewards at all; `levels`: into how many it puts each reward, 0 into
    none."""

    rewarded: ClassVar[bool]
    levels: int

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """The rows of one prompt, perhaps none."""
        ...

    def asked(self, prompt: Prompt, policy: int, names: Sequence[str]) -> Prompt:
        """What policy number `policy` is asked, 0 the model at the start; `names`: those of the rewards."""
        ...


class Plain(Config):
    """What selections have in common that ask the prompts as they are."""

    levels: ClassVar[int] = 0

    def asked(self, prompt: Prompt, policy: int, names: Sequence[str]) -> Prompt:
        """The prompt itself."""
        return prompt


class Everything(Plain):
    """All answers with their rewards; the method's `pairs` says which are compared."""

    rewarded: ClassVar[bool] = True

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """One row."""
        if judged.texts:
            yield scored_row(judged, judged.texts, judged.rewards)


class RejectionSampled(Plain):
    """Statistical rejection sampling (RSO, arXiv:2309.06657, algorithm 1): of the n answers those that a
    sampler of exp(reward / s) over the policy would have accepted."""

    rewarded: ClassVar[bool] = True

    keep: int = Field(8, ge=2)
    """answers of a prompt that are accepted"""
    sampling_beta: float = Field(0.5, gt=0)
    """s: towards 0 only the best are accepted, towards infinity any"""

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """One row with the accepted answers."""
        rng = np.random.default_rng([judged.seed, zlib.crc32(judged.prompt.id.encode())])
        kept = accepted(np.asarray(judged.rewards), self.keep, self.sampling_beta, rng)
        if len(kept) > 1:
            yield scored_row(judged, [judged.texts[i] for i in kept], [judged.rewards[i] for i in kept])


def accepted(rewards: np.ndarray, keep: int, beta: float, rng: np.random.Generator) -> list[int]:
    """Indices of `keep` accepted answers: passes over those that are left, each accepted with probability
    exp((r - max r) / beta), until there are enough."""
    left, kept = list(range(len(rewards))), []
    while left and len(kept) < keep:
        chance = acceptance(rewards[left], beta)
        found = [i for i, p in zip(left, chance, strict=True) if rng.random() < p][: keep - len(kept)]
        kept += found
        left = [i for i in left if i not in found]
    return kept


def acceptance(rewards: np.ndarray, beta: float) -> np.ndarray:
    """The probability that each is accepted in a pass over them."""
    return np.exp((rewards - rewards.max()) / beta)


class ClearPairs(Plain):
    """Every pair of answers whose preference is clear enough: sigmoid((r_i - r_j) / t) > eta (RS-DPO,
    arXiv:2402.10038, eq. 5)."""

    rewarded: ClassVar[bool] = True

    eta: float = Field(0.85, ge=0.5, lt=1)
    """probability from which a preference counts"""
    reward_scale: float = Field(1.0, gt=0)
    """t: the gap of rewards that is one unit of it"""

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """One row a pair."""
        for chosen, rejected in clear_pairs(np.asarray(judged.rewards), self.eta, self.reward_scale):
            yield pair_row(judged, judged.texts[chosen], judged.texts[rejected], f"{chosen}-{rejected}")


def clear_pairs(rewards: np.ndarray, eta: float, scale: float) -> list[tuple[int, int]]:
    """(better, worse) indices."""
    chance = 1 / (1 + np.exp(-(rewards[:, None] - rewards[None]) / scale))
    return [(int(i), int(j)) for i, j in np.argwhere(chance > eta)]


class AgainstRow(Plain):
    """The row's own answer against the policy's (SPIN, arXiv:2401.01335): no reward is asked for."""

    rewarded: ClassVar[bool] = False

    def __call__(self, judged: Judged) -> Iterator[dict[str, Any]]:
        """One row for each answer that is not the row's own word for word."""
        own = own_answer(judged.prompt)
        for i, text in enumerate(judged.texts if own else ()):
            if text.strip() != str(own).strip():
                yield pair_row(judged, str(own), text, str(i))


def own_answer(prompt: Prompt) -> str | None:
    """The answer that a row brings: the assistant's last turn, or `completion`, `response`, `output`."""
    turns = next((prompt.row[k] for k in ("messages", "conversations") if prompt.row.get(k)), None)
    if turns and prompt.messages is not None and len(turns) > len(prompt.messages):
        last = turns[-1]
        return last.get("content", last.get("value"))
    return next((prompt.row[k] for k in ("completion", "response", "output") if prompt.row.get(k)), None)


def scored_row(judged: Judged, texts: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """A row of scored answers."""
    prompt, about = judged.prompt, {"id": judged.prompt.id}
    answers = {"completions": list(texts), "scores": list(scores)}
    if prompt.messages is None:
        return {**about, "prompt": prompt.text, **answers}
    return {**about, "messages": chat_turns(prompt), **answers}


def pair_row(judged: Judged, chosen: str, rejected: str, name: str) -> dict[str, Any]:
    """A row of a pair."""
    prompt = judged.prompt
    about = {"id": f"{prompt.id}:{name}", "parent": prompt.id}
    if prompt.messages is None:
        return {**about, "prompt": prompt.text, "chosen": chosen, "rejected": rejected}
    turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return {**about, "prompt": chat_turns(prompt), "chosen": turn(chosen), "rejected": turn(rejected)}


def chat_turns(prompt: Prompt) -> list[dict[str, str]]:
    """A chat without the answer that its row may bring."""
    return [{"role": m.role, "content": m.content} for m in prompt.messages or ()]
