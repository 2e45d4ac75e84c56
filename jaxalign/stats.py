"""Statistics of pass rates and means: Wilson and bootstrap intervals, two runs compared item by item.

Every number carries its n and its interval. They are plain Python floats, rates and p-values in [0, 1], so
that a result can be written as JSON as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Rate:
    """`passed` of `n` items, the share `rate` and its interval `low` to `high`; null when n is 0."""

    passed: int
    n: int
    rate: float | None
    low: float | None
    high: float | None

    def to_json(self) -> dict:
        """The fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """The mean over `n` items and its interval `low` to `high`; null without items, the interval also where
    one item alone says nothing of the spread."""

    mean: float | None
    n: int
    low: float | None
    high: float | None

    def to_json(self) -> dict:
        """The fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """The same n items before and after.

    fixed, broke      items that pass only after, only before
    difference        rate after minus rate before, with the bootstrap interval `low` to `high`
    p                 two-sided exact McNemar p-value
    seed, resamples   of the bootstrap
    """

    n: int
    fixed: int
    broke: int
    both: int
    neither: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    seed: int
    resamples: int

    def to_json(self) -> dict:
        """The fields as a dictionary."""
        return asdict(self)


def rate_interval(passed: int, n: int) -> Rate:
    """The share `passed`/`n` with its Wilson score interval at 95 % (Wilson 1927).

    Raises `ValueError` unless 0 <= passed <= n. With n = 0 there is no rate: the fields are None.
    """
    if not 0 <= passed <= n:
        raise ValueError(f"passed must lie between 0 and n, got {passed} of {n}")
    if n == 0:
        return Rate(0, 0, None, None, None)
    from scipy.stats import binomtest

    interval = binomtest(passed, n).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Rate(passed, n, passed / n, float(interval.low), float(interval.high))


def mean_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Mean:
    """The mean of `values` [n] with its percentile bootstrap interval at 95 %, which resamples the items."""
    found = np.asarray(values, np.float64)
    if not found.size:
        return Mean(None, 0, None, None)
    if found.size == 1:
        return Mean(float(found[0]), 1, None, None)
    return Mean(float(found.mean()), found.size, *_bootstrap_mean(found, seed, resamples))


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], *, seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """Compare two runs item by item; `before[i]` and `after[i]` are the verdicts on item i.

    p is McNemar's exact test: a two-sided binomial test on the items whose verdict changed, 1 when none
    did. The interval of the difference resamples items, both verdicts of an item together (percentile
    bootstrap, 95 %). When every item changed alike the bootstrap has no spread and both ends equal the
    difference: read the Wilson intervals then. Raises `ValueError` when the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} verdicts before and {len(after)} after: they must be pairs")
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    fixed, broke = int((~first & second).sum()), int((first & ~second).sum())
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    if first.size == 0:
        return Paired(0, 0, 0, 0, 0, None, None, None, None, seed, resamples)
    changes = second.astype(np.float64) - first.astype(np.float64)
    low, high = _bootstrap_mean(changes, seed, resamples)
    difference = float(changes.mean())
    p = _mcnemar(fixed, broke)
    return Paired(first.size, fixed, broke, both, neither, difference, low, high, p, seed, resamples)


def _mcnemar(fixed: int, broke: int) -> float:
    if fixed + broke == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broke).pvalue)


def _bootstrap_mean(values: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """The percentile interval of the mean of `values` [n]."""
    if values.size == 1 or np.ptp(values) == 0.0:  # nothing to resample
        return float(values.mean()), float(values.mean())
    from scipy.stats import bootstrap

    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
