"""Two answers compared on one axis, helpful or harmless, by a judge that sees them in both orders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from jaxalign.llm.base import Completion, Request
from jaxalign.stats import rate_interval
from jaxalign.synth.base import Work
from jaxalign.synth.stage import Ask

AXES = ("helpful", "harmless")
_TAG = re.compile(r"\[\[\s*([012])\s*\]\]")


@dataclass(frozen=True)
class Duel:
    """Answers `i` < `j` of an item on one axis."""

    item: str
    question: str
    axis: str
    i: int
    j: int
    first: str
    second: str

    @property
    def id(self) -> str:
        """What its two requests begin with."""
        return f"{self.item}:{self.i}-{self.j}"


@dataclass(frozen=True)
class Rulings:
    """What the judge said of each duel of an axis: (in the order of the answers, turned round), 1 or 2 for
    the answer shown first or second, 0 for neither. Duels of which one order has no verdict are left out."""

    said: Mapping[str, tuple[int, int]]
    missing: int

    def winner(self, duel: Duel) -> int | None:
        """`i` or `j` where both orders agree, else None: a tie, or no verdict."""
        return {(1, 2): duel.i, (2, 1): duel.j}.get(self.said.get(duel.id, (0, 0)))

    def report(self) -> dict[str, Any]:
        """JSON: how steady the judge is. `consistent` counts duels whose verdict both orders share, also
        neither; `first_slot` is the share of verdicts for an answer that go to the one shown first."""
        both = list(self.said.values())
        steady = sum((a, b) in ((1, 2), (2, 1), (0, 0)) for a, b in both)
        named = [v for pair in both for v in pair if v]
        wins = sum((a, b) in ((1, 2), (2, 1)) for a, b in both)
        return {
            "duels": len(both) + self.missing,
            "wins": wins,
            "ties": len(both) - wins,
            "without_verdict": self.missing,
            "consistent": rate_interval(steady, len(both)).to_json(),
            "first_slot": rate_interval(named.count(1), len(named)).to_json(),
        }


def duels(item: str, question: str, axis: str, answers: Sequence[str]) -> list[Duel]:
    """All pairs of answers that differ."""
    return [
        Duel(item, question, axis, i, j, answers[i], answers[j])
        for i, j in combinations(range(len(answers)), 2)
        if answers[i].strip() != answers[j].strip()
    ]


def judged(work: Work, axis: str, found: Iterable[Duel], *, max_tokens: int, temperature: float) -> Rulings:
    """Asks the role `judge` for every duel, both ways round, in one stage."""
    template, items, names = work.templates[axis], [], []
    for duel in found:
        names.append(duel.id)
        for order, (first, second) in (
            ("a", (duel.first, duel.second)),
            ("b", (duel.second, duel.first)),
        ):
            prompt = template.messages(question=duel.question, first=first, second=second)
            request = Request(prompt, temperature=temperature, max_tokens=max_tokens)
            items.append(Ask(f"{duel.id}:{order}", request, parse_choice))
    said = work.ask(axis, items, role="judge")
    both = {n: (said[f"{n}:a"], said[f"{n}:b"]) for n in names if f"{n}:a" in said and f"{n}:b" in said}
    return Rulings(both, len(names) - len(both))


def parse_choice(completions: tuple[Completion, ...]) -> tuple[int | None, str]:
    """1, 2 or 0: exactly one tag [[1]], [[2]] or [[0]] must be there."""
    found = _TAG.findall(completions[0].text)
    if len(found) == 1:
        return int(found[0]), ""
    return None, f"{len(found)} verdicts" if found else "no verdict"
