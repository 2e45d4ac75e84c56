"""What of a reply is kept when a model aligns itself (Sun et al. 2023, arXiv:2305.03047, and its code).

A filter takes a draft and gives back a draft or the reason why it is left out; they are applied in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

SHORTEST_CUT = 160  # characters that must be left where the reply went on to play the user
SHORTEST_OPEN = 128  # characters of an answer that does not end well
PRINCIPLES = 16
_SEGMENT = re.compile(r"(?<=[\n.?!;:,])")
_NUMBER = re.compile(r"\b\d+\b")
_ENDED = re.compile(r"[.!?\"'”’)\]`:;|*]$")


@dataclass(frozen=True)
class Draft:
    """A reply on its way to an answer.

    question    what was asked
    text        the reply, then what is left of it
    ended       whether the model ended it, and not its longest length
    principles  numbers of the principles that its thought names
    """

    question: str
    text: str
    ended: bool = True
    principles: tuple[int, ...] = ()


Filter = Callable[[Draft], Draft | str]


def refine(draft: Draft, filters: Sequence[Filter]) -> Draft | str:
    """The draft after all filters, or the first reason why it is left out."""
    for step in filters:
        found = step(draft)
        if isinstance(found, str):
            return found
        draft = found
    return draft


def thought(identity: str, cue: str) -> Filter:
    """Takes off the thought, which begins with `identity` and ends at the `cue`, and notes its principles. A
    chat model may repeat the heading of the thought, with which its prompt ended."""

    def taken(draft: Draft) -> Draft | str:
        text = draft.text.strip().removeprefix(f"{cue} (note)").strip()
        if not text.startswith(identity):
            return "no self-identification"
        note, found, answer = text.partition(f"\n{cue}\n")
        if not found:
            return "no answer after the thought"
        return replace(draft, text=answer.strip(), principles=principles_of(note))

    return taken


def principles_of(note: str) -> tuple[int, ...]:
    """The numbers from 1 to 16 in a thought, each once, in rising order."""
    return tuple(sorted({int(n) for n in _NUMBER.findall(note) if 1 <= int(n) <= PRINCIPLES}))


def cut(cue: str) -> Filter:
    """Ends the answer where the next user's turn begins. What is then short is left out; of an answer that
    only its longest length ended, the last word, of which a part may be missing, is taken off."""

    def ended(draft: Draft) -> Draft | str:
        text, found, _ = draft.text.partition(cue)
        text = text.strip()
        if found:
            return (
                replace(draft, text=text, ended=True) if len(text) >= SHORTEST_CUT else "short after the cut"
            )
        if draft.ended:
            return replace(draft, text=text)
        return replace(draft, text=text.rpartition(" ")[0].rstrip())

    return ended


def unrepeated(draft: Draft) -> Draft:
    """Ends the answer before the first phrase that it says a second time."""
    return replace(draft, text=cut_repetition(draft.text))


def cut_repetition(text: str) -> str:
    """The text up to the first repeated segment; segments end in a line break or one of .?!;:, and those
    without a letter or digit do not count."""
    seen: set[str] = set()
    kept = []
    for segment in _SEGMENT.split(text):
        said = segment.strip()
        if any(c.isalnum() for c in said):
            if said in seen:
                break
            seen.add(said)
        kept.append(segment)
    return "".join(kept).rstrip()


def without(reason: str, words: re.Pattern[str]) -> Filter:
    """Leaves out answers with a word or phrase that the question does not have."""

    def checked(draft: Draft) -> Draft | str:
        asked = {found.lower() for found in words.findall(draft.question)}
        said = {found.lower() for found in words.findall(draft.text)}
        return reason if said - asked else draft

    return checked


def not_at_start(reason: str, words: re.Pattern[str]) -> Filter:
    """Leaves out answers that begin with a word or phrase."""
    return lambda draft: reason if words.match(draft.text) else draft


def without_line(reason: str, words: re.Pattern[str]) -> Filter:
    """Leaves out answers in which a line holds nothing else, marks around it apart."""
    return lambda draft: (
        reason if any(words.fullmatch(line.strip(" #=*:_")) for line in draft.text.splitlines()) else draft
    )


def long_or_ended(draft: Draft) -> Draft | str:
    """Leaves out short answers that do not end like a sentence."""
    whole = draft.ended and _ENDED.search(draft.text)
    return draft if whole or len(draft.text) >= SHORTEST_OPEN else "short and without an end"


def renamed(codename: str, name: str) -> Filter:
    """Calls the assistant by its name wherever the codename of the prompt stands."""
    pattern = re.compile(rf"\b{re.escape(codename)}\b", re.IGNORECASE)
    return lambda draft: replace(draft, text=pattern.sub(lambda _: name, draft.text))


def not_empty(draft: Draft) -> Draft | str:
    """Leaves out answers without a letter or digit."""
    return draft if any(c.isalnum() for c in draft.text) else "empty"
