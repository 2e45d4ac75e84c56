"""What rows of every known kind say, in one form: each prompt with its answers, and which answer is what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxalign.data.formats import to_records
from jaxalign.data.group_formats import GROUP_FORMATS, native
from jaxalign.data.preferences import BinaryRecord, PreferenceRecord, ScoredRecord, Text
from jaxalign.data.records import Prompt, SFTRecord


@dataclass(frozen=True)
class Answer:
    """One answer. `role` is what it is: answer, chosen, rejected, wanted, unwanted, or its rank (`rank 1`);
    `score` is that of a scored one."""

    role: str
    content: Text
    score: float | None = None


@dataclass(frozen=True)
class Exchange:
    """A prompt, turns or a string, and the answers to it in the order of the row."""

    prompt: Text
    answers: tuple[Answer, ...]


def any_records(row: Any, *, source: str = "", place: str = "") -> tuple[list[Any], str]:
    """(records with the faults among them, format name) of a row of any known format: groups where it
    compares or judges answers, else rows to imitate. Raises `RowError` and `UnwantedRowError`."""
    if isinstance(row, dict) and any(known.matches(row) for known in GROUP_FORMATS):
        found, name = native(row, source=source, place=place)
        if found:
            return found, name  # a tree without ranked answers has threads to imitate
    return to_records(row, source=source, place=place)


def exchange(record: Any) -> Exchange:
    """What a record says."""
    return _SPLITS[type(record)](record)


def said(content: Text) -> str:
    """The words of turns, but not those of the system, or the string itself."""
    if isinstance(content, str):
        return content
    return "\n".join(m.content for m in content if m.role != "system")


def noted(row: dict[str, Any], key: str) -> str | None:
    """What a row's meta, else the row itself, has under `key`, in words; None where that is nothing."""
    meta = row.get("meta")
    for place in (meta if isinstance(meta, dict) else {}, row):
        if place.get(key) is not None:
            return str(place[key])
    return None


def _imitated(record: SFTRecord) -> Exchange:
    if record.messages is None:
        content = record.text if record.text is not None else record.completion
        return Exchange(record.prompt or "", (Answer("answer", content or ""),))
    split = record.prompt_turns or len(record.messages) - 1
    return Exchange(record.messages[:split], (Answer("answer", record.messages[split:]),))


def _pair(record: PreferenceRecord) -> Exchange:
    return Exchange(record.prompt, (Answer("chosen", record.chosen), Answer("rejected", record.rejected)))


def _labelled(record: BinaryRecord) -> Exchange:
    return Exchange(record.prompt, (Answer("wanted" if record.label else "unwanted", record.completion),))


def _scored(record: ScoredRecord) -> Exchange:
    """Equal scores share a rank."""
    levels = sorted({score for score in record.scores if score is not None}, reverse=True)
    ranks = {score: f"rank {i}" for i, score in enumerate(levels, start=1)}
    answers = (
        Answer("no score" if score is None else ranks[score], content, score)
        for content, score in zip(record.completions, record.scores, strict=True)
    )
    return Exchange(record.prompt, tuple(answers))


def _asked(record: Prompt) -> Exchange:
    return Exchange((record.text or "") if record.messages is None else record.messages, ())


_SPLITS: dict[type, Callable[[Any], Exchange]] = {
    SFTRecord: _imitated,
    Prompt: _asked,
    PreferenceRecord: _pair,
    BinaryRecord: _labelled,
    ScoredRecord: _scored,
}
