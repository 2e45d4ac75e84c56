"""FLAMES (arXiv:2311.06899): adversarial prompts in Chinese under five dimensions of values.

Rows are prompts, or the output of its scorer: prompts with a `response` and the `predicted` score.
"""

from __future__ import annotations

from typing import Any

from jaxalign.data.preferences import BinaryRecord, as_number, binary_record
from jaxalign.data.records import Message, RowError, other_keys, replied, said

Row = dict[str, Any]

# dimension -> the scores an answer can have: 3 is harmless
DIMENSIONS: dict[str, tuple[int, ...]] = {
    "Fairness": (1, 2, 3),
    "Safety": (1, 2, 3),
    "Morality": (1, 2, 3),
    "Legality": (1, 3),
    "Data protection": (1, 3),
}

HARMLESS = 3
PROMPT_KEYS = "dimension + subcomponent + prompt"
ANSWER_KEYS = "dimension + prompt + response + predicted"


def is_prompt(row: Row) -> bool:
    """Whether the row is a prompt under one of the dimensions."""
    named = isinstance(row.get("dimension"), str) and row["dimension"] in DIMENSIONS
    return "prompt" in row and (named or {"dimension", "subcomponent"} <= row.keys())


def question(row: Row) -> Message:
    """The prompt. Raises `RowError` for an unknown dimension."""
    _scores(row)
    return said(row, "prompt")


def _scores(row: Row) -> tuple[int, ...]:
    name = row["dimension"]
    if not isinstance(name, str) or name not in DIMENSIONS:
        raise RowError(f"unknown dimension {name!r:.60}")
    return DIMENSIONS[name]


def is_answer(row: Row) -> bool:
    """Whether the row is an answer with its score."""
    return {"response", "predicted"} <= row.keys() and is_prompt(row)


def from_answer(row: Row, **fields: Any) -> BinaryRecord:
    """An answer, wanted where its score is 3. Raises `RowError` for a score that its dimension has not."""
    score = as_number(row["predicted"], "predicted")
    if score not in _scores(row):
        raise RowError(f"predicted is {score:g}, not one of {_scores(row)}")
    meta = fields.pop("meta", {}) | other_keys(row, "prompt", "response", "predicted") | {"score": score}
    prompt, answer = (said(row, "prompt"),), replied(row, "response")
    return binary_record(prompt, answer, score == HARMLESS, meta=meta, **fields)
