"""Row recognisers: which published row format a JSON object is, and the record it becomes.

`FORMATS` is tried from the top; the first whose `matches` accepts the row's keys converts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxalign.data.records import (
    Message,
    RowError,
    SFTRecord,
    UnwantedRowError,
    as_messages,
    as_text,
    chat_record,
    completion_record,
    text_record,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One row format: its name, its keys in words, a test on the row, and the conversion."""

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[..., SFTRecord]  # (row, **fields) -> record; raises RowError, UnwantedRowError


def structured(value: Any) -> Any:
    """A value that a table stored as a JSON string, decoded; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def is_turns(value: Any) -> bool:
    """Whether the value is a list of messages (as opposed to plain text)."""
    value = structured(value)
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, led by the row's `system` text if it has one and they do not."""
    system = as_text(row.get("system"), "system")
    if not system.strip() or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def from_messages(row: Row, **fields: Any) -> SFTRecord:
    """OpenAI: `messages: [{role, content}]`. With a boolean `label`, only wanted answers are learned."""
    if row.get("label") is False:
        raise UnwantedRowError("label is false: an unwanted answer is not learned")
    return chat_record(with_system(row, as_messages(structured(row["messages"]))), **fields)


def from_sharegpt(row: Row, **fields: Any) -> SFTRecord:
    """ShareGPT: `conversations: [{from, value}]`, also with role and content."""
    return chat_record(with_system(row, as_messages(structured(row["conversations"]))), **fields)


def from_completion(row: Row, **fields: Any) -> SFTRecord:
    """`prompt` and `completion` (or `response`): two strings, or two lists of messages."""
    if row.get("label") is False:
        raise UnwantedRowError("label is false: an unwanted answer is not learned")
    answer = row["completion"] if "completion" in row else row["response"]
    if is_turns(row["prompt"]):
        prompt = with_system(row, as_messages(structured(row["prompt"])))
        return chat_record(prompt + answer_turns(answer), prompt_turns=len(prompt), **fields)
    return completion_record(as_text(row["prompt"], "prompt"), as_text(answer, "completion"), **fields)


def from_alpaca(row: Row, **fields: Any) -> SFTRecord:
    """Alpaca: `instruction`, `input`, `output`, and perhaps `system` and `history: [[user, assistant]]`."""
    question = as_text(row["instruction"], "instruction")
    context = as_text(row.get("input"), "input")
    turns: list[Message] = []
    for pair in structured(row.get("history")) or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("history is not a list of [instruction, answer] pairs")
        turns += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    turns.append(Message("user", f"{question}\n{context}" if context.strip() else question))
    turns.append(Message("assistant", as_text(row["output"], "output")))
    return chat_record(with_system(row, tuple(turns)), **fields)


def from_text(row: Row, **fields: Any) -> SFTRecord:
    """`text`: one string."""
    return text_record(as_text(row["text"], "text"), **fields)


def from_preference(row: Row, **fields: Any) -> SFTRecord:
    """A preference row: the chosen answer is what SFT learns; the rejected one is left out."""
    context = next((row[key] for key in ("conversations", "messages", "prompt") if row.get(key)), None)
    chosen = structured(row["chosen"])
    if context is None and isinstance(chosen, str):
        return from_transcript(chosen, **fields)
    if context is None:
        turns = as_messages(chosen)
        return chat_record(turns, prompt_turns=len(turns) - 1, **fields)
    if is_turns(context):
        prompt = with_system(row, as_messages(structured(context)))
    elif isinstance(chosen, str):
        return completion_record(as_text(context, "prompt"), chosen, **fields)
    else:
        prompt = with_system(row, (Message("user", as_text(context, "prompt")),))
    answer = answer_turns(chosen)
    # UltraFeedback repeats the prompt inside `chosen`.
    repeats = len(answer) > 1 and answer[0].role in ("system", "user")
    turns = answer if repeats else prompt + answer
    return chat_record(turns, prompt_turns=len(turns) - 1 if repeats else len(prompt), **fields)


def answer_turns(value: Any) -> tuple[Message, ...]:
    """An answer as turns: a string is one assistant turn, else a message or a list of them."""
    value = structured(value)
    return (Message("assistant", value),) if isinstance(value, str) else as_messages(value)


def from_transcript(transcript: str, **fields: Any) -> SFTRecord:
    """A transcript in HH-RLHF form: turns begin with `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)
    if len(parts) < 3 or parts[0].strip():
        raise RowError("chosen has no prompt and is not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = tuple(Message(roles[name], text.strip()) for name, text in pairs)
    if turns[-1].role != "assistant":
        raise RowError("the transcript ends on the human's turn")
    return chat_record(turns, prompt_turns=len(turns) - 1, **fields)


FORMATS: tuple[Format, ...] = (
    Format(
        "preference",
        "conversations|messages|prompt + chosen",
        lambda row: "chosen" in row,
        from_preference,
    ),
    Format("messages", "messages", lambda row: "messages" in row, from_messages),
    Format("sharegpt", "conversations", lambda row: "conversations" in row, from_sharegpt),
    Format(
        "completion",
        "prompt + completion",
        lambda row: "prompt" in row and ("completion" in row or "response" in row),
        from_completion,
    ),
    Format(
        "alpaca",
        "instruction + output (+ input, history, system)",
        lambda row: "instruction" in row and "output" in row,
        from_alpaca,
    ),
    Format("text", "text", lambda row: "text" in row, from_text),
)

KNOWN = "; ".join(f"{f.name}: {f.keys}" for f in FORMATS)


def recognise(row: Any) -> Format:
    """The first format of `FORMATS` that accepts the row. Raises `RowError` naming its columns."""
    if not isinstance(row, dict):
        raise RowError("the row is not an object")
    for candidate in FORMATS:
        if candidate.matches(row):
            return candidate
    raise RowError(f"unknown columns ({', '.join(map(str, list(row)[:6]))})")


def to_record(row: Any, *, source: str = "", place: str = "") -> tuple[SFTRecord, str]:
    """(record, format name) of one row. Raises `RowError` or `UnwantedRowError`."""
    found = recognise(row)
    meta = {key: row[key] for key in ("id", "meta", "margin", "score") if row.get(key) is not None}
    return found.convert(row, source=source, place=place, meta=meta), found.name
