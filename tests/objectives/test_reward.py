"""Losses over one score an answer: the published numbers, properties, padding and settings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxalign.objectives.reward import BradleyTerry, Cost, KWise, Rating
from jaxalign.types import Batch
from tests.objectives.test_pairs import published  # noqa: F401

REWARDS = jnp.array([[1.2, 0.4], [-0.3, 0.5]])
COSTS = jnp.array([[-0.5, 1.0], [0.2, 0.8]])
SAFE = jnp.array([[True, False], [False, False]])


def batch(shape: tuple[int, int], padded: int = 0, **aux: Any) -> Batch:
    """Answers of two targets each; the last `padded` groups are empty."""
    mask = jnp.broadcast_to((jnp.arange(shape[0]) < shape[0] - padded)[:, None, None], (*shape, 2))
    return Batch(mask, mask, mask, mask, {name: jnp.asarray(x) for name, x in aux.items()})


def means(metrics: dict[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


def test_vectors_kept_here() -> None:
    total, count, metrics = BradleyTerry()(REWARDS, batch((2, 2)))
    np.testing.assert_allclose(total / count, 0.7711006659, rtol=1e-5)
    assert means(metrics)["rewards/accuracies"] == 0.5
    scores = batch((1, 3), scores=[[3.0, 2.0, 1.0]])
    total, count, _ = KWise()(jnp.array([[2.0, 1.0, 0.5]]), scores)
    np.testing.assert_allclose(total / count, 0.3295839832, rtol=1e-5)
    total, count, metrics = Cost()(COSTS, batch((2, 2), safe=SAFE))
    np.testing.assert_allclose(total / count, 1.198222218, rtol=1e-5)
    assert means(metrics)["costs/accuracies"] == 1
    # One safe answer costs less than 0, and three unsafe ones more: all signs are right.
    assert means(metrics)["costs/sign_accuracies"] == 1


@pytest.mark.parametrize("wide", [False, True])
def test_vectors(published: dict[str, Any], wide: bool) -> None:  # noqa: F811
    tolerance = 1e-9 if wide else 1e-5
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance)  # noqa: E731
    with jax.enable_x64(wide):
        v = published["rm_bt"]
        rewards = jnp.stack([jnp.asarray(v["inputs"][name]) for name in ("r_w", "r_l")], axis=1)
        margin = jnp.asarray(v["inputs"]["margin"])
        close(BradleyTerry().loss(rewards, 0.0), v["expected"]["bt"]["per_example"])
        close(BradleyTerry(margin_weight=1).loss(rewards, margin), v["expected"]["bt_margin"]["per_example"])
        close(BradleyTerry(centering=0.01).loss(rewards, 0.0).mean(), v["expected"]["bt_centered"])
        v = published["rm_kwise"]
        rewards = jnp.asarray([v["inputs"]["r_sorted_best_first"]])
        better = KWise().better(jnp.array([[3.0, 2.0, 1.0]]), jnp.ones((1, 3), bool))
        close(KWise().loss(rewards, better), [v["expected"]["loss"]])
        v = published["cost_model_safe_rlhf"]
        pick = lambda *names: jnp.stack([jnp.asarray(v["inputs"][n]) for n in names], axis=1)  # noqa: E731
        costs, sign = pick("cost_safer", "cost_unsafer"), pick("safer_sign", "unsafer_sign")
        close(Cost(regularization=0).loss(costs, sign), v["expected"]["per_example"])
        close(Cost().loss(costs, sign).mean(), v["expected"]["with_reg"])


def test_properties_of_bradley_terry() -> None:
    bt = BradleyTerry()
    np.testing.assert_allclose(bt.loss(REWARDS + 7, 0.0), bt.loss(REWARDS, 0.0), rtol=1e-5)
    swapped = bt.loss(REWARDS[:, ::-1], 0.0)
    np.testing.assert_allclose(bt.loss(REWARDS, 0.0) - swapped, REWARDS[:, 1] - REWARDS[:, 0], rtol=1e-5)
    np.testing.assert_allclose(bt.loss(jnp.zeros((1, 2)), 0.0), np.log(2), rtol=1e-6)
    assert bt.loss(REWARDS + 7, 0.0)[0] < BradleyTerry(centering=0.01).loss(REWARDS + 7, 0.0)[0]


def test_a_tie_is_not_a_hit() -> None:
    ties = jnp.zeros((2, 2))
    assert means(BradleyTerry()(ties, batch((2, 2)))[2])["rewards/accuracies"] == 0
    assert means(Cost()(ties, batch((2, 2), safe=SAFE))[2])["costs/sign_accuracies"] == 0


def test_the_margin_is_asked_for_where_it_counts() -> None:
    assert BradleyTerry().needs == frozenset()
    assert BradleyTerry(margin_weight=0.5).needs == {"margin"}
    here = batch((2, 2), margin=[2.0, np.nan], padded=1)
    total, count, _ = BradleyTerry(margin_weight=0.5)(REWARDS, here)
    np.testing.assert_allclose(total, -jax.nn.log_sigmoid(1.2 - 0.4 - 1.0), rtol=1e-5)
    assert count == 1


def test_pairs_of_a_list_are_k_wise_and_equal_scores_are_no_pair() -> None:
    rewards = jnp.array([[0.3, -0.2, 0.9, 5.0], [1.0, 2.0, 3.0, 4.0]])
    scores = batch((2, 4), scores=[[2.0, 1.0, 1.0, np.nan], [1.0, 1.0, 1.0, 1.0]])
    total, count, metrics = KWise()(rewards, scores)
    pair = lambda i, j: BradleyTerry().loss(rewards[:1, jnp.array([i, j])], 0.0)[0]  # noqa: E731
    np.testing.assert_allclose(total, (pair(0, 1) + pair(0, 2)) / 2, rtol=1e-5)
    assert count == 1  # the second list says nothing
    assert metrics["rewards/accuracies"] == (1, 2)


def test_ratings() -> None:
    rewards, labels = jnp.array([[0.0, 2.0, 7.0]]), [[1.0, 9.0, np.nan]]
    total, count, metrics = Rating(lowest=1, highest=9)(rewards, batch((1, 3), scores=labels))
    np.testing.assert_allclose(total, 0.25 + (1 - jax.nn.sigmoid(2.0)) ** 2, rtol=1e-5)
    assert count == 2
    assert means(metrics)["ratings/given"] == 0.5
    # The best prediction is the rating itself.
    slope = jax.grad(lambda r: Rating().loss(r, jnp.asarray(0.7)))
    assert slope(float(np.log(0.7 / 0.3)) - 0.1) < 0 < slope(float(np.log(0.7 / 0.3)) + 0.1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Rating(lowest=5, highest=1), "lowest"),
        (lambda: BradleyTerry(margin_weight=-1), "margin_weight"),
        (lambda: Cost(regularization=-1), "regularization"),
    ],
)
def test_settings_that_cannot_work(make: Any, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        make()


@pytest.mark.parametrize("objective", [BradleyTerry(), KWise(), Rating(highest=3), Cost()])
def test_every_reward_loss_says_how_scores_follow_lengths(objective: Any) -> None:
    """The share of pairs within a group in which the longer answer scores higher, less the others."""
    rng = np.random.default_rng(0)
    group = objective.group or 4
    length, scores = rng.integers(0, 4, (6, group)), rng.normal(size=(6, group)).astype(np.float32)
    mask = np.arange(3) < length[..., None]
    aux = {"safe": length > 1, "scores": length.astype(np.float32)}
    got = objective(jnp.asarray(scores), Batch(mask, mask, mask, mask, aux))[2]["length_correlation"]
    there = [(b, i, j) for b in range(6) for i in range(group) for j in range(group) if length[b, i] > 0]
    signs = [
        np.sign(scores[b, i] - scores[b, j])
        for b, i, j in there
        if length[b, i] > length[b, j] and length[b, j] > 0
    ]
    np.testing.assert_allclose(got[0] / got[1], np.mean(signs), rtol=1e-6)


def test_ratings_outside_the_scale_are_named() -> None:
    rated = {"scores": np.array([4.0, 1.0], np.float32)}
    assert Rating(lowest=1, highest=5).fault(rated) is None
    assert Rating(lowest=2, highest=5).fault(rated) == "have scores outside lowest=2 to highest=5"
