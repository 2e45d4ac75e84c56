"""The rule by which both sides reward answers: in TRL's form, which jaxalign takes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def characters(completions: Sequence[str], **_: Any) -> list[float]:
    """Thousands of characters of each answer: answers of equally many tokens rarely have equally many."""
    return [len(text) / 1000 for text in completions]
