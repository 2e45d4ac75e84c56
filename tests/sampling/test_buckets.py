"""Shapes of prefills: few, and no larger than they must be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from jaxalign.sampling.buckets import CALL, bucket, groups, width


def test_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert bucket(3, 8) == 8


def test_four_widths_to_a_power_of_two() -> None:
    widths = sorted({width(n) for n in range(1025)})
    assert widths[:8] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert [w for w in widths if 256 <= w <= 512] == [256, 320, 384, 448, 512]
    assert all(width(n) >= n for n in range(1025))
    assert all(b <= 1.25 * a for a, b in pairwise(w for w in widths if w >= 64))


def cost(rows: int, columns: int) -> int:
    return rows * columns + CALL


@pytest.mark.parametrize("count", [1, 7, 16, 64])
def test_every_prompt_is_in_one_group_that_holds_it(count: int) -> None:
    lengths = np.random.default_rng(count).integers(0, 300, count).tolist()
    found = list(groups(lengths, 8))
    assert sorted(i for members, _, _ in found for i in members) == list(range(count))
    for members, rows, columns in found:
        assert len(members) <= rows == bucket(rows, 8)
        assert max(lengths[i] for i in members) <= columns
    assert sum(cost(r, c) for _, r, c in found) <= cost(bucket(count, 8), width(max(lengths)))


def test_long_prompts_do_not_stretch_short_ones() -> None:
    lengths = [30] * 32 + [500] * 8
    assert sorted((rows, columns) for _, rows, columns in groups(lengths)) == [(8, 512), (32, 32)]


def test_no_cut_in_two_is_better() -> None:
    lengths = np.random.default_rng(1).integers(40, 90, 64).tolist()
    total = sum(cost(r, c) for _, r, c in groups(lengths, 8))
    ordered = sorted(lengths)
    for n in (8, 16, 32, 48, 56):
        low, high = ordered[:n], ordered[n:]
        two = [cost(bucket(len(part), 8), width(part[-1])) for part in (low, high)]
        assert total <= sum(two)
    assert total < 0.7 * (cost(64, 64) + cost(32, 128))  # what grouping by powers of two would take


def test_nothing_to_share_out() -> None:
    assert list(groups([])) == []
