"""Losses that contrast an answer with others than its own rejected one: relative RPO, D2O, Cringe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives.answers import Answers, Pair
from jaxalign.objectives.base import RIVALS, Scores
from jaxalign.objectives.listwise import D2O
from jaxalign.objectives.relative import RelativeRPO, RelativeUnpaired
from jaxalign.objectives.token_contrastive import Cringe, CringePair
from jaxalign.types import Batch
from tests.objectives.test_pairs import batch_for, fixture_pair, published, scores  # noqa: F401

RELATIVE = RelativeRPO(beta=0.1, temperature=0.5)
DIAGONAL = RelativeRPO(beta=0.1, contrast="diagonal")


@pytest.mark.parametrize("wide", [False, True])
def test_relative(published: dict[str, Any], wide: bool) -> None:  # noqa: F811
    tolerance = 1e-9 if wide else 1e-5
    with jax.enable_x64(wide):
        v, both = published["rpo_relative_paired"], jnp.ones(2, bool)
        prompt = jnp.asarray(v["inputs"]["prompt_emb"])
        got = RELATIVE.loss(fixture_pair([]), prompt, both)
        np.testing.assert_allclose(got, v["expected"]["per_example"], rtol=tolerance)
        got = DIAGONAL.loss(fixture_pair([]), prompt, both)
        want = published["rpo_diagonal"]["expected"]["per_example"]
        np.testing.assert_allclose(got, want, rtol=tolerance)


def test_one_pair_under_relative_is_dpo() -> None:
    one = jax.tree.map(lambda x: x[:1], fixture_pair([]).chosen)
    pair = Pair(one, replace(one, logp=one.logp - 3))
    got = RELATIVE.loss(pair, jnp.ones((1, 4)), jnp.ones(1, bool))
    np.testing.assert_allclose(got, -jax.nn.log_sigmoid(0.1 * 3.0), rtol=1e-5)


@pytest.mark.parametrize("objective", [RELATIVE, DIAGONAL])
def test_padding_and_the_order_of_pairs_change_nothing(objective: RelativeRPO) -> None:
    prompt = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32))
    s = replace(scores(5), prompt=prompt)
    total = objective(s, batch_for(s))[0]
    turned = jax.tree.map(lambda x: x[::-1], s)
    np.testing.assert_allclose(objective(turned, batch_for(s))[0], total, rtol=1e-5)
    padded = jax.tree.map(lambda x: jnp.concatenate([x[:2], jnp.zeros_like(x[:3]), x[2:]]), s)
    again, count, _ = objective(padded, batch_for(padded))
    np.testing.assert_allclose(again, total, rtol=1e-5)
    assert count == 5
    slope = jax.grad(lambda x: objective(replace(padded, logp=x), batch_for(padded))[0])(padded.logp)
    assert np.isfinite(slope).all()
    assert not np.asarray(slope[2:5]).any()


def test_similar_prompts_count_more() -> None:
    """The rejected answer of the same prompt gets more weight, so its log-ratio more gradient."""
    pair = jax.tree.map(lambda x: jnp.repeat(x, 3)[:3], fixture_pair([]))
    prompt = jnp.array([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]])

    def first(ref: jax.Array) -> jax.Array:
        moved = replace(pair, rejected=replace(pair.rejected, logp=ref))
        return RELATIVE.loss(moved, prompt, jnp.ones(3, bool))[0]

    slope = jax.grad(first)(pair.rejected.logp)
    assert slope[0] > slope[1] > slope[2] > 0


def test_relative_without_pairs() -> None:
    """Every wanted answer against every unwanted one, near prompts first: written out with loops."""
    ratio, label = np.array([1.0, -0.5, -1.0, 0.5, 9.0]), np.array([True, True, False, False, False])
    prompt = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0]])
    unit = prompt / np.linalg.norm(prompt, axis=1, keepdims=True)
    want = []
    for i in (0, 1):
        weight = np.exp(-(1 - unit[i] @ unit[2:4].T) / 0.5)
        z = 0.1 * weight / weight.sum() * (ratio[i] - ratio[2:4])
        want.append(np.log1p(np.exp(-z)).mean())
    tokens = jnp.asarray(ratio, jnp.float32)[:, None, None]
    mask, zeros = jnp.asarray(np.arange(5) < 4)[:, None, None], jnp.zeros_like(tokens)
    s = Scores(tokens, zeros, zeros, zeros, zeros, mask, ref=zeros, prompt=jnp.asarray(prompt, jnp.float32))
    objective = RelativeUnpaired(beta=0.1, temperature=0.5)
    total, count, metrics = objective(s, Batch(mask, mask, mask, mask, {"label": jnp.asarray(label)}))
    np.testing.assert_allclose(total, sum(want), rtol=1e-5)
    assert count == 2
    assert metrics["rewards/rejected"] == (pytest.approx(0.1 * -0.5), 2)
    alone = objective(s, Batch(mask, mask, mask, mask, {"label": jnp.ones(5, bool)}))
    assert alone[:2] == (0, 0), "nothing to compare with"
    one = jax.tree.map(lambda x: x[jnp.array([0, 2])], s)
    pair = objective(one, Batch(*[one.mask] * 4, {"label": jnp.array([True, False])}))
    np.testing.assert_allclose(pair[0], np.log1p(np.exp(-0.1 * 2)), rtol=1e-5)  # DPO


def test_d2o(published: dict[str, Any]) -> None:  # noqa: F811
    v = published["d2o"]
    # Its values are those of one example a row, whatever the name says.
    own, bad = np.asarray(v["inputs"]["self_logratio_KxB"]), np.asarray(v["inputs"]["neg_logratio"])
    # The longest list of the data has room for more answers than these two have.
    ratio = jnp.asarray(np.concatenate([own, bad[:, None], np.full((2, 2), 9.0)], axis=1))
    present = jnp.arange(5) < 3
    rewards = D2O().rewards(ratio, jnp.broadcast_to(present, ratio.shape))
    np.testing.assert_allclose(
        -jax.nn.log_sigmoid(rewards[0] - rewards[1]), v["expected"]["per_example"], rtol=1e-5
    )


def test_d2o_over_lists_of_several_lengths() -> None:
    mask = jnp.asarray([[[True]] * 3, [[True], [True], [False]], [[True], [False], [False]]])
    logp = jnp.where(mask, jnp.array([[1.0, 2.0, -4.0], [3.0, -2.0, 0.0], [5.0, 0.0, 0.0]])[..., None], 0.0)
    zeros = jnp.zeros_like(logp)
    s = Scores(logp, zeros, zeros, zeros, zeros, mask, ref=zeros)
    total, count, metrics = D2O(beta=0.1, alpha=0.2)(s, Batch(mask, mask, mask, mask))
    want = -jax.nn.log_sigmoid(0.1 * 1.5 + 0.2 * 4) - jax.nn.log_sigmoid(0.1 * 3 + 0.2 * 2)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert count == 2  # one answer alone is compared with nothing
    np.testing.assert_allclose(metrics["rewards/rejected"][0], -0.8 - 0.4, rtol=1e-5)


def token_rows(logits: list[float], others: list[list[float]]) -> Scores:
    """Scores [1, 2, T]: two answers with these logits and the same rivals; the last column is padding."""
    T = len(logits)
    mask = jnp.asarray([[[True] * T + [False]] * 2])
    logp = jnp.asarray([[[*logits, 0.0]] * 2])
    rivals = np.full((1, 2, T + 1, RIVALS), -50.0)
    rivals[0, :, :T, : len(others[0])] = others
    zeros = jnp.zeros_like(logp)
    return Scores(logp, zeros, zeros, zeros, zeros, mask, ref=None, rivals=jnp.asarray(rivals))


def test_cringe(published: dict[str, Any]) -> None:  # noqa: F811
    """With one rival a token the draw is certain: the published tokens, and both losses."""
    v = published["cringe"]
    given, want = v["inputs"], v["expected"]
    s = token_rows(given["neg_token_logit"], [[x] for x in given["sampled_topk_logit"]])
    contrast = Cringe(top_k=1).contrast(s)
    np.testing.assert_allclose(contrast, [[want["sum"]] * 2], rtol=1e-5)
    for i, token in enumerate(want["token_loss"]):
        single = replace(s, mask=s.mask & (jnp.arange(4) == i))
        np.testing.assert_allclose(Cringe(top_k=1).contrast(single)[0, 0], token, rtol=1e-5)
    one = lambda x: Answers(jnp.array([x]), jnp.zeros(1), jnp.ones(1))  # noqa: E731
    ce, margin = given["ce_positive_sum"], given["margin_logp_w_minus_l"]
    pair = Pair(one(-ce), one(-ce - margin))
    got = CringePair(alpha=0.5).loss(pair, jnp.array([want["sum"]]))
    np.testing.assert_allclose(got, [want["pairwise"]], rtol=1e-5)
    even = Pair(one(-ce), one(-ce))  # the gate is one half
    got = CringePair(alpha=0.5).loss(even, jnp.array([want["sum"]]))
    np.testing.assert_allclose(2 * got, [want["binary"]], rtol=1e-5)


def test_cringe_over_rows_that_are_wanted_and_rows_that_are_not() -> None:
    s = token_rows([-2.0, -1.0], [[-1.0], [-3.0]])
    s = jax.tree.map(lambda x: jnp.concatenate([x, x])[:, :1], s)
    batch = Batch(s.mask, s.mask, s.mask, s.mask, {"label": jnp.array([True, False])})
    total, count, metrics = Cringe(alpha=0.5, top_k=1)(s, batch)
    np.testing.assert_allclose(total, 3.0 + 0.5 * (np.log1p(np.exp(-1)) + np.log1p(np.exp(2))), rtol=1e-5)
    assert count == 2
    assert metrics["logps/chosen"] == (-3, 1)


def test_the_mean_over_the_draw_has_the_gradient_of_a_draw_on_average() -> None:
    s = token_rows([-1.0], [[-0.7, -1.5, -3.0]])
    cringe = Cringe(top_k=3)
    loss = lambda s: cringe.contrast(s)[0, 0]  # noqa: E731
    got = jax.grad(loss, allow_int=True)(s)
    drawn = np.exp([-0.7, -1.5, -3.0])
    drawn /= drawn.sum()
    slope = jax.nn.sigmoid(-1.0 - np.array([-0.7, -1.5, -3.0]))
    np.testing.assert_allclose(got.logp[0, 0, 0], (drawn * slope).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.rivals[0, 0, 0, :3], -drawn * slope, rtol=1e-5)
    assert not np.asarray(got.rivals[0, 0, 0, 3:]).any()
    still = jax.grad(lambda s: Cringe(top_k=3, detach=True).contrast(s)[0, 0], allow_int=True)(s)
    np.testing.assert_allclose(still.logp, got.logp, rtol=1e-6)
    assert not np.asarray(still.rivals).any()


@pytest.mark.parametrize("passes", [False, True])
def test_the_weight_of_a_pair_passes_gradients_only_where_asked(passes: bool) -> None:
    one = lambda x: Answers(jnp.array([x]), jnp.zeros(1), jnp.ones(1))  # noqa: E731
    objective = CringePair(gate_grad=passes)
    slope = jax.grad(lambda l: objective.loss(Pair(one(-3.0), one(l)), jnp.ones(1))[0])(-4.0)  # noqa: E741
    assert (float(slope) != 0) == passes
