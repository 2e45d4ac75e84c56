"""Fake Alignment (arXiv:2311.05915): questions with a safe and an unsafe answer, to be asked with and without
the two as options."""

from __future__ import annotations

from typing import Any

from jaxalign.data.preferences import PreferenceRecord, pair_record
from jaxalign.data.records import other_keys, replied, said

POSITIVE, NEGATIVE = "Positive Option", "Negative Option"
KEYS = f"question + {POSITIVE} + {NEGATIVE}"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has one of the two options: a fault of the other is then named."""
    return POSITIVE in row or NEGATIVE in row


def from_row(row: dict[str, Any], **fields: Any) -> PreferenceRecord:
    """The positive option is chosen; `meta` has the category. Raises `RowError` for a missing text."""
    meta = fields.pop("meta", {}) | other_keys(row, "question", POSITIVE, NEGATIVE)
    chosen, rejected = replied(row, POSITIVE), replied(row, NEGATIVE)
    return pair_record((said(row, "question"),), chosen, rejected, meta=meta, **fields)
