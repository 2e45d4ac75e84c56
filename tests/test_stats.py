import json

import numpy as np
import pytest
from scipy.stats import binom

from jaxalign.stats import mean_interval, paired_difference, rate_interval

Z2 = 1.959963984540054**2


def test_wilson_interval_by_hand():
    # centre (0.8 + z²/20) / (1 + z²/10), half width z sqrt(0.8*0.2/10 + z²/400) / (1 + z²/10)
    rate = rate_interval(8, 10)
    centre, half = (0.8 + Z2 / 20) / (1 + Z2 / 10), np.sqrt(Z2 * (0.016 + Z2 / 400)) / (1 + Z2 / 10)
    assert (rate.passed, rate.n, rate.rate) == (8, 10, 0.8)
    assert (rate.low, rate.high) == pytest.approx((centre - half, centre + half))
    assert (rate.low, rate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_interval_at_the_ends():
    none, every = rate_interval(0, 60), rate_interval(60, 60)
    assert (none.low, none.high) == pytest.approx((0.0, Z2 / (60 + Z2)))
    assert (every.low, every.high) == pytest.approx((60 / (60 + Z2), 1.0))


def test_no_items_is_no_rate():
    assert rate_interval(0, 0).to_json() == {"passed": 0, "n": 0, "rate": None, "low": None, "high": None}
    assert paired_difference([], []).difference is None


@pytest.mark.parametrize(("passed", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(passed: int, n: int):
    with pytest.raises(ValueError, match="between 0 and n"):
        rate_interval(passed, n)


def pairs(fixed: int, broke: int, both: int, neither: int) -> tuple[list[bool], list[bool]]:
    table = [(False, True)] * fixed + [(True, False)] * broke
    table += [(True, True)] * both + [(False, False)] * neither
    return [a for a, _ in table], [b for _, b in table]


@pytest.mark.parametrize(
    ("fixed", "broke", "p"),
    [(0, 0, 1.0), (6, 0, 2 / 64), (0, 6, 2 / 64), (5, 1, 2 * (1 + 6) / 64), (3, 3, 1.0)],
)
def test_mcnemar_by_hand(fixed: int, broke: int, p: float):
    result = paired_difference(*pairs(fixed, broke, 4, 5))
    assert result.p == pytest.approx(p)
    assert (result.fixed, result.broke, result.both, result.neither) == (fixed, broke, 4, 5)
    assert result.difference == pytest.approx((fixed - broke) / (fixed + broke + 9))


def test_bootstrap_interval_is_that_of_the_binomial():
    # with changes of 0 and 1 only, a resampled mean is a binomial count over n
    result = paired_difference(*pairs(45, 0, 0, 15))
    low, high = binom.ppf([0.025, 0.975], 60, 0.75) / 60
    assert (result.low, result.high) == pytest.approx((low, high), abs=1 / 60)


def test_items_are_resampled_in_pairs():
    # two runs that agree on 98 of 100 items: unpaired the interval would be about 0.28 wide
    result = paired_difference(*pairs(2, 0, 50, 48))
    assert result.difference == pytest.approx(0.02)
    assert result.low is not None
    assert result.high is not None
    assert result.high - result.low < 0.07


def test_a_uniform_change_has_no_spread():
    result = paired_difference([False] * 5, [True] * 5)
    assert (result.difference, result.low, result.high) == (1.0, 1.0, 1.0)


def test_the_seed_decides():
    before, after = pairs(20, 7, 10, 13)
    first, again = paired_difference(before, after, seed=3), paired_difference(before, after, seed=3)
    assert first == again
    assert json.loads(json.dumps(first.to_json()))["seed"] == 3


def test_the_interval_of_a_mean_is_that_of_the_binomial():
    # of 0 and 1, a resampled mean is a binomial count over n
    found = mean_interval([1.0] * 45 + [0.0] * 15, seed=1)
    assert (found.mean, found.n) == (0.75, 60)
    assert (found.low, found.high) == pytest.approx(
        tuple(binom.ppf([0.025, 0.975], 60, 0.75) / 60), abs=1 / 60
    )


def test_one_item_has_no_interval_and_none_no_mean():
    assert mean_interval([2.5]).to_json() == {"mean": 2.5, "n": 1, "low": None, "high": None}
    assert mean_interval([]).to_json() == {"mean": None, "n": 0, "low": None, "high": None}


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([True], [True, False])
