"""The best of N answers: its expected reward, without bias, and how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def sizes(n: int) -> list[int]:
    """1, 2, 4, ... up to `n`, and `n` itself."""
    return [*(1 << k for k in range((n - 1).bit_length())), n]


def expected_best(rewards: Sequence[float] | np.ndarray, size: int) -> float:
    """The expected largest of `size` rewards drawn without replacement from `rewards` [m].

    With r_1 <= ... <= r_m it is sum_i r_i C(i-1, N-1) / C(m, N): the mean of the maximum over all subsets of
    N, and so without bias for the best of N new answers (arXiv:2112.09332). Raises `ValueError`
    unless 1 <= size <= m.
    """
    count = len(rewards)
    if not 1 <= size <= count:
        raise ValueError(f"the best of {size} cannot be told from {count} answers")
    return float(np.dot(np.sort(np.asarray(rewards, np.float64)), _weights(count, size)))


@lru_cache
def _weights(count: int, size: int) -> tuple[float, ...]:
    """C(i-1, size-1) / C(count, size), i = 1 to count: of whole numbers, however large."""
    every = math.comb(count, size)
    return tuple(math.comb(i, size - 1) / every for i in range(count))


def best_of_kl(size: int) -> float:
    """KL divergence of the best of `size` answers from the policy that gives them, log N - (N-1)/N nats.

    That is the curve of arXiv:2210.10760. It is an upper bound (arXiv:2401.01879), which is near
    where every answer is unlikely and no two rewards are equal: where many are, the truth is far below it.
    """
    return math.log(size) - (size - 1) / size
