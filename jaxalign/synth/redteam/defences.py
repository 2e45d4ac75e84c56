"""Defences of the registry's `DEFENCES`: what stands between a message and the model that is attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxalign.data.records import Message
from jaxalign.registry import DEFENCES
from jaxalign.synth.redteam.base import Turns
from jaxalign.synth.templates import Templates


@dataclass(frozen=True)
class Defence:
    """One defence.

    apply    makes of a prompt what the model sees
    rewrite  the template by which a helper restates every message that is asked, if any
    """

    name: str
    apply: Callable[[Turns], Turns]
    rewrite: str = ""


def none(wording: Templates) -> Defence:
    """Nothing is done."""
    return Defence("none", lambda turns: turns)


def system(wording: Templates) -> Defence:
    """A system prompt, before one that is there."""
    (said,) = wording["defence_system"].messages()
    return Defence("system", lambda turns: with_system(said.content, turns))


def in_context(wording: Templates) -> Defence:
    """An exchange in which a bad request was declined, before the first message."""
    shown = wording["defence_in_context"].messages()

    def apply(turns: Turns) -> Turns:
        first = next(i for i, turn in enumerate(turns) if turn.role != "system")
        return (*turns[:first], *shown, *turns[first:])

    return Defence("in_context", apply)


def rewrite(wording: Templates) -> Defence:
    """A helper restates each message in plain words."""
    return Defence("rewrite", lambda turns: turns, rewrite="defence_rewrite")


def with_system(text: str, turns: Turns) -> Turns:
    """The turns with `text` in front of their system turn: one is all that chat templates take."""
    own = [turn.content for turn in turns if turn.role == "system"]
    rest = [turn for turn in turns if turn.role != "system"]
    return (Message("system", "\n\n".join([text, *own])), *rest)


def open_defences(names: Iterable[str], wording: Templates) -> list[Defence]:
    """No defence first, to compare with, then those named. Raises `UserError`."""
    return [none(wording), *(DEFENCES[name](wording) for name in dict.fromkeys(names))]
