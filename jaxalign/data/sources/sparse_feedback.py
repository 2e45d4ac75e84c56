"""Ratings and rankings of the same answers (arXiv:2308.15812), as its repository holds them.

Ratings and rankings are CSV files without a header; the pairs that a reward model learns from are one JSON
object {prompt: {"sentences": [[better, worse], ...]}}.
"""

from __future__ import annotations

from typing import Any

from jaxalign.data.files import Rows
from jaxalign.data.preferences import PreferenceRecord, pair_record
from jaxalign.data.records import Message, RowError, UnwantedRowError

RATING = ("instruction", "input", "output", "rating")
RANKING = ("instruction", "input", "output1", "output2", "ranking")
BETTER = {"(a)": ("output1", "output2"), "(b)": ("output2", "output1")}


def joined(rows: Rows) -> Rows:
    """The rows without repeated ones; all ratings of answers to one instruction become one row of scores."""
    seen: set[tuple[str, ...]] = set()
    lists: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for place, row in rows:
        names = _names(row)
        if names is None:
            yield place, row
            continue
        key = tuple(_blank(row[name]) for name in names[:-1])
        if key in seen:
            yield place, UnwantedRowError("a repeated row")
            continue
        seen.add(key)
        if names == RANKING:
            yield place, row
            continue
        start = {"instruction": key[0], "input": key[1], "completions": [], "scores": []}
        _, found = lists.setdefault((key[0], key[1]), (place, start))
        found["completions"].append(row["output"])
        found["scores"].append(row["rating"])
    yield from lists.values()


def _names(row: Any) -> tuple[str, ...] | None:
    keys = tuple(row) if isinstance(row, dict) else ()
    return keys if keys in (RATING, RANKING) else None


def _blank(text: str) -> str:
    """An empty field may have been written as `nan`."""
    return "" if text.strip().lower() == "nan" else text


def is_ranking(row: dict[str, Any]) -> bool:
    """Whether the row ranks two outputs."""
    return set(RANKING) <= row.keys()


def from_ranking(row: dict[str, Any], **fields: Any) -> PreferenceRecord:
    """The output that was ranked first is chosen. Raises `UnwantedRowError` for a tie."""
    if row["ranking"] == "equal":
        raise UnwantedRowError("a tie")
    if row["ranking"] not in BETTER:
        raise RowError(f"the ranking is {row['ranking']!r}")
    context = _blank(row["input"])
    question = f"{row['instruction']}\n{context}" if context.strip() else row["instruction"]
    chosen, rejected = ((Message("assistant", row[name]),) for name in BETTER[row["ranking"]])
    return pair_record((Message("user", question),), chosen, rejected, **fields)


def is_ranked(row: dict[str, Any]) -> bool:
    """Whether the object holds ranked pairs under each prompt."""
    return bool(row) and all(isinstance(v, dict) and "sentences" in v for v in row.values())


def from_ranked(row: dict[str, Any], **fields: Any) -> list[PreferenceRecord | RowError]:
    """A pair of strings for every [better, worse]."""
    out: list[PreferenceRecord | RowError] = []
    for prompt, found in row.items():
        for pair in found["sentences"]:
            try:
                if not isinstance(pair, list) or len(pair) != 2:
                    raise RowError("not a pair of sentences")
                out.append(pair_record(prompt, str(pair[0]), str(pair[1]), **fields))
            except RowError as reason:
                out.append(reason)
    return out
