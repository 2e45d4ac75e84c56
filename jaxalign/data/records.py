"""Canonical rows. One frozen dataclass per kind; today SFT, later PREF, BINARY and SCORED beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

# What other sets call the same four roles.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}


class RowError(ValueError):
    """Why one row cannot become a record. The message is the reason that reports count by."""


class UnwantedRowError(ValueError):
    """Why one sound row is not meant for this use, such as an answer labelled as unwanted."""


@dataclass(frozen=True)
class Mended:
    """In place of a row: what a reader mended in the file, for the report."""

    what: str


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of `ROLES`, `content` its text."""

    role: str
    content: str


@dataclass(frozen=True)
class SFTRecord:
    """One row to imitate, in exactly one of three forms.

    messages            a chat: it goes through the chat template. The first `prompt_turns` messages are
                        the prompt of a prompt/completion row (0: every assistant turn is learned alike)
    prompt, completion  plain text: no template, the completion is learned, EOS is appended
    text                plain text: all of it is learned, EOS is appended
    id                  the row's own id, or a hash of its content
    parent              id of the row this one was made from; method: how; source: the set it came from
    place               `file:line`, for messages to the user
    """

    id: str
    messages: tuple[Message, ...] | None = None
    prompt_turns: int = 0
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    parent: str = ""
    source: str = ""
    method: str = ""
    place: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """`messages`, `completion` or `text`."""
        if self.messages is not None:
            return "messages"
        return "text" if self.text is not None else "completion"


@dataclass(frozen=True)
class Prompt:
    """One row to answer: `messages` go through the chat template, `text` is continued as it stands.

    `row` is the row as it was read, so that its other keys reach the output.
    """

    id: str
    messages: tuple[Message, ...] | None
    text: str | None
    row: dict[str, Any]
    place: str = ""


def content_id(*parts: Any) -> str:
    """First 16 hex digits of the sha256 of `parts` as JSON: the id of a row that brings none."""
    blob = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str).encode()
    return hashlib.sha256(blob).hexdigest()[:16]


def as_message(raw: Any) -> Message:
    """One turn in OpenAI form (`role`, `content`) or ShareGPT form (`from`, `value`). Raises `RowError`."""
    if not isinstance(raw, dict):
        raise RowError("a message is not an object")
    name = raw.get("role", raw.get("from"))
    role = ROLE_NAMES.get(str(name).strip().lower())
    if role is None:
        raise RowError(f"unknown role {name!r}")
    if raw.get("tool_calls"):
        raise RowError("tool calls are not supported")
    return Message(role, as_text(raw.get("content", raw.get("value")), f"{role} message"))


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


def other_keys(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """What a row says besides the keys that its record is made of, for the record's `meta`."""
    return {k: v for k, v in row.items() if k not in (*used, "id", "meta") and v is not None}


def said(row: dict[str, Any], key: str) -> Message:
    """The text under `key` as the user's turn. Raises `RowError` where there is none."""
    text = as_text(row.get(key), key)
    if not text.strip():
        raise RowError(f"no {key}")
    return Message("user", text)


def replied(row: dict[str, Any], key: str) -> tuple[Message, ...]:
    """The text under `key` as the assistant's turn. Raises `RowError` where there is none."""
    return (Message("assistant", said(row, key).content),)


def as_text(raw: Any, what: str) -> str:
    """A string, or a list of OpenAI text parts joined. Raises `RowError` for anything else."""
    if isinstance(raw, str):
        return raw
    if raw is None:
        return ""
    if isinstance(raw, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in raw):
        return "".join(str(part.get("text") or "") for part in raw)
    raise RowError(f"{what} is not text")


def as_messages(raw: Any) -> tuple[Message, ...]:
    """A list of turns, or one turn. Raises `RowError`."""
    turns = [raw] if isinstance(raw, dict) else raw
    if not isinstance(turns, list) or not turns:
        raise RowError("no messages")
    return tuple(as_message(turn) for turn in turns)


def check_roles(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without empty system turns, or `RowError` with the role-order fault.

    Order: system turns first, then user and assistant in turn; tool turns lie between two assistant turns.
    """
    messages = tuple(m for m in messages if m.role != "system" or m.content.strip())
    talk = [m for m in messages if m.role != "system"]
    if not any(m.role == "user" for m in talk):
        raise RowError("no user turn")
    if any(m.role == "system" for m in messages[len(messages) - len(talk) :]):
        raise RowError("turn order: system after the start")
    if talk[0].role != "user":
        raise RowError(f"turn order: {talk[0].role} first")
    before = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    for previous, turn in pairwise(talk):
        if previous.role not in before[turn.role]:
            raise RowError(f"turn order: {turn.role} after {previous.role}")
    for turn in talk:
        if not turn.content.strip():
            raise RowError(f"empty {turn.role} turn")
    return messages


def chat_record(messages: tuple[Message, ...], *, prompt_turns: int = 0, **fields: Any) -> SFTRecord:
    """A checked chat record. Turns after the last assistant turn teach nothing and are cut."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last < prompt_turns:
        raise RowError("no assistant turn" if last < 0 else "no assistant turn in the answer")
    system = sum(1 for m in messages[:prompt_turns] if m.role == "system" and not m.content.strip())
    checked = check_roles(messages[: last + 1])
    return finish(SFTRecord("", messages=checked, prompt_turns=prompt_turns - system, **fields))


def completion_record(prompt: str, completion: str, **fields: Any) -> SFTRecord:
    """A checked plain prompt/completion record. An empty prompt is allowed, an empty completion is not."""
    if not completion.strip():
        raise RowError("empty completion")
    return finish(SFTRecord("", prompt=prompt, completion=completion, **fields))


def text_record(text: str, **fields: Any) -> SFTRecord:
    """A checked plain text record."""
    if not text.strip():
        raise RowError("empty text")
    return finish(SFTRecord("", text=text, **fields))


def finish(record: SFTRecord) -> SFTRecord:
    """The record with its id: the one in `meta`, else a hash of its content."""
    own = record.meta.get("id")
    if own is not None and str(own).strip():
        return replace(record, id=str(own))
    turns = [[m.role, m.content] for m in record.messages or ()]
    form = (turns, record.prompt_turns, record.prompt, record.completion, record.text)
    return replace(record, id=content_id(*form))
