"""Conversations as builders write them into prompts and rows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.records import Message, Prompt

CUES = {"system": "", "user": "\n\nHuman: ", "tool": "\n\nTool: "}


def turns_of(prompt: Prompt) -> tuple[Message, ...]:
    """The prompt as turns; a text is what the user says."""
    return (Message("user", prompt.text or ""),) if prompt.messages is None else prompt.messages


def spelled(turns: Sequence[Message]) -> list[dict[str, str]]:
    """Turns as they stand in a row."""
    return [{"role": m.role, "content": m.content} for m in turns]


def transcript(turns: Sequence[Message], last: str = "", earlier: str = "") -> str:
    """`\\n\\nHuman: ...\\n\\nAssistant:`, which a base model continues. `last` stands in the final cue, and
    `earlier` in those of the assistant's turns before."""
    cue = lambda note: f"\n\nAssistant{note and f' ({note})'}:"  # noqa: E731
    parts = [
        f"{cue(earlier)} {m.content}" if m.role == "assistant" else CUES[m.role] + m.content for m in turns
    ]
    return "".join(parts) + cue(last)


def draws(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one item alone."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def pair_row(name: str, prompt: Sequence[Message], chosen: str, rejected: str, **meta: Any) -> dict[str, Any]:
    """A PREF row."""
    turns = {"prompt": spelled(prompt), "chosen": chosen, "rejected": rejected}
    return {"id": name, **turns, "meta": meta}


def sft_row(name: str, prompt: Sequence[Message], answer: str, **meta: Any) -> dict[str, Any]:
    """An SFT row."""
    return {"id": name, "messages": spelled([*prompt, Message("assistant", answer)]), "meta": meta}
