"""Statistics of interleaved rounds and the comparison of losses and tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LOSS_RTOL = {"f32": 1e-4, "bf16": 2e-2}  # how far first losses may lie apart


class DifferentWorkError(Exception):
    """Two contenders do not compute the same thing, so their speeds must not be compared."""


@dataclass(frozen=True)
class Spread:
    """A median with the extremes beside it."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum of one or more values."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """Of per-round quotients `ours[i] / peer[i]`: neighbours in time share the machine's mood."""
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"rounds do not pair: {len(ours)} and {len(peer)}")
    return spread([a / b for a, b in zip(ours, peer, strict=True)])


def gap(a: float, b: float) -> float:
    """|a - b| / |b|."""
    return abs(a - b) / abs(b)


def check_losses(first: dict[str, float], reference: str, precision: str) -> dict[str, float]:
    """Relative gaps of each contender's first loss to the reference's.

    Raises `DifferentWorkError` when one is beyond the precision's tolerance, or is not a number.
    """
    gaps = {name: gap(loss, first[reference]) for name, loss in first.items()}
    wrong = {n: g for n, g in gaps.items() if not g <= LOSS_RTOL[precision]}
    if wrong:
        text = ", ".join(f"{n} {first[n]:.6f} ({g:.1e})" for n, g in wrong.items())
        raise DifferentWorkError(
            f"first-step loss differs from {reference} {first[reference]:.6f} by more than "
            f"{LOSS_RTOL[precision]:g} in {precision}: {text}"
        )
    return gaps


def agreement(ours: Sequence[Sequence[int]], peer: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far two sets of answers agree: share of `rows` all equal, of `tokens` before a first difference."""
    if len(ours) != len(peer) or any(len(a) != len(b) for a, b in zip(ours, peer, strict=True)):
        raise DifferentWorkError("the answers differ in number or length")
    prefixes = [_common(a, b) for a, b in zip(ours, peer, strict=True)]
    total = sum(len(a) for a in ours)
    equal = sum(p == len(a) for p, a in zip(prefixes, ours, strict=True))
    return {"rows": equal / len(ours), "tokens": sum(prefixes) / total}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def best(values: dict[str, float], rivals: dict[str, str]) -> dict[str, str]:
    """For each rival, its row with the highest value: a peer is judged by its best setting."""
    names = {}
    for name, value in values.items():
        rival = rivals.get(name, "")
        if rival and (rival not in names or value > values[names[rival]]):
            names[rival] = name
    return names
