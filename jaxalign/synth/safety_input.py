"""What the safety builder works on: questions with answers, out of every kind of row that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxalign.data.formats import to_records
from jaxalign.data.group_formats import GROUP_FORMATS, native
from jaxalign.data.preferences import BinaryRecord, GroupRecord, PreferenceRecord, ScoredRecord, Text
from jaxalign.data.readers import LoadReport, load, to_prompts, unique_ids
from jaxalign.data.records import Message, RowError, SFTRecord, UnwantedRowError, content_id

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Item:
    """One prompt and the answers to it.

    known  {number of an answer: whether the data calls it safe}
    label  the class by which rows are balanced, empty where the data names none
    """

    id: str
    prompt: Turns
    answers: tuple[str, ...] = ()
    known: dict[int, bool] = field(default_factory=dict)
    label: str = ""
    source: str = ""

    @property
    def question(self) -> str:
        """The prompt in words; several turns are told apart."""
        if len(self.prompt) == 1:
            return self.prompt[0].content
        return "\n\n".join(f"{turn.role}: {turn.content}" for turn in self.prompt)


def read_items(
    data: str | Path | Sequence[str | Path], *, label: str = "", max_bad_rows: float = 0.1
) -> tuple[list[Item], LoadReport]:
    """The items of pairs, lists, labelled answers, answers to imitate, or prompts alone; rows of one prompt
    are one item. Raises `UserError` as `load` does."""

    def convert(row: Any, place: str, source: str) -> tuple[list[Any], str]:
        grouped = isinstance(row, dict) and any(known.matches(row) for known in GROUP_FORMATS)
        if grouped:
            parts, name = native(row, source=source, place=place)
        else:
            parts, name = _answered(row, place, source) or to_prompts(row, place, source)
        return [_item(part, row, label, source) for part in parts], name

    found, report = load(data, convert, max_bad_rows=max_bad_rows)
    merged: dict[Turns, Item] = {}
    for item in found:
        merged[item.prompt] = _joined(merged[item.prompt], item) if item.prompt in merged else item
    return unique_ids(list(merged.values())), report


def _answered(row: Any, place: str, source: str) -> tuple[list[Any], str] | None:
    """The row as one with an answer to imitate, or None where it has none."""
    try:
        made, name = to_records(row, source=source, place=place)
    except (RowError, UnwantedRowError):
        return None
    return made, name


def _item(part: Any, row: Any, label: str, source: str) -> Any:
    """The item of one record or prompt, or the fault that stands in its place."""
    if isinstance(part, RowError | UnwantedRowError):
        return part
    try:
        prompt, answers = _split(part)
    except RowError as reason:
        return reason
    meta = getattr(part, "meta", {})
    named = meta.get(label, row.get(label) if isinstance(row, dict) else None) if label else None
    name = content_id([[m.role, m.content] for m in prompt])
    known = _known(part, row)
    return Item(name, prompt, answers, known, "" if named is None else str(named), source)


def _split(part: Any) -> tuple[Turns, tuple[str, ...]]:
    """(prompt, answers). Raises `RowError`."""
    if isinstance(part, GroupRecord):
        answers = part.completions if isinstance(part, ScoredRecord) else part.answers
        return _turns(part.prompt), tuple(_text(answer) for answer in answers)
    if isinstance(part, SFTRecord):
        if part.messages is None:
            if part.prompt is None or part.completion is None:
                raise RowError("a text without a question")
            return _turns(part.prompt), (part.completion,)
        return part.messages[:-1], (part.messages[-1].content,)
    return _turns(part.text if part.messages is None else part.messages), ()


def _known(part: Any, row: Any) -> dict[int, bool]:
    """What the data says of the safety of its answers; a label by another name may mean something else."""
    if isinstance(part, BinaryRecord):
        return {0: part.label} if "is_safe" in row else {}
    said = part.meta.get("safe") if isinstance(part, PreferenceRecord) else None
    values = [said.get(name) for name in ("chosen", "rejected")] if isinstance(said, dict) else []
    return {i: value for i, value in enumerate(values) if isinstance(value, bool)}


def _turns(prompt: Text) -> Turns:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _text(answer: Text) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise RowError("an answer of several turns")
    return answer[0].content


def _joined(first: Item, second: Item) -> Item:
    """Both items of one prompt, each answer once."""
    answers, known = list(first.answers), dict(first.known)
    for i, answer in enumerate(second.answers):
        if answer not in answers:
            answers.append(answer)
        if i in second.known:
            known.setdefault(answers.index(answer), second.known[i])
    return replace(first, answers=tuple(answers), known=known, label=first.label or second.label)
