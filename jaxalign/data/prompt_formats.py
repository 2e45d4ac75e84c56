"""Recognisers of rows to answer: which published form of a question a row is, and the prompts it becomes.

As in `formats`: `PROMPT_FORMATS` is tried from the top. The prompts of records that compare or judge answers
come late, for rows that have none of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxalign.data.formats import Format, Row, find_format, with_system
from jaxalign.data.group_formats import GROUP_FORMATS, native
from jaxalign.data.records import (
    Message,
    Prompt,
    RowError,
    UnwantedRowError,
    as_messages,
    as_text,
    check_roles,
    content_id,
    is_turns,
    said,
    structured,
)
from jaxalign.data.sources import beavertails, fake_alignment, fft, flames, harmfulqa, oasst


def to_prompt(row: Any, place: str) -> Prompt:
    """One row as a prompt. Raises `RowError`.

    `messages` and `conversations` (and a `prompt` that is a list of turns) go through the chat template; if
    they end on an assistant turn, that turn is the answer to give and is cut. `instruction` is one user turn.
    `prompt` and `text` strings are continued as they stand.
    """
    if not isinstance(row, dict):
        raise RowError("the row is not an object")
    turns = next(
        (row[key] for key in ("messages", "conversations", "prompt") if is_turns(row.get(key))), None
    )
    messages, text = None, None
    if turns is not None:
        messages = with_system(row, as_messages(structured(turns)))
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        messages = check_roles(messages)
    elif "prompt" in row or "text" in row:
        text = as_text(row.get("prompt", row.get("text")), "prompt")
    elif "instruction" in row:
        extra = as_text(row.get("input"), "input")
        question = as_text(row["instruction"], "instruction")
        messages = check_roles((Message("user", f"{question}\n{extra}" if extra.strip() else question),))
    else:
        raise RowError(f"unknown columns ({', '.join(map(str, list(row)[:6]))})")
    if text is not None and not text.strip():
        raise RowError("empty prompt")
    own = row.get("id")
    content = [[m.role, m.content] for m in messages or ()]
    name = content_id(content, text) if own is None or not str(own).strip() else str(own)
    return Prompt(name, messages, text, row, place)


def asked(question: Callable[[Row], Message]) -> Callable[..., Prompt]:
    """The conversion of rows with one question, which goes through the chat template as the user's turn."""

    def convert(row: Row, place: str) -> Prompt:
        turn = question(row)
        return Prompt(_own_id(row) or content_id([["user", turn.content]], None), (turn,), None, row, place)

    return convert


def _own_id(row: Row) -> str:
    return "" if row.get("id") is None else str(row["id"]).strip()


def from_tree(row: Row, place: str) -> list[Prompt]:
    """Every message of a tree that an assistant is to answer."""
    about = {key: value for key, value in row.items() if key not in ("prompt", "replies")}
    return [Prompt(name, turns, None, about, place) for name, turns in oasst.prompts_from_tree(row)]


def from_records(row: Row, place: str) -> list[Any]:
    """The prompts of the row's records, each once, with the faults among them: that of a transcript, say,
    stands before both of its answers."""
    parts, _ = native(row, place=place)
    found = _prompts_of(parts, row, place)
    if len(found) == 1 and isinstance(found[0], Prompt) and _own_id(row):
        return [replace(found[0], id=_own_id(row))]
    return found


def _prompts_of(parts: Sequence[Any], row: dict[str, Any], place: str) -> list[Any]:
    """The prompts of records, each once, with the faults among the records."""
    found: dict[Any, Any] = {}
    for part in parts:
        if isinstance(part, RowError | UnwantedRowError):
            found[len(found)] = part
        elif isinstance(part.prompt, str):
            found[part.prompt] = Prompt(content_id(part.prompt), None, part.prompt, row, place)
        else:
            name = content_id([[m.role, m.content] for m in part.prompt])
            found[part.prompt] = Prompt(name, part.prompt, None, row, place)
    return list(found.values())


PROMPT_KEYS = ("messages", "conversations", "prompt", "text", "instruction")

PROMPT_FORMATS: tuple[Format, ...] = (
    Format("tree", "message_tree_id + prompt with replies", oasst.is_tree, from_tree),
    Format("beavertails", beavertails.PROMPT_KEYS, beavertails.is_prompt, asked(beavertails.question)),
    Format(
        "beavertails answers",
        beavertails.ANSWER_KEYS,
        beavertails.is_answer,
        asked(lambda row: said(row, "prompt")),
    ),
    Format("pku", beavertails.PAIR_KEYS, beavertails.is_pair, asked(lambda row: said(row, "prompt"))),
    Format("flames", flames.PROMPT_KEYS, flames.is_prompt, asked(flames.question)),
    Format("fft", fft.KEYS, fft.is_case, asked(lambda row: said(row, "query"))),
    Format(
        "fake alignment",
        fake_alignment.KEYS,
        fake_alignment.matches,
        asked(lambda row: said(row, "question")),
    ),
    Format("harmfulqa", harmfulqa.KEYS, harmfulqa.is_conversations, asked(lambda row: said(row, "question"))),
    Format(
        "prompts",
        " | ".join(PROMPT_KEYS),
        lambda row: any(key in row for key in PROMPT_KEYS),
        to_prompt,
    ),
    *(Format(f.name, f.keys, f.matches, from_records) for f in GROUP_FORMATS),
    Format("question", "question", lambda row: "question" in row, asked(lambda row: said(row, "question"))),
)

KNOWN = "; ".join(f"{f.name}: {f.keys}" for f in PROMPT_FORMATS)


def to_prompts(row: Any, place: str = "", source: str = "") -> tuple[list[Any], str]:
    """(prompts of one row, format name): one, or all those of a tree. A string is a question.

    Raises `RowError`, `UnwantedRowError`.
    """
    if isinstance(row, str):
        row = {"question": row}
    found = find_format(row, PROMPT_FORMATS)
    made = found.convert(row, place=place)
    return made if isinstance(made, list) else [made], found.name
