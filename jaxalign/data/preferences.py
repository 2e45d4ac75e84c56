"""Rows that compare or judge answers: (chosen, rejected), an answer with a label, answers with scores.

Each has one prompt. Prompt and answers are turns alike, or strings alike. Of every kind, `answers` are those
that a loss sees, in its order, and `aux` what it needs besides: numbers, or arrays with one for each answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from jaxalign.data.records import Message, RowError, check_roles, content_id

Turns = tuple[Message, ...]
Text = Turns | str  # turns go through the chat template, a string stands as it is


EACH = ("aspects", "models")  # keys of a list's `meta` whose values stand in the order of its answers


def _reordered(value: Any, order: Sequence[int], length: int) -> Any:
    """A list of `length` in another order, or each such list of an object."""
    if isinstance(value, dict):
        return {name: _reordered(found, order, length) for name, found in value.items()}
    return [value[i] for i in order] if isinstance(value, list) and len(value) == length else value


@dataclass(frozen=True)
class PreferenceRecord:
    """Two answers to one prompt, of which `chosen` is preferred.

    margin  by how much: score of the chosen less that of the rejected, not negative; None where unknown
    family  rows of one family (a tree, else a prompt) are never split into training and evaluation
    The other fields are those of `SFTRecord`.
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    parent: str = ""
    source: str = ""
    method: str = ""
    place: str = ""
    family: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Text, ...]:
        """(chosen, rejected)."""
        return self.chosen, self.rejected

    @property
    def aux(self) -> dict[str, Any]:
        """`margin`, NaN where unknown; `safe`, bool of (chosen, rejected), where `meta` says it of both."""
        margin = {"margin": np.float32(math.nan if self.margin is None else self.margin)}
        said = self.meta.get("safe")
        safe = [said.get(name) for name in ("chosen", "rejected")] if isinstance(said, dict) else []
        known = bool(safe) and all(isinstance(value, bool) for value in safe)
        return margin | ({"safe": np.array(safe)} if known else {})


@dataclass(frozen=True)
class BinaryRecord:
    """One answer and whether it is wanted."""

    id: str
    prompt: Text
    completion: Text
    label: bool
    parent: str = ""
    source: str = ""
    method: str = ""
    place: str = ""
    family: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[Text, ...]:
        """The answer alone."""
        return (self.completion,)

    @property
    def aux(self) -> dict[str, Any]:
        """`label`."""
        return {"label": np.bool_(self.label)}


@dataclass(frozen=True)
class ScoredRecord:
    """Several answers to one prompt with a score each, higher is better, None where one has none."""

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float | None, ...]
    parent: str = ""
    source: str = ""
    method: str = ""
    place: str = ""
    family: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ranked(self) -> list[tuple[float, int]]:
        """(score, index) of the answers that have one, best first, ties in their order."""
        scored = [(s, i) for i, s in enumerate(self.scores) if s is not None]
        return sorted(scored, key=lambda item: -item[0])

    def top(self, best: int | None) -> ScoredRecord:
        """The record with its `best` so many answers that have a score; None: with all of them."""
        kept = self.ranked[:best]
        completions = tuple(self.completions[i] for _, i in kept)
        order, length = [i for _, i in kept], len(self.completions)
        meta = {k: _reordered(v, order, length) if k in EACH else v for k, v in self.meta.items()}
        return replace(self, completions=completions, scores=tuple(score for score, _ in kept), meta=meta)

    @property
    def answers(self) -> tuple[Text, ...]:
        """Those that have a score, best first."""
        return tuple(self.completions[i] for _, i in self.ranked)

    @property
    def aux(self) -> dict[str, Any]:
        """`scores` of the answers, float32 [G]."""
        return {"scores": np.asarray([score for score, _ in self.ranked], np.float32)}


GroupRecord = PreferenceRecord | BinaryRecord | ScoredRecord
Record = TypeVar("Record", PreferenceRecord, BinaryRecord, ScoredRecord)


