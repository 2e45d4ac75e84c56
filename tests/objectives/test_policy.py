"""Losses over rollouts: the published numbers, equivalences, and what clipping does to the gradient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import policy as p
from jaxalign.objectives.base import Scores
from jaxalign.types import Batch

VECTORS = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("../shared/specs/loss_vectors.json is not here")
    return json.loads(VECTORS.read_text())


def case(logp: Any, mask: Any, ref: Any = None, value: Any = None, **aux: Any) -> tuple[Scores, Batch]:
    """[N, T] as N groups of one answer."""
    group = lambda x: None if x is None else jnp.asarray(np.asarray(x, np.float32))[:, None]  # noqa: E731
    mask = group(mask) > 0
    zero = jnp.zeros(mask.shape)
    scores = Scores(group(logp), zero, zero, zero, zero, mask, ref=group(ref), value=group(value))
    ints = mask.astype(jnp.int32)
    given = {k: jnp.asarray(v) if np.ndim(v) == 1 else group(v) for k, v in aux.items()}
    return scores, Batch(ints, mask, ints, ints, given)


def mean(objective: Any, scores: Scores, batch: Batch) -> float:
    total, weight, _ = objective(scores, batch)
    return float(total / weight)


def test_grpo_and_gspo(published):
    x, expected = published["grpo_loss"]["inputs"], published["grpo_loss"]["expected"]
    new = np.asarray(x["logratio_new_old"])
    spread = np.repeat(np.asarray(x["adv"])[:, None], new.shape[1], axis=1)
    ref = new + np.asarray(x["ref_minus_policy"])
    aux = {"old": np.zeros_like(new), "advantage": spread, "max_tokens": np.full(2, 4.0)}
    scores, batch = case(new, x["mask"], ref, **aux)
    for name, key in (("grpo", "grpo"), ("dapo", "token_mean_bnpo"), ("dr_grpo", "dr_grpo_Lmax4")):
        got = mean(p.ClippedPolicy(beta=0.04, loss_type=name), scores, batch)
        assert np.isclose(got, expected[key], rtol=1e-5), name
    scores = replace(scores, ref=None)
    gspo = p.ClippedPolicy(importance="sequence", loss_type="grpo")
    assert np.isclose(mean(gspo, scores, batch), published["gspo_loss"]["expected"]["loss"], rtol=1e-5)


def test_rloo(published):
    x = published["rloo_loss"]["inputs"]
    ratio = np.asarray(x["seq_logratio"])[:, None] * [0.25, 0.75]
    spread = np.repeat(np.asarray(x["adv"])[:, None], 2, axis=1)
    scores, batch = case(ratio, np.ones((4, 2)), old=np.zeros((4, 2)), advantage=spread)
    got = mean(p.ClippedPolicy(importance="sum", loss_type="grpo"), scores, batch)
    assert np.isclose(got, published["rloo_loss"]["expected"]["mean"], rtol=1e-5)


def test_remax(published):
    x, expected = published["remax_loss"]["inputs"], published["remax_loss"]["expected"]
    scores, batch = case(x["logp"], x["mask"], old=x["logp"], advantage=expected["returns"])
    assert np.isclose(mean(p.Reinforce(), scores, batch), expected["loss"], rtol=1e-5)


def test_p3o(published):
    x, expected = published["p3o"]["inputs"], published["p3o"]["expected"]
    ratio = jnp.asarray(x["logp"]) - jnp.asarray(x["logp_old"])
    gap = jnp.asarray([x["reward"][0] - x["reward"][1]])
    for form in ("separate", "joint"):
        got = p.PairwisePolicy(form=form).loss(ratio[:1], ratio[1:], gap)[0]
        assert np.isclose(got, expected[form], rtol=1e-5), form
    for form in ("separate", "joint"):  # on the policy that sampled, both have the paper's gradient
        slope = jax.grad(lambda z, form=form: p.PairwisePolicy(form=form).loss(z, -0 * z, gap).sum())
        assert np.isclose(slope(jnp.zeros(1))[0], expected["on_policy_grad_coef"], rtol=1e-5), form


def test_ppo(published):
    gae, x = published["ppo_rewards_gae"], published["ppo_losses"]
    old, new, expected = gae["inputs"], x["inputs"], x["expected"]
    scores, batch = case(
        new["new_logp"],
        old["mask"],
        value=new["new_values"],
        old=old["logp_old"],
        advantage=gae["expected"]["whitened"],
        value_old=old["values"],
        returns=gae["expected"]["returns"],
        policy_weight=np.ones(2),
    )
    total, weight, metrics = p.ActorCritic()(scores, batch)
    assert np.isclose(total / weight, expected["total"], rtol=1e-5)
    names = {
        "loss/policy": "pg_loss",
        "loss/value": "vf_loss",
        "policy/clipfrac": "clipfrac",
        "policy/approxkl": "approx_kl",
        "val/ratio": "ratio_mean",
    }
    for name, key in names.items():
        value, count = metrics[name]
        assert np.isclose(value / count, expected[key], rtol=1e-5), name


def random(seed: int = 0) -> tuple[Scores, Batch]:
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < rng.integers(2, 6, (6, 1))
    draw = lambda scale=0.3: rng.normal(0, scale, (6, 5))  # noqa: E731
    logp = draw() - 1
    aux = {
        "old": logp + draw(),
        "advantage": draw(1),
        "value_old": draw(),
        "returns": draw(),
        "max_tokens": np.full(6, 8.0),
        "policy_weight": np.ones(6),
    }
    return case(logp, mask, logp + draw(), draw(), **aux)


LOSSES = {
    "grpo": p.ClippedPolicy(loss_type="grpo"),
    "dapo": p.ClippedPolicy(epsilon_high=0.28, beta=0.1),
    "dr_grpo": p.ClippedPolicy(loss_type="dr_grpo"),
    "gspo": p.ClippedPolicy(importance="sequence", loss_type="grpo"),
    "rloo": p.ClippedPolicy(importance="sum", loss_type="grpo"),
    "remax": p.Reinforce(),
    "ppo": p.ActorCritic(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up_and_padding_weighs_nothing(name):
    objective, (scores, batch) = LOSSES[name], random()
    total, weight, metrics = objective(scores, batch)
    cut = lambda tree, a, b: jax.tree.map(lambda x: x[a:b], tree)  # noqa: E731
    parts = [objective(cut(scores, a, a + 3), cut(batch, a, a + 3)) for a in (0, 3)]
    assert np.isclose(parts[0][0] + parts[1][0], total, rtol=1e-5)
    assert parts[0][1] + parts[1][1] == weight
    for key, (value, count) in metrics.items():
        assert np.isclose(sum(part[2][key][0] for part in parts), value, rtol=1e-4, atol=1e-5), key
        assert sum(part[2][key][1] for part in parts) == count > 0
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), (scores, batch))
    again = objective(*padded)
    assert np.isclose(again[0], total, rtol=1e-6)
    assert again[1] == weight


@pytest.mark.parametrize("name", LOSSES)
def test_on_the_policy_that_sampled_the_gradient_is_the_policy_gradient(name):
    """Where the ratio is 1 clipping does nothing: the gradient of every token is -A over the divisor."""
    objective, (scores, batch) = LOSSES[name].model_copy(update={"beta": 0.0}), random(1)
    flat = jnp.broadcast_to(batch.aux["advantage"][..., :1], scores.mask.shape)  # one for each answer
    aux = batch.aux | {"old": jax.lax.stop_gradient(scores.logp), "advantage": flat}
    scores = replace(scores, ref=None)

    def loss(logp: Any) -> Any:
        total, weight, _ = objective(replace(scores, logp=logp), replace(batch, aux=aux))
        return total / weight

    slope = np.asarray(jax.grad(loss)(scores.logp))
    mask, length = np.asarray(scores.mask), np.asarray(scores.mask.sum(-1, keepdims=True))
    divisor = {"grpo": 6 * length, "gspo": 6 * length, "rloo": 6, "dr_grpo": 48}.get(name, mask.sum())
    np.testing.assert_allclose(slope, np.where(mask, -np.asarray(flat) / divisor, 0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("moved", "advantage", "free"), [(0.5, 1, 0), (0.5, -1, 1), (-0.5, 1, 1), (-0.5, -1, 0)]
)
def test_a_ratio_that_has_moved_enough_has_no_gradient(moved, advantage, free):
    slope = jax.grad(lambda x: p.clipped(x, advantage, 0.2))(jnp.float32(moved))
    assert bool(slope != 0) == bool(free)


def test_p3o_does_not_see_what_all_answers_of_a_prompt_gain():
    scores, batch = random(2)
    pairs = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[2:]) if x.ndim > 1 else x[:3], (scores, batch))
    scores, batch = pairs
    flat = jnp.broadcast_to(batch.aux["advantage"][..., :1], scores.mask.shape)
    for form in ("separate", "joint"):
        one, other = (
            p.PairwisePolicy(form=form)(scores, replace(batch, aux=batch.aux | {"advantage": flat + shift}))
            for shift in (0.0, 3.0)
        )
        assert np.isclose(one[0], other[0], rtol=1e-5)


def test_ptx_adds_the_mean_nll_of_the_rows_beside_the_answers():
    """arXiv:2203.02155, eq. 2; however the rows of a step are cut into parts."""
    scores, batch = random()
    answers, others = p.ActorCritic(), p.ActorCritic(ptx_data="rows.jsonl", ptx_coef=0.5)
    assert (answers.group, others.group) == (1, 2)
    assert others.needs - answers.needs == {"tokens_per_group"}
    paired = lambda x: x[::2] if x.ndim == 1 else x.reshape(3, 2, -1)  # noqa: E731
    pairs = jax.tree.map(paired, (scores, batch))
    alone = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :1], pairs)
    tokens = alone[0].mask.sum() / jnp.maximum(alone[0].mask.any((1, 2)).sum(), 1)
    pairs[1].aux["tokens_per_group"] = jnp.full(3, tokens)
    row = pairs[0].mask[:, 1] & alone[0].mask.any((1, 2))[:, None]
    each = jnp.where(row, -pairs[0].logp[:, 1], 0).sum(-1) / jnp.maximum(row.sum(-1), 1)
    nll = each.sum() / alone[0].mask.any((1, 2)).sum()
    np.testing.assert_allclose(mean(others, *pairs), mean(answers, *alone) + 0.5 * nll, rtol=1e-5)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], pairs) for i in range(3)]
    sums = [others(*part)[:2] for part in parts]
    total, weight = (sum(column) for column in zip(*sums, strict=True))
    np.testing.assert_allclose(total / weight, mean(others, *pairs), rtol=1e-5)
