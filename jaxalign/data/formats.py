"""Row recognisers: which published row format a JSON object is, and the record it becomes.

`FORMATS` is tried from the top; the first whose `matches` accepts the row's keys converts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxalign.data.preferences import check_answers
from jaxalign.data.records import (
    Message,
    RowError,
    SFTRecord,
    UnwantedRowError,
    as_messages,
    as_text,
    chat_record,
    completion_record,
    is_turns,
    structured,
    text_record,
)
from jaxalign.data.sources import beavertails, harmfulqa, hh, oasst
from jaxalign.data.sources.hh import transcript_turns

Row = dict[str, Any]

LABELS = ("label", "kto_tag", "is_safe")  # what published rows call a label, true where the answer is wanted


@dataclass(frozen=True)
class Format:
    """One row format: its name, its keys in words, a test on the row, and the conversion.

    mixed  its rows hold records of several kinds; those that do not make what is asked for are left out
    """

    name: str
    keys: str
    matches: Callable[[Row], bool]
    convert: Callable[..., Any]  # (row, **fields) -> record, or a list; raises RowError, UnwantedRowError
    mixed: bool = False


def with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, led by the row's `system` text if it has one and they do not."""
    system = as_text(row.get("system"), "system")
    if not system.strip() or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def check_wanted(row: Row) -> None:
    """Raise `UnwantedRowError` for an answer that its label calls unwanted."""
    for key in LABELS:
        if row.get(key) is False or str(row.get(key)).strip().lower() == "false":
            raise UnwantedRowError(f"{key} is false: an unwanted answer is not learned")


def from_messages(row: Row, **fields: Any) -> SFTRecord:
    """OpenAI: `messages: [{role, content}]`. With a boolean `label`, only wanted answers are learned."""
    check_wanted(row)
    return chat_record(with_system(row, as_messages(structured(row["messages"]))), **fields)


def from_sharegpt(row: Row, **fields: Any) -> SFTRecord:
    """ShareGPT: `conversations: [{from, value}]`, also with role and content."""
    check_wanted(row)
    return chat_record(with_system(row, as_messages(structured(row["conversations"]))), **fields)


def from_completion(row: Row, **fields: Any) -> SFTRecord:
    """`prompt` and `completion` (or `response`): two strings, or two lists of messages."""
    check_wanted(row)
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
    prompt, (answer,) = split_answers(row, {"chosen": row["chosen"]})
    if isinstance(prompt, str):
        return completion_record(prompt, str(answer), **fields)
    return chat_record(prompt + answer, prompt_turns=len(prompt), **fields)


def context_of(row: Row) -> tuple[Message, ...] | str | None:
    """What stands before the answers: the turns of `conversations`, `messages` or `prompt`, an `instruction`
    as one user turn, a `prompt` string as it is, or None for a row that has the prompt in every answer."""
    found = next((row[key] for key in ("conversations", "messages", "prompt") if row.get(key)), None)
    if found is not None and is_turns(found):
        return with_system(row, as_messages(structured(found)))
    if found is None and row.get("instruction"):
        question, context = as_text(row["instruction"], "instruction"), as_text(row.get("input"), "input")
        text = f"{question}\n{context}" if context.strip() else question
        return with_system(row, (Message("user", text),))
    return None if found is None else as_text(found, "prompt")


def split_answers(row: Row, values: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """(prompt, answers) of the answers `{name: raw}` of a row: all of them strings, or all of them turns.

    An answer may repeat the prompt, as turns or as a Human/Assistant transcript. Raises `RowError` where the
    prompts differ.
    """
    context, raw = context_of(row), [structured(value) for value in values.values()]
    if isinstance(context, str):
        if row.get("instruction") is None and all(isinstance(value, str) for value in raw):
            return context, tuple(raw)
        context = with_system(row, (Message("user", context),))
    parts = [_split(context, value, name) for name, value in zip(values, raw, strict=True)]
    prompts = [_without_blank(prompt) for prompt, _ in parts]
    if any(prompt != prompts[0] for prompt in prompts):
        for name, (prompt, answer) in zip(values, parts, strict=True):
            check_answers(prompt, {name: answer})  # a fault of one answer says more than that they differ
        raise RowError(f"{' and '.join(values)} have different prompts")
    return parts[0][0], tuple(answer for _, answer in parts)


def _split(
    context: tuple[Message, ...] | None, value: Any, name: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, answer) of one answer, which may repeat the prompt, as UltraFeedback's do."""
    transcript = context is None and isinstance(value, str)
    turns = transcript_turns(value, name) if transcript else answer_turns(value)
    if context is None or (len(turns) > 1 and turns[0].role in ("system", "user")):
        return turns[:-1], turns[-1:]
    return context, turns


def _without_blank(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(m for m in turns if m.role != "system" or m.content.strip())


def answer_turns(value: Any) -> tuple[Message, ...]:
    """An answer as turns: a string is one assistant turn, else a message or a list of them."""
    value = structured(value)
    return (Message("assistant", value),) if isinstance(value, str) else as_messages(value)


FORMATS: tuple[Format, ...] = (
    Format("tree", "message_tree_id + prompt with replies", oasst.is_tree, oasst.sft_from_tree),
    Format("pku", beavertails.PAIR_KEYS, beavertails.is_pair, beavertails.sft_from_pair),
    Format("harmfulqa", harmfulqa.KEYS, harmfulqa.is_conversations, harmfulqa.sft_from_conversations),
    Format("red team", hh.ATTACK_KEYS, hh.is_attack, hh.sft_from_attack),
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


def find_format(row: Any, formats: tuple[Format, ...] = FORMATS) -> Format:
    """The first of `formats` that accepts the row. Raises `RowError` naming its columns."""
    if not isinstance(row, dict):
        raise RowError("the row is not an object")
    for candidate in formats:
        if candidate.matches(row):
            return candidate
    raise RowError(f"unknown columns ({', '.join(map(str, list(row)[:6]))})")


def to_records(row: Any, *, source: str = "", place: str = "") -> tuple[list[Any], str]:
    """(records with the faults among them, format name) of one row: one record, but many of a tree.

    Raises `RowError` or `UnwantedRowError`.
    """
    found = find_format(row)
    meta = {key: row[key] for key in ("id", "meta", "margin", "score") if row.get(key) is not None}
    made = found.convert(row, source=source, place=place, meta=meta)
    return made if isinstance(made, list) else [made], found.name
