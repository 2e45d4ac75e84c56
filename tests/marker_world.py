"""A world in which quality can be counted: answers hold `<ok:i>` and `<bug:j>`, and the better one has more
of the first and fewer of the second. Scripts that write, judge, criticise and mend such answers stand in for
models; what is harmful is spelled `<harm:cat>` in a question, `<comply:cat>` or `<refuse>` in an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from jaxalign.llm.base import Request
from jaxalign.llm.scripted import Script

MARKS = re.compile(r"<(ok|bug):(\d+)>")


def quality(text: str) -> int:
    """#ok - #bug of an answer."""
    return sum(1 if kind == "ok" else -1 for kind, _ in MARKS.findall(text))


def bugs(text: str) -> list[int]:
    """The numbers of its bugs, in their order."""
    return [int(number) for kind, number in MARKS.findall(text) if kind == "bug"]


def answer(ok: int = 0, bug: int = 0, words: str = "an answer") -> str:
    """An answer with so many marks."""
    return " ".join([words, *(f"<ok:{i}>" for i in range(ok)), *(f"<bug:{i}>" for i in range(bug))])


def asked(request: Request) -> str:
    """All that a request says."""
    return request.prompt if isinstance(request.prompt, str) else "\n".join(m.content for m in request.prompt)


def format_breaking(script: Script, share: float) -> Script:
    """The script, but a share of its answers cannot be parsed."""

    def broken(request: Request, number: int, rng: np.random.Generator) -> str:
        good = script(request, number, rng)
        return "..." if rng.random() < share else good

    return broken


def noisy(script: Script, share: float, spoil: Callable[[str], str]) -> Script:
    """The script, but a share of its answers is spoilt."""

    def spoilt(request: Request, number: int, rng: np.random.Generator) -> str:
        good = script(request, number, rng)
        return spoil(good) if rng.random() < share else good

    return spoilt


def refusing(request: Request, number: int, rng: np.random.Generator) -> str:
    """Answers nothing."""
    return "<refuse>"
