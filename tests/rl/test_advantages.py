"""Advantages: the published numbers, and what must hold whatever the rewards are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.rl import advantages as a

VECTORS = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"
NAN = float("nan")


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("../shared/specs/loss_vectors.json is not here")
    return json.loads(VECTORS.read_text())


def given(case: dict[str, Any]) -> dict[str, Any]:
    found = {name: np.asarray(value, float) for name, value in case["inputs"].items() if name != "uses"}
    return found | ({"mask": found["mask"] > 0} if "mask" in found else {})


def test_rloo_and_grpo(published):
    case = published["rloo_advantage"]
    rewards = given(case)["reward"][None]
    np.testing.assert_allclose(a.leave_one_out(rewards)[0], case["expected"]["adv"], rtol=1e-9)
    expected = published["grpo_advantage"]["expected"]
    np.testing.assert_allclose(a.group_relative(rewards)[0], expected["group_unbiased"], rtol=1e-9)
    np.testing.assert_allclose(a.group_relative(rewards, "none")[0], expected["dr_grpo"], rtol=1e-9)
    # One group is the whole batch.
    np.testing.assert_allclose(a.group_relative(rewards, "batch")[0], expected["group_unbiased"], rtol=1e-9)


def test_ppo_rewards_advantages_and_whitening(published):
    case = published["ppo_rewards_gae"]
    x, expected = given(case), case["expected"]
    keys = case["params"]
    rewards = a.token_rewards(x["logp_old"], x["logp_ref"], x["mask"], x["score"], keys["kl_coef"])
    np.testing.assert_allclose(rewards, expected["token_rewards"], atol=1e-12)
    got, returns = a.generalised_advantages(rewards, x["values"], x["mask"], keys["gamma"], keys["lam"])
    np.testing.assert_allclose(got, expected["advantages"], atol=1e-12)
    np.testing.assert_allclose(returns, expected["returns"], atol=1e-12)
    np.testing.assert_allclose(a.whiten(got, x["mask"]), expected["whitened"], rtol=1e-8)
    unbiased = a.whiten(got, x["mask"], unbiased=True)
    np.testing.assert_allclose(unbiased, expected["whitened_unbiased"], rtol=1e-8)
    kl = a.KL["k1"](np.where(x["mask"], x["logp_old"] - x["logp_ref"], 0))
    assert np.isclose(kl.sum(axis=1).mean(), expected["kl_seq_mean"])
    k3 = a.KL["k3"](np.where(x["mask"], x["logp_old"] - x["logp_ref"], 0))
    assert np.isclose(k3.sum(axis=1).mean(), expected["k3_seq_mean"])
    unshifted = a.whiten(rewards, x["mask"], shift=False)
    expected = published["ppo_reward_whiten_noshift"]["expected"]["rewards"]
    np.testing.assert_allclose(unshifted, expected, rtol=1e-8)


def test_adaptive_kl(published):
    case = published["adaptive_kl"]
    x, keys = case["inputs"], case["params"]
    got = a.adapted(x["coef"], x["observed_kl"], x["n_steps"], target=keys["target"], horizon=keys["horizon"])
    assert np.isclose(got, case["expected"]["coef"], rtol=1e-9)


def test_remax_returns(published):
    case = published["remax_loss"]
    x, keys = given(case), case["params"]
    gap = np.clip(x["reward"] - x["greedy_reward"], -keys["clip_reward"], keys["clip_reward"])
    per_token = -keys["kl_coef"] * np.where(x["mask"], x["logratio_ref"], 0) + gap[:, None]
    expected = np.asarray(case["expected"]["returns"])
    np.testing.assert_allclose(np.where(x["mask"], per_token, 0), expected, atol=1e-12)


def test_rloo_is_a_multiple_of_the_centred_reward():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(a.leave_one_out(rewards), a.group_relative(rewards, "none") * 4 / 3)


def test_an_answer_without_a_reward_is_no_part_of_any_mean():
    full, holed = np.array([[1.0, 3.0, 2.0]]), np.array([[1.0, NAN, 3.0, 2.0]])
    for how in (a.leave_one_out, a.group_relative, lambda r: a.group_relative(r, "none")):
        got = how(holed)[0]
        assert got[1] == 0
        np.testing.assert_allclose(got[[0, 2, 3]], how(full)[0])
    assert not a.leave_one_out(np.array([[5.0, NAN]])).any()  # nobody to compare with
    assert not a.group_relative(np.full((2, 3), 7.0)).any()


def test_gae_of_lambda_1_is_what_is_to_come_less_the_value():
    rng = np.random.default_rng(1)
    mask = np.arange(6) < np.array([6, 4, 1])[:, None]
    rewards, values = (np.where(mask, rng.normal(size=(3, 6)), 0) for _ in range(2))
    got, returns = a.generalised_advantages(rewards, values, mask, gamma=0.9, lam=1.0)
    np.testing.assert_allclose(returns, a.to_go(rewards, mask, 0.9))
    np.testing.assert_allclose(got, np.where(mask, a.to_go(rewards, mask, 0.9) - values, 0))


def test_gaps_in_a_mask_hold_nothing():
    """Answers that share a row are laid out apart: what is masked between two tokens changes nothing."""
    mask = np.array([[True, False, True, False, True]])
    rewards, values = np.array([[1.0, 9, 2, 9, 3]]), np.array([[0.5, 9, 0.4, 9, 0.3]])
    dense = a.generalised_advantages(rewards[:, ::2], values[:, ::2], mask[:, ::2])
    for got, expected in zip(a.generalised_advantages(rewards, values, mask), dense, strict=True):
        np.testing.assert_allclose(got[:, ::2], expected)
        assert not got[:, 1::2].any()