def pair_record(
    prompt: Text, chosen: Text, rejected: Text, *, margin: Any = None, **fields: Any
) -> PreferenceRecord:
    """A checked pair. Raises `RowError` for a bad prompt, an empty answer, equal answers or a bad margin."""
    prompt, answers = check_answers(prompt, {"chosen": chosen, "rejected": rejected})
    if plain(answers[0]) == plain(answers[1]):
        raise RowError("chosen and rejected are equal")
    gap = None if margin is None else as_number(margin, "the margin")
    if gap is not None and gap < 0:
        raise RowError("negative margin: the rejected answer has the higher score")
    return finish(PreferenceRecord("", prompt, *answers, margin=gap, **fields), answers)


def binary_record(prompt: Text, completion: Text, label: Any, **fields: Any) -> BinaryRecord:
    """A checked answer with its label. Raises `RowError`."""
    prompt, answers = check_answers(prompt, {"the answer": completion})
    return finish(BinaryRecord("", prompt, answers[0], as_label(label), **fields), (answers, label))


def scored_record(prompt: Text, completions: Sequence[Text], scores: Any, **fields: Any) -> ScoredRecord:
    """Checked answers with their scores. Raises `RowError`."""
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(completions):
        raise RowError("not one score for every answer")
    if not completions:
        raise RowError("no answers")
    prompt, answers = check_answers(prompt, {f"answer {i + 1}": a for i, a in enumerate(completions)})
    numbers = tuple(None if s is None else as_number(s, "a score") for s in scores)
    return finish(ScoredRecord("", prompt, answers, numbers, **fields), (answers, numbers))


def check_answers(prompt: Text, answers: dict[str, Text]) -> tuple[Text, tuple[Text, ...]]:
    """The prompt without empty system turns, and the answers. Raises `RowError`, naming the answer at fault.

    Turns must alternate through the prompt and each answer; an answer begins and ends with the assistant.
    """
    if isinstance(prompt, str):
        for name, answer in answers.items():
            if not isinstance(answer, str):
                raise RowError(f"the prompt is a string and {name} is not")
            if not answer.strip():
                raise RowError(f"empty answer: {name}")
        return prompt, tuple(answers.values())
    prompt = tuple(m for m in prompt if m.role != "system" or m.content.strip())
    if not prompt:
        raise RowError("no prompt")
    for name, answer in answers.items():
        _check_turns(prompt, answer, name)
    return prompt, tuple(answers.values())


def _check_turns(prompt: Turns, answer: Text, name: str) -> None:
    if isinstance(answer, str) or not answer:
        raise RowError(f"{name} is not a list of turns")
    if answer[-1].role == "assistant" and not answer[-1].content.strip():
        raise RowError(f"empty answer: {name}")
    try:
        check_roles(prompt + answer)
    except RowError as reason:
        raise RowError(f"{reason} ({name})") from None
    for turn, place in ((answer[0], "begins"), (answer[-1], "ends")):
        if turn.role != "assistant":
            raise RowError(f"{name} {place} with the {turn.role}'s turn")


def plain(answer: Text) -> tuple[str, ...]:
    """What an answer says, by which two are compared."""
    return (answer.strip(),) if isinstance(answer, str) else tuple(m.content.strip() for m in answer)


def as_label(raw: Any) -> bool:
    """True or false; a table without types may spell them out. Raises `RowError` for anything else."""
    found = {"true": True, "false": False}.get(raw.strip().lower(), raw) if isinstance(raw, str) else raw
    if not isinstance(found, bool | np.bool_):
        raise RowError(f"the label is neither true nor false: {raw!r:.40}")
    return bool(found)


def as_number(raw: Any, what: str) -> float:
    """A finite number, perhaps spelled out. Raises `RowError`."""
    try:
        number = math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{what} is not a number: {raw!r:.40}")
    return number


def finish(record: Record, content: Any) -> Record:
    """The record with its id (the row's own, else a hash of its content) and its family (else the prompt)."""
    own = record.meta.get("id")
    prompt = record.prompt if isinstance(record.prompt, str) else _spelled(record.prompt)
    name = str(own) if own is not None and str(own).strip() else content_id(prompt, _spelled(content))
    return replace(record, id=record.id or name, family=record.family or content_id(prompt))


def _spelled(content: Any) -> Any:
    """Turns as lists, so that a hash depends on their words alone."""
    if isinstance(content, Message):
        return [content.role, content.content]
    return [_spelled(part) for part in content] if isinstance(content, tuple | list) else content
