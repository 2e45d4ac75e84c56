"""One kind of row made of another: pairs, labels and imitation out of scored answers, labels out of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from jaxalign.data.preferences import (
    BinaryRecord,
    GroupRecord,
    PreferenceRecord,
    ScoredRecord,
    Turns,
    binary_record,
    pair_record,
)
from jaxalign.data.records import RowError, SFTRecord, chat_record, completion_record
from jaxalign.errors import UserError, nearest

Places = Iterator[tuple[int, int]]  # (better, worse) in a list that is sorted best first
Policy = Callable[[Sequence[float], np.random.Generator], Places]


def _strict(choose: Policy) -> Policy:
    """The policy without its ties."""
    return lambda scores, rng: ((i, j) for i, j in choose(scores, rng) if scores[i] > scores[j])


def _all_pairs(scores: Sequence[float], rng: np.random.Generator) -> Places:
    return ((i, j) for i in range(len(scores)) for j in range(i + 1, len(scores)))


def _adjacent(scores: Sequence[float], rng: np.random.Generator) -> Places:
    return ((i, i + 1) for i in range(len(scores) - 1))


def _best_vs_worst(scores: Sequence[float], rng: np.random.Generator) -> Places:
    return iter([(0, len(scores) - 1)])


def _best_vs_rest(scores: Sequence[float], rng: np.random.Generator) -> Places:
    """The best answer against every other one, the worst first (Curry-DPO, arXiv:2403.07230)."""
    return ((0, i) for i in range(len(scores) - 1, 0, -1))


def _best_vs_random_lower(scores: Sequence[float], rng: np.random.Generator) -> Places:
    """Zephyr's rule without its ties (arXiv:2310.16944)."""
    lower = [i for i, score in enumerate(scores) if score < scores[0]]
    return iter([(0, lower[int(rng.integers(len(lower)))])] if lower else [])


def _best_vs_random_other(scores: Sequence[float], rng: np.random.Generator) -> Places:
    """Zephyr's rule as released: the other answer may be just as good."""
    return iter([(0, 1 + int(rng.integers(len(scores) - 1)))])


POLICIES: dict[str, Policy] = {
    "all_pairs": _strict(_all_pairs),
    "adjacent": _strict(_adjacent),
    "best_vs_worst": _strict(_best_vs_worst),
    "best_vs_rest": _strict(_best_vs_rest),
    "best_vs_random_lower": _best_vs_random_lower,
    "best_vs_random_other": _best_vs_random_other,
}


def check_policy(policy: str) -> None:
    """Raise `UserError` for an unknown one."""
    if policy not in POLICIES:
        known = ", ".join(POLICIES)
        raise UserError(f"unknown pairs {policy!r}{nearest(policy, POLICIES)}", remedy=f"known: {known}")


def scored_to_pairs(
    record: ScoredRecord, policy: str = "all_pairs", *, seed: int = 0, best: int | None = None
) -> list[PreferenceRecord | RowError]:
    """Pairs of the answers that have a score, or of the `best` so many of them; the margin is the score gap.

    Ties make no pair (but in `best_vs_random_other`); for two equal answers the fault stands in the list.
    Random choices are a function of seed and record id. Raises `RowError` for fewer than two scores.
    """
    ranked = record.ranked[:best]
    if len(ranked) < 2:
        raise RowError("fewer than two answers with a score")
    rng = np.random.default_rng([seed % 2**64, *record.id.encode()])
    out: list[PreferenceRecord | RowError] = []
    for better, worse in POLICIES[policy]([score for score, _ in ranked], rng):
        (high, i), (low, j) = ranked[better], ranked[worse]
        answers = record.completions[i], record.completions[j]
        try:
            pair = pair_record(
                record.prompt, *answers, margin=high - low, **_inherited(record, method=policy)
            )
        except RowError as reason:
            out.append(reason)
        else:
            out.append(replace(pair, id=f"{record.id}:{i}>{j}"))
    return out


def scored_to_binary(record: ScoredRecord, threshold: float) -> list[BinaryRecord]:
    """Every answer that has a score; those of at least `threshold` are wanted."""
    out = []
    for score, i in sorted(record.ranked, key=lambda item: item[1]):
        row = binary_record(
            record.prompt,
            record.completions[i],
            score >= threshold,
            **_inherited(record, method="threshold"),
        )
        out.append(replace(row, id=f"{record.id}:{i}"))
    return out


def pair_to_binary(record: PreferenceRecord) -> list[BinaryRecord]:
    """The chosen answer as wanted, the rejected one as unwanted."""
    out = []
    for answer, label, name in ((record.chosen, True, "chosen"), (record.rejected, False, "rejected")):
        row = binary_record(record.prompt, answer, label, **_inherited(record, method="pair"))
        out.append(replace(row, id=f"{record.id}:{name}"))
    return out


def best_to_sft(record: GroupRecord) -> SFTRecord:
    """The first answer, the best of a list or the chosen one of a pair, as a row to imitate.

    Raises `RowError` where none has a score.
    """
    if not record.answers:
        raise RowError("no answer with a score")
    prompt, best = record.prompt, record.answers[0]
    fields = _inherited(record, method="best")
    fields.pop("family")
    if isinstance(prompt, str) and isinstance(best, str):
        made = completion_record(prompt, best, **fields)
    else:
        turns = (*cast(Turns, prompt), *cast(Turns, best))  # both are of one form
        made = chat_record(turns, prompt_turns=len(prompt), **fields)
    return replace(made, id=record.id)


def _inherited(record: GroupRecord, **fields: str) -> dict[str, Any]:
    """The fields that a record made of this one takes over; its own id stays with the parent."""
    meta = {key: value for key, value in record.meta.items() if key != "id"}
    return {
        "parent": record.id,
        "source": record.source,
        "place": record.place,
        "family": record.family,
        "meta": meta,
    } | fields
