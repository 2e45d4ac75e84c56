"""Limits of runs that sample: what they look at, and what they say."""

from __future__ import annotations

import pytest

from jaxalign.errors import UserError
from jaxalign.rl.limits import CHECKS, LimitsConfig, check_limits
from jaxalign.rl.settings import OnlineConfig

LENGTH = "completions/mean_length"
FIRST = {
    "objective/kl": 0.0,
    "objective/token_entropy": 2.0,
    "completions/clipped_ratio": 0.1,
    LENGTH: 20.0,
}


@pytest.mark.parametrize(
    ("keys", "within", "beyond", "said"),
    [
        ({"kl": 5}, {"objective/kl": 5.0}, {"objective/kl": 5.01}, "5.01 nats from the reference"),
        ({"entropy": 0.5}, {"objective/token_entropy": 0.5}, {"objective/token_entropy": 0.49}, "0.490 nats"),
        (
            {"cut_off": 0.5},
            {"completions/clipped_ratio": 0.5},
            {"completions/clipped_ratio": 0.6},
            "60% of the answers",
        ),
        ({"drift": 2}, {"completions/mean_length": 39.0}, {"completions/mean_length": 41.0}, "41.0 tokens"),
        (
            {"drift": 2},
            {"completions/mean_length": 10.0},
            {"completions/mean_length": 9.0},
            "20.0 at the start",
        ),
    ],
)
def test_a_limit_says_what_is_beyond_it_and_what_helps(keys, within, beyond, said):
    limits = LimitsConfig(**keys)
    assert limits.any
    assert limits.passed(FIRST, {**FIRST, **within}) is None
    found = limits.passed(FIRST, {**FIRST, **beyond})
    assert said in found
    (name,) = keys
    assert f"limits.{name}={keys[name]:g}" in found


def test_without_limits_nothing_is_looked_at():
    assert not LimitsConfig().any
    assert LimitsConfig().passed({}, {}) is None
    assert set(CHECKS) == set(LimitsConfig.model_fields)


def test_a_kl_that_nothing_measures_is_refused():
    for keys, place in (({"limits": {"kl": 3}}, "limits.kl"), ({"kl_target": 3}, "kl_target")):
        with pytest.raises(UserError, match=place):
            check_limits(OnlineConfig(**keys), frozenset())
        check_limits(OnlineConfig(**keys), frozenset({"ref"}))
