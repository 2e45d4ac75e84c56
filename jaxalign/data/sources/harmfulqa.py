"""HarmfulQA and CatQA (arXiv:2308.09662, 2402.11746): questions under topics, and conversations on them.

The questions are one JSON object {topic: {subtopic: [question, ...]}}. A row of conversations has a question,
safe (`blue_conversations`) and unsafe ones (`red_conversations`), each {number: [{from, value}, ...]}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxalign.data.files import Rows
from jaxalign.data.preferences import BinaryRecord, PreferenceRecord, Turns, binary_record, pair_record
from jaxalign.data.records import (
    RowError,
    SFTRecord,
    UnwantedRowError,
    as_messages,
    chat_record,
    check_roles,
    content_id,
    other_keys,
    structured,
)

Row = dict[str, Any]
Part = PreferenceRecord | BinaryRecord | RowError

BLUE, RED = "blue_conversations", "red_conversations"
KEYS = f"question + {BLUE} + {RED}"


def is_nested(row: Any) -> bool:
    """Whether the object holds questions under topics and subtopics."""
    if not isinstance(row, dict) or not row or not all(isinstance(value, dict) for value in row.values()):
        return False
    lists = [found for below in row.values() for found in below.values() if isinstance(found, list)]
    return any(isinstance(question, str) for found in lists for question in found)


def joined(rows: Rows) -> Rows:
    """The rows, with a row {topic, subtopic, question} for every question of a nested object."""
    for place, row in rows:
        if not is_nested(row):
            yield place, row
            continue
        file = place.rpartition(":")[0]
        for topic, below in row.items():
            for subtopic, found in below.items():
                where = f"{file}:{topic} / {subtopic}"
                if not isinstance(found, list):
                    yield where, RowError("no list of questions under the subtopic")
                    continue
                for number, question in enumerate(found, start=1):
                    yield f"{where}:{number}", _question(topic, subtopic, question)


def _question(topic: str, subtopic: str, question: Any) -> Row | RowError:
    if not isinstance(question, str):
        return RowError("a question is not text")
    return {"topic": topic, "subtopic": subtopic, "question": question}


def is_conversations(row: Row) -> bool:
    """Whether the row has conversations on a question."""
    return BLUE in row or RED in row


def _threads(row: Row, key: str) -> dict[str, Any]:
    """{number: messages as they stand}; a table has None where a row has fewer conversations than others."""
    found = structured(row.get(key)) or {}
    if isinstance(found, list):
        found = {str(i): thread for i, thread in enumerate(found)}
    if not isinstance(found, dict):
        raise RowError(f"{key} is not an object of conversations")
    return {str(k): thread for k, thread in found.items() if thread}


def _turns(thread: Any) -> Turns:
    """A conversation up to its last answer. Raises `RowError`."""
    turns = as_messages(structured(thread))
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=-1)
    if last < 0:
        raise RowError("no assistant turn")
    return check_roles(turns[: last + 1])


def from_conversations(row: Row, **fields: Any) -> list[Part]:
    """A pair where a safe and an unsafe conversation of one number begin alike; that is its prompt.

    Any other conversation is an answer with a label, wanted if it is safe. A row is one family.
    """
    fields = _about(row, fields)
    threads = {"blue": _threads(row, BLUE), "red": _threads(row, RED)}
    out: list[Part] = []
    for number in dict.fromkeys([*threads["blue"], *threads["red"]]):
        turns: dict[str, Turns] = {}
        for colour, found in threads.items():
            try:
                turns |= {colour: _turns(found[number])} if number in found else {}
            except RowError as reason:
                out.append(reason)
        out += _parts(turns, number, fields)
    return out


def _parts(turns: dict[str, Turns], number: str, fields: dict[str, Any]) -> list[Part]:
    """The pair of two conversations {colour: turns}, or each as an answer with a label."""
    name = fields["meta"]["id"]
    blue, red = turns.get("blue", ()), turns.get("red", ())
    same = _shared(blue, red)
    made: list[tuple[Callable[..., Part], tuple[Any, ...], str]]
    if same:
        made = [(pair_record, (blue[:same], blue[same:], red[same:]), f"{name}:{number}")]
    else:
        starts = {c: next(i for i, m in enumerate(t) if m.role == "assistant") for c, t in turns.items()}
        made = [
            (binary_record, (turns[c][:start], turns[c][start:], c == "blue"), f"{name}:{number}:{c}")
            for c, start in starts.items()
        ]
    out: list[Part] = []
    for make, content, own in made:
        try:
            out.append(make(*content, **(fields | {"family": name, "meta": fields["meta"] | {"id": own}})))
        except RowError as reason:
            out.append(reason)
    return out


def _about(row: Row, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what the row says in `meta`, and the row's id: its own, or a hash of the question."""
    name = str(row["id"]) if row.get("id") is not None else content_id(row.get("question"))
    return fields | {"meta": fields.get("meta", {}) | other_keys(row, BLUE, RED) | {"id": name}}


def _shared(one: Turns, other: Turns) -> int:
    """How many turns both begin with, up to the last user's turn that each answers in its own way."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    while same and one[same - 1].role != "user":
        same -= 1
    return same


def sft_from_conversations(row: Row, **fields: Any) -> list[SFTRecord | RowError | UnwantedRowError]:
    """The safe conversations. Raises `UnwantedRowError` where there is none."""
    threads = _threads(row, BLUE)
    if not threads:
        raise UnwantedRowError("no safe conversation")
    fields = _about(row, fields)
    out: list[SFTRecord | RowError | UnwantedRowError] = []
    for number, thread in threads.items():
        named = fields["meta"] | {"id": f"{fields['meta']['id']}:{number}"}
        try:
            out.append(chat_record(_turns(thread), **(fields | {"meta": named})))
        except RowError as reason:
            out.append(reason)
    return out
