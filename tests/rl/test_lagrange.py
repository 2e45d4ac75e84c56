"""Costs with a limit: the published numbers, and what follows from advantages being linear."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.rl import advantages
from jaxalign.rl.estimators import Judged, LeaveOneOut, OverGreedy, WithCritic
from jaxalign.rl.lagrange import WINDOW, CostsConfig, Lagrange, build_lagrange, mixed, with_costs
from jaxalign.rl.rewards import Rewards

VECTORS = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"


@pytest.fixture(scope="module")
def published():
    if not VECTORS.exists():
        pytest.skip("../shared/specs/loss_vectors.json is not here")
    return json.loads(VECTORS.read_text())["safe_rlhf_lagrangian"]


def moving(**keys):
    return Lagrange(Rewards({}), CostsConfig(**keys))


def test_multiplier_and_advantages_are_the_published_ones(published):
    given, how, want = published["inputs"], published["params"], published["expected"]
    lagrange = moving(cost_limit=how["threshold"], multiplier_rate=how["lambda_lr"])
    costs = [np.full((2, 3), given["episode_cost_mean"])]
    found = lagrange.log_multiplier(0, math.log(given["lambda_"]), costs)
    assert found == pytest.approx(want["log_lambda_next"])
    assert math.exp(found) == pytest.approx(want["lambda_next"])
    (advantage,) = want["combined_adv"]
    assert mixed(given["reward_adv"], given["cost_adv"], given["lambda_"]) == pytest.approx(advantage)
    mask, ratio = np.array([True, True]), np.array([given["logratio_token"]] * 2)
    for sign, name in ((1, "token_reward"), (-1, "token_cost")):
        tokens = advantages.token_rewards(ratio, 0 * ratio, mask, np.zeros(()), sign * how["kl_coef"] / 2)
        np.testing.assert_allclose(tokens, want[name], rtol=1e-6)


def test_a_multiplier_waits_has_a_bound_and_looks_at_the_newest_answers():
    old, new = np.full(WINDOW, 9.0), np.full((WINDOW // 2, 2), 1.0)
    start = moving(multiplier=2.0, multiplier_delay=1)
    assert start.log_multiplier(0, None, [new]) == math.log(2)
    assert start.log_multiplier(1, math.log(2), [old, new]) == pytest.approx(math.log(2) + 0.1 * 1.0 * 2)
    assert moving(cost_limit=1.0).log_multiplier(1, 0.3, [old, new]) == 0.3
    assert moving(multiplier_most=1.5).log_multiplier(1, 0.4, [new]) == math.log(1.5)
    assert moving().log_multiplier(1, 0.4, [np.array([math.nan])]) == 0.4


def judged(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < rng.integers(2, 7, (3, 4, 1))
    draw = lambda: np.where(mask, rng.normal(size=mask.shape), 0.0)  # noqa: E731
    reward, cost = rng.normal(size=(2, 3, 4))
    reward[0, 1] = cost[0, 1] = math.nan
    return Judged(
        reward,
        mask,
        old=draw(),
        ref=draw(),
        value=draw(),
        cost=cost,
        cost_value=draw(),
        baseline=rng.normal(size=3),
        cost_baseline=rng.normal(size=3),
    )


def test_two_critics_give_the_advantages_of_both_mixed():
    """(A_R - L A_C) / (1 + L), whitened as one; each critic learns the returns of its own signal."""
    given, estimator, multiplier = judged(), WithCritic(), 1.7
    found = with_costs(estimator, given, 0.2, "k1", multiplier)
    signals = {
        "returns": (given.reward, given.value, 0.1),
        "cost_returns": (given.cost, given.cost_value, -0.1),
    }
    apart = []
    for name, (score, value, coef) in signals.items():
        tokens = advantages.token_rewards(given.old, given.ref, given.mask, score, coef)
        gained, returns = advantages.generalised_advantages(tokens, value, given.mask)
        np.testing.assert_allclose(found[name], returns, atol=1e-12)
        apart.append(gained)
    want = advantages.whiten(mixed(*apart, multiplier), given.mask)
    np.testing.assert_allclose(found["advantage"], want, atol=1e-9)


@pytest.mark.parametrize("estimator", [LeaveOneOut(), OverGreedy(clip_advantage=99.0)])
def test_without_a_critic_the_estimator_is_linear_as_well(estimator):
    given, multiplier = replace(judged(), value=None, cost_value=None), 0.6
    found = with_costs(estimator, given, 0.2, "k1", multiplier)["advantage"]
    costly = replace(given, reward=given.cost, baseline=given.cost_baseline)
    apart = [estimator(given, 0.1, "k1")["advantage"], estimator(costly, -0.1, "k1")["advantage"]]
    np.testing.assert_allclose(found, mixed(*apart, multiplier), atol=1e-9)


def test_no_costs_no_multiplier_and_unknown_kinds_are_refused():
    assert build_lagrange(CostsConfig()) is None
    with pytest.raises(UserError, match="lenght"):
        build_lagrange(CostsConfig(costs={"lenght": {}}))
    with pytest.raises(UserError, match=r"costs\.length"):
        build_lagrange(CostsConfig(costs={"length": {"mst": 3}}))
