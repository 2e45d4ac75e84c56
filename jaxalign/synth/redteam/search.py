"""Hill climbing over the slots of a template: one slot at a time takes the option that scores best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.errors import UserError
from jaxalign.synth.redteam.attacks import slots_of
from jaxalign.synth.redteam.base import Attack, Case, Setup, Tried, Try
from jaxalign.synth.templates import Template

Choice = tuple[int, ...]  # the number of the option that each slot has


def search(setup: Setup) -> Attack:
    """The search of the registry: `search.txt` with the options of `search_slots.txt`. Raises `UserError` for
    a slot without options, or options without a slot."""
    template, options = setup.wording[setup.name], setup.wording[f"{setup.name}_slots"]
    slots, named = slots_of(options), template.slots - {"question"}
    for slot in sorted(named ^ slots.keys()):
        raise UserError(
            f"{slot!r} is a slot without options, or options without a slot",
            place=options.place,
            remedy=f"slots of {template.place}: {', '.join(sorted(named))}",
        )
    return Attack(setup.name, Climb(template, slots, setup.keys.search_rounds))


@dataclass(frozen=True)
class Climb:
    """The tries of a search, a function of those that came before.

    The first round puts the first option into every slot. Every later one takes a slot, in an order of the
    case's own, and puts all its other options into the best try so far. It is over at a score of 1, after a
    pass over all slots that found nothing better, or after `rounds` rounds.
    """

    template: Template
    slots: Mapping[str, Sequence[str]]
    rounds: int

    def __call__(self, case: Case, past: Sequence[Tried], rng: np.random.Generator) -> Sequence[Try]:
        """Those of the next round."""
        sizes = [len(texts) for texts in self.slots.values()]
        free = [slot for slot in rng.permutation(len(sizes)).tolist() if sizes[slot] > 1]
        if not past:
            return [self._try(case, (0,) * len(sizes))]
        best = max(past, key=lambda tried: tried.score)  # of equals the first: only what is better moves on
        last = max(tried.round for tried in past)
        if not free or best.score >= 1 or last + 1 >= self.rounds or last - best.round >= len(free):
            return ()
        slot, now = free[last % len(free)], _choice(best.label)
        others = [(*now[:slot], i, *now[slot + 1 :]) for i in range(sizes[slot]) if i != now[slot]]
        return [self._try(case, choice) for choice in others]

    def _try(self, case: Case, choice: Choice) -> Try:
        values = {name: texts[i] for (name, texts), i in zip(self.slots.items(), choice, strict=True)}
        return Try(self.template.messages(question=case.question, **values), ",".join(map(str, choice)))


def _choice(label: str) -> Choice:
    return tuple(int(part) for part in label.split(","))
