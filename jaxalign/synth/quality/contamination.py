"""Rows that hold what stands in an evaluation set, by the rule of GPT-3 (arXiv:2005.14165, appendix C)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.readers import read_rows
from jaxalign.data.records import RowError
from jaxalign.errors import UserError
from jaxalign.synth.base import Work
from jaxalign.synth.quality.items import Fault, Item, Sieved
from jaxalign.synth.quality.text import normal, windows, words

LEAST_WORDS = 3  # shorter texts, such as the name of a category, stand everywhere


@dataclass(frozen=True)
class EvaluationSet:
    """What stands in one: its n-grams and its texts, each with the rows it stands in."""

    name: str
    size: int
    rows: int
    grams: dict[str, set[int]] = field(default_factory=dict)
    texts: dict[str, set[int]] = field(default_factory=dict)

    def by_gram(self, item: Item) -> tuple[set[int], str]:
        """Rows of the set that have an n-gram with one of the item's texts in common, and one such n-gram."""
        found, shown = set(), ""
        for piece in item.pieces:
            for gram in windows(words(piece.text), self.size):
                if gram in self.grams:
                    found |= self.grams[gram]
                    shown = shown or gram
        return found, shown

    def by_prompt(self, item: Item) -> set[int]:
        """Rows of the set in which a whole prompt of the item, or a user's turn of it, stands as a text."""
        return set().union(*(self.texts.get(normal(text), ()) for text in _asked(item)))


def contamination(items: Sequence[Item], work: Work) -> Sieved:
    """Rows with `contamination_ngram` words in a row, or a prompt, that stand in an evaluation set."""
    faults: dict[int, Fault] = {}
    about = {}
    for source in work.config.contamination:
        known = read_set(source, work.config.contamination_ngram)
        hit: set[int] = set()
        by_gram = by_prompt = 0
        for i, item in enumerate(items):
            like, shown = known.by_gram(item)
            same = known.by_prompt(item)
            by_gram, by_prompt = by_gram + bool(like), by_prompt + bool(same)
            hit |= like | same
            if like or same:
                why = f"it has {shown!r}" if shown else "its prompt"
                faults.setdefault(i, Fault(f"contamination: {source}", f"row {min(like | same) + 1}: {why}"))
        about[source] = {
            "rows_of_the_set": known.rows,
            "of_them_found": len(hit),
            "rows_with_an_ngram": by_gram,
            "rows_with_a_prompt": by_prompt,
        }
    return Sieved(faults, about)


def read_set(source: str, size: int) -> EvaluationSet:
    """An evaluation set of any form: every text in its rows, at any depth. Raises `UserError` for one without
    texts."""
    rows = [row for _, row in read_rows(source) if not isinstance(row, RowError)]
    found = EvaluationSet(source, size, len(rows))
    for i, row in enumerate(rows):
        for text in _texts(row):
            tokens = words(text)
            if len(tokens) >= LEAST_WORDS:
                found.texts.setdefault(normal(text), set()).add(i)
            for gram in windows(tokens, size):
                found.grams.setdefault(gram, set()).add(i)
    if not found.texts:
        raise UserError(
            "it holds no texts", place=f"contamination: {source}", remedy="name a file of an evaluation set"
        )
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _asked(item: Item) -> Iterator[str]:
    for each in item.exchanges:
        if isinstance(each.prompt, str):
            yield each.prompt
        else:
            yield from (turn.content for turn in each.prompt if turn.role == "user")
