"""Deterministic checkers: a text in, a verdict and the broken rules out. No model, no randomness.

`check_card` reads the quickstart's answering style, the *checkable answer*: an answer, the reason for it
and a way for the reader to check it, one plain sentence each.

    Answer: Ice is less dense than liquid water, so it floats.
    Because: Freezing locks water molecules into an open pattern that takes up more room.
    Check: Mark the water level in a plastic cup, freeze it, and compare.

It reads form. Whether an answer is true is another matter: `names_fact` looks for one key fact, and only in
the first sentence, for a word that comes up later says little about the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

LABELS = ("Answer", "Because", "Check")
WORD_LIMITS = {"Answer": (3, 18), "Because": (4, 22), "Check": (4, 18)}
SHARED_WORDS_LIMIT = 0.6  # of the shorter line's words
_ACTIONS = """
    add ask bake bite blow boil breathe bring call change clap close compare connect cook copy count cover
    cut dig dip divide draw drop examine feel fill find fold freeze go hang heat hold keep leave lift light
    line listen look make mark measure mix move multiply note observe open pack paint photograph place plant
    play point pour press print pull push put read record remove repeat replace roll rub run say see set
    shake shine sing smell soak spin split spread squeeze stand step stir stretch subtract swallow swap switch
    tap taste tear test throw tie tilt time toss touch trace translate try turn type use visit walk wash watch
    wear weigh write zoom"""
ACTIONS = frozenset(_ACTIONS.split())

RULES: dict[str, str] = {
    "three_lines": "exactly three lines, with nothing before, between or after them",
    "labels": "the lines begin with `Answer: `, `Because: ` and `Check: `, in this order",
    "one_sentence": "each line is one sentence: a capital or a digit first, a single full stop last",
    "word_limits": "3 to 18 words in the answer, 4 to 22 in the reason, 4 to 18 in the check",
    "action": "the check begins with something to do, such as Look, Count, Compare, Measure",
    "plain_text": "no markdown, no list marks, no links",
    "no_repetition": "no two lines share more than six tenths of their words",
}

# A full stop, question mark or exclamation mark that is followed by a space, a capital or another mark.
# "3.5", "example.org" and "0.15" hold none; "e.g. this" does, and the style has no abbreviations.
_INNER_END = re.compile(r"[.!?…][\"'”’)]?(?=\s|[.!?…]|[A-Z])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
_MARKDOWN = re.compile(r"[*_`#|<>~\[\]{}\\]|https?:|^\s*(?:[-+•]|\d+[.)])\s")
_WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")


class Verdict(NamedTuple):
    """`passed` is True when `failed` is empty; `failed` holds names out of `RULES`, in its order."""

    passed: bool
    failed: list[str]


def check_card(text: str) -> Verdict:
    """Whether `text` is a checkable answer, and the rules it breaks.

    White space around the text and at line ends does not count. When the shape (`three_lines`, `labels`)
    is broken, the rules that read single lines are not applied: there are no lines to read.
    """
    lines = [line.rstrip() for line in text.strip().replace("\r\n", "\n").split("\n")]
    shape = [name for name, broken in _SHAPE.items() if broken(lines)]
    if shape:
        return Verdict(False, shape)
    parts = {label: line[len(label) + 2 :] for label, line in zip(LABELS, lines, strict=True)}
    failed = [name for name, broken in _CONTENT.items() if broken(parts)]
    return Verdict(not failed, failed)


def brief_cards(completions: Sequence[str], **_: object) -> list[float]:
    """Rewards of answers: one that keeps the style beats one that does not, and among both fewer words win.
    2 for a kept style, less a fiftieth for every word."""
    return [2.0 * check_card(text).passed - len(words(text)) / 50 for text in completions]


def names_fact(text: str, expected: Iterable[str]) -> bool:
    """Whether a regular expression of `expected` matches at a word's start in the first sentence.

    The first sentence ends at a full stop, question or exclamation mark before white space, or with its line.
    """
    sentence = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    return any(re.search(rf"\b(?:{pattern})", sentence, re.IGNORECASE) for pattern in expected)


def words(text: str) -> list[str]:
    """The words of `text` in lower case; numbers, hyphenated and shortened words count as one."""
    return _WORD.findall(text.lower())


def _wrong_labels(lines: list[str]) -> bool:
    named = [re.match(r"([A-Z][a-z]+): \S", line) for line in lines if line]
    return tuple(match.group(1) if match else "" for match in named) != LABELS


def _not_one_sentence(parts: dict[str, str]) -> bool:
    return any(
        not re.fullmatch(r"[\"“'‘]?[A-Z0-9].*[^\s.!?…]\.", part) or _INNER_END.search(part[:-1])
        for part in parts.values()
    )


def _out_of_limits(parts: dict[str, str]) -> bool:
    return any(not low <= len(words(parts[label])) <= high for label, (low, high) in WORD_LIMITS.items())


def _no_action(parts: dict[str, str]) -> bool:
    return words(parts["Check"])[:1] == [] or words(parts["Check"])[0] not in ACTIONS


def _has_markdown(parts: dict[str, str]) -> bool:
    return any(_MARKDOWN.search(part) for part in parts.values())


def _repeats(parts: dict[str, str]) -> bool:
    return any(shared_words(one, two) > SHARED_WORDS_LIMIT for one, two in combinations(parts.values(), 2))


def shared_words(one: str, two: str) -> float:
    """The share of the shorter text's distinct words that the other text has too, 0 to 1."""
    first, second = set(words(one)), set(words(two))
    return len(first & second) / max(1, min(len(first), len(second)))


_SHAPE: dict[str, Callable[[list[str]], bool]] = {
    "three_lines": lambda lines: len(lines) != len(LABELS) or not all(lines),
    "labels": _wrong_labels,
}
_CONTENT: dict[str, Callable[[dict[str, str]], bool]] = {
    "one_sentence": _not_one_sentence,
    "word_limits": _out_of_limits,
    "action": _no_action,
    "plain_text": _has_markdown,
    "no_repetition": _repeats,
}
