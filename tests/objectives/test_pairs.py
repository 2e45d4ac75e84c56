"""Losses over pairs: the published numbers, their gradients, extremes, equivalences and what padding does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxalign.objectives import composite as c
from jaxalign.objectives import pairwise as p
from jaxalign.objectives import reference_free as r
from jaxalign.objectives.answers import Answers, Pair, log1mexp, over_pairs
from jaxalign.objectives.base import Scores
from jaxalign.types import Batch
from tests.objectives.preference_vectors import CASES, EXPECTED, FIXTURE, GRADIENTS

VECTORS = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"
OBJECTIVES = {name: case[0] for name, case in CASES.items()} | {
    "simpo": r.SimPO(),
    "alphapo": r.AlphaPO(),
    "orpo": r.ORPO(),
    "cpo with nll": r.CPO(),
    "fdpo": p.FDPO(),
    "rpo": c.RPO(),
}
BY_TOKEN = {"wpo": c.WPO(beta=0.1), "ld_dpo": c.LDDPO()}


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("../shared/specs/loss_vectors.json is not here")
    return json.loads(VECTORS.read_text())


def fixture_pair(margin: list[float]) -> Pair:
    f = {name: jnp.asarray(value) for name, value in FIXTURE.items()}
    chosen = Answers(f["pi_w"], f["ref_w"], f["len_w"])
    rejected = Answers(f["pi_l"], f["ref_l"], f["len_l"])
    return Pair(chosen, rejected, jnp.asarray(margin) if margin else None, f["len_w"].mean())


def pair_of(w: float, l: float, ref_w: float = 0.0, ref_l: float = 0.0, length: float = 5.0) -> Pair:  # noqa: E741
    one = lambda logp, ref: Answers(jnp.array([logp]), jnp.array([ref]), jnp.array([length]))  # noqa: E731
    return Pair(one(w, ref_w), one(l, ref_l), jnp.array([0.5]), jnp.array([5.0]))


@pytest.mark.parametrize("name", EXPECTED)
def test_vectors_kept_here(name: str) -> None:
    objective, _, margin = CASES[name]
    np.testing.assert_allclose(objective.loss(fixture_pair(margin)), EXPECTED[name], rtol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_vectors(published: dict[str, Any], name: str, wide: bool) -> None:
    objective, part, margin = CASES[name]
    expected = published[name.strip()]["expected"]
    expected = expected[part] if part else expected
    with jax.enable_x64(wide):
        loss = objective.loss(fixture_pair(margin))
        assert loss.dtype == (jnp.float64 if wide else jnp.float32)
        np.testing.assert_allclose(loss, expected["per_example"], rtol=1e-9 if wide else 1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n.strip() == n and n not in ("slic_hf",)])
def test_gradients_of_the_table(published: dict[str, Any], name: str) -> None:
    """d loss / d log p of both answers, by the table of central differences."""
    table = published["gradients_pairwise"]["expected"]
    if (entry := GRADIENTS.get(name, name)) not in table:
        pytest.skip("not in the table")
    objective, _, margin = CASES[name]
    with jax.enable_x64(True):
        pair = fixture_pair(margin)
        slope = jax.grad(lambda pair: objective.loss(pair).sum())(pair)
        np.testing.assert_allclose(slope.chosen.logp, table[entry]["d_pi_w"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(slope.rejected.logp, table[entry]["d_pi_l"], rtol=1e-6, atol=1e-9)


def test_simpo_and_orpo(published: dict[str, Any]) -> None:
    """Their vectors are in averages; those of the fixture are in the table of gradients."""
    mean = lambda average: Answers(jnp.asarray(average), jnp.zeros(2), jnp.ones(2))  # noqa: E731
    simpo, table = published["simpo"], published["gradients_pairwise"]["expected"]
    pair = Pair(mean(simpo["inputs"]["avg_logp_w"]), mean(simpo["inputs"]["avg_logp_l"]))
    got = r.SimPO(beta=2.0, gamma=1.0).loss(pair)
    np.testing.assert_allclose(got, simpo["expected"]["per_example"], rtol=1e-5)
    pair = fixture_pair([])
    total = published["orpo"]["expected"]["total_with_nll"]
    np.testing.assert_allclose(r.ORPO(beta=0.1).loss(pair).mean(), total, rtol=1e-5)
    np.testing.assert_allclose(
        r.CPO(beta=0.1).loss(pair).mean(), published["cpo"]["expected"]["total"], rtol=1e-5
    )
    odds = lambda pair: (r.ORPO(beta=1.0).loss(pair) - pair.nll).sum()  # noqa: E731
    for f, entry in ((lambda pair: r.SimPO().loss(pair).sum(), "simpo"), (odds, "orpo_or")):
        slope = jax.grad(f)(pair)
        np.testing.assert_allclose(slope.chosen.logp, table[entry]["d_pi_w"], rtol=1e-4)
        np.testing.assert_allclose(slope.rejected.logp, table[entry]["d_pi_l"], rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ends", [(0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (-1e-6, -1e-6), (0.0, 0.0)])
def test_extremes_are_finite(name: str, ends: tuple[float, float]) -> None:
    for length in (1.0, 400.0):
        pair = pair_of(*ends, length=length)
        loss, slope = jax.value_and_grad(lambda pair, o=OBJECTIVES[name]: o.loss(pair).sum())(pair)
        assert np.isfinite(loss), (name, length)
        assert all(np.isfinite(x).all() for x in (slope.chosen.logp, slope.rejected.logp)), (name, length)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_by_differences(name: str) -> None:
    with jax.enable_x64(True):
        f = lambda w, l, o=OBJECTIVES[name]: o.loss(pair_of(w, l, -9.0, -7.5))[0]  # noqa: E731,E741
        slopes = jax.grad(f, (0, 1))(-8.25, -7.75)
        h = 1e-6
        want = (f(-8.25 + h, -7.75) - f(-8.25 - h, -7.75), f(-8.25, -7.75 + h) - f(-8.25, -7.75 - h))
        np.testing.assert_allclose(slopes, [x / (2 * h) for x in want], rtol=1e-6, atol=1e-8)


DPO = p.DPO(beta=0.1)
SAME_AS_DPO = {
    "cdpo": p.ConservativeDPO(label_smoothing=0),
    "robust": p.RobustDPO(label_smoothing=0),
    "odpo": p.ODPO(alpha=0),
    "dpop": p.DPOP(beta=0.1, penalty=0),
    "fdpo reverse": p.FDPO(divergence="reverse_kl"),
    "fdpo alpha 1": p.FDPO(divergence="alpha", alpha=1.0),
}


@pytest.mark.parametrize("name", SAME_AS_DPO)
def test_limits_are_dpo(name: str) -> None:
    pair = fixture_pair([0.7, 0.1])
    np.testing.assert_array_equal(SAME_AS_DPO[name].loss(pair), DPO.loss(pair))


def test_alphapo_at_zero_is_simpo() -> None:
    pair = fixture_pair([])
    want = r.SimPO(beta=3, gamma=0.5).loss(pair)
    np.testing.assert_array_equal(r.AlphaPO(beta=3, gamma=0.5, alpha=0).loss(pair), want)
    np.testing.assert_allclose(r.AlphaPO(beta=3, gamma=0.5, alpha=1e-4).loss(pair), want, rtol=1e-3)


def test_mixtures(published: dict[str, Any]) -> None:
    pair, rpo = fixture_pair([]), published["rpo_dpo_plus_sft"]["expected"]
    np.testing.assert_allclose(c.RPO(beta=0.1).loss(pair).mean(), rpo["loss_eta0005"], rtol=1e-5)
    np.testing.assert_allclose(
        c.RPO(beta=0.1, alpha=1).loss(pair).mean(), rpo["iterative_rpo_alpha1"], rtol=1e-5
    )
    weighted = published["wpo_weighted_dpo"]
    got = c.WPO(beta=0.1).loss(pair, jnp.asarray(weighted["inputs"]["weight"]))
    np.testing.assert_allclose(got, weighted["expected"]["per_example"], rtol=1e-5)


def test_a_pair_is_weighed_with_how_likely_both_answers_are() -> None:
    """exp of the mean gap between a token's log-prob and log sum p^2, multiplied over both; no gradient."""
    s = scores(3)
    s = replace(s, collision=jnp.where(s.mask, -0.7, 0.0))
    batch = batch_for(s)
    mask, gap = np.asarray(s.mask), np.asarray(s.logp - s.collision)
    mean = [[gap[b, g][mask[b, g]].mean() for g in (0, 1)] for b in range(3)]
    weight = np.exp(np.sum(mean, axis=1))
    dpo = lambda logp: (weight * DPO.loss(Pair.of(replace(s, logp=logp), batch))).sum()  # noqa: E731
    wpo = lambda logp: c.WPO(beta=0.1)(replace(s, logp=logp), batch)[0]  # noqa: E731
    for got, want in zip(jax.value_and_grad(wpo)(s.logp), jax.value_and_grad(dpo)(s.logp), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert c.WPO()(s, batch)[1] == 3


def test_tokens_beyond_the_shorter_answer_count_less(published: dict[str, Any]) -> None:
    v = published["ld_dpo_logps"]
    tokens = [v["inputs"]["token_logp_w"], v["inputs"]["token_logp_l"] + [0.0, 0.0]]
    mask = jnp.asarray([[[True] * 4, [True, True, False, False]]])
    weight = c.LDDPO(alpha=v["params"]["ld_alpha"]).weight(mask)
    sums = np.where(mask, weight * jnp.asarray(tokens), 0).sum(-1)[0]
    np.testing.assert_allclose(sums, [v["expected"]["w"], v["expected"]["l"]], rtol=1e-6)
    s = scores(5)
    np.testing.assert_allclose(c.LDDPO(alpha=1)(s, batch_for(s))[0], p.DPO()(s, batch_for(s))[0], rtol=1e-6)


def test_properties_of_dpo() -> None:
    pair, swapped = pair_of(-3.0, -5.0, -4.0, -4.5), pair_of(-5.0, -3.0, -4.5, -4.0)
    z = 0.1 * pair.delta
    np.testing.assert_allclose(DPO.loss(pair) - DPO.loss(swapped), -z, rtol=1e-5)
    both = pair_of(-2.0, -4.0, -4.0, -4.5)
    np.testing.assert_allclose(DPO.loss(both), DPO.loss(pair), rtol=1e-6)
    assert DPO.loss(pair_of(0.0, -1e5)) == 0
    np.testing.assert_allclose(p.DPO(beta=1e-9).loss(pair), np.log(2), rtol=1e-6)


def test_robust_dpo_is_unbiased() -> None:
    """A share of flipped labels leaves its mean where DPO's is without them."""
    pair, swapped = pair_of(-3.0, -5.0, -4.0, -4.5), pair_of(-5.0, -3.0, -4.5, -4.0)
    robust = p.RobustDPO(label_smoothing=0.2)
    np.testing.assert_allclose(
        0.8 * robust.loss(pair) + 0.2 * robust.loss(swapped), DPO.loss(pair), rtol=1e-5
    )


def test_where_the_bounded_losses_stop() -> None:
    slope = lambda o, d: float(jax.grad(lambda w: o.loss(pair_of(w, 0.0))[0])(d))  # noqa: E731
    ipo = p.IPO(beta=0.1, length_norm=False)  # the margin aimed at is 5
    assert slope(ipo, 4.9) < 0 < slope(ipo, 5.1)
    cautious = p.ConservativeDPO(beta=0.1, label_smoothing=0.1)  # at s(z) = 0.9
    edge = 10 * np.log(9)
    assert slope(cautious, edge - 0.1) < 0 < slope(cautious, edge + 0.1)
    assert slope(p.Hinge(beta=0.1), 10.1) == 0
    dpop = p.DPOP(beta=0.1, penalty=5)
    assert dpop.loss(pair_of(1.0, 0.0)) == DPO.loss(pair_of(1.0, 0.0))
    assert slope(dpop, -1.0) == pytest.approx(6 * slope(p.DPO(beta=0.1), -6.0), rel=1e-5)


def test_npo_becomes_gradient_ascent() -> None:
    slope = jax.grad(lambda l: p.NPO(beta=1e-6).loss(pair_of(0.0, l))[0])(-3.0)  # noqa: E741
    assert float(slope) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: p.EXO(label_smoothing=0), "label_smoothing"),
        (lambda: p.RobustDPO(label_smoothing=0.5), "label_smoothing"),
        (lambda: r.SimPO(beta=0.5), "beta"),
        (lambda: r.ORPO(lam=0.1), "lam"),  # type: ignore[call-arg]
        (lambda: p.DPO(beta=0), "beta"),
    ],
)
def test_settings_that_cannot_work(make: Any, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        make()


def test_log1mexp() -> None:
    x = np.array([-1e-6, -1e-3, -0.1, -0.69, -0.7, -5.0, -80.0])
    want = np.log(-np.expm1(x))
    np.testing.assert_allclose(log1mexp(jnp.asarray(x)), want, rtol=1e-5, atol=1e-30)
    assert np.isfinite(jax.vmap(jax.grad(log1mexp))(jnp.asarray(x))).all()


T = 6


def scores(rows: int, seed: int = 0) -> Scores:
    """Scores [rows, 2, T]; every answer has targets from column 2 on, of several lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(-1, 0.5, (rows, 2, T)).astype(np.float32))  # noqa: E731
    ends = rng.integers(3, T + 1, (rows, 2, 1))
    mask = (np.arange(T) >= 2) & (np.arange(T) < ends)
    clean = lambda x: jnp.where(mask, x, 0)  # noqa: E731
    correct = jnp.asarray(rng.integers(0, 2, (rows, 2, T)).astype(np.float32))
    fields = [clean(x) for x in (draw(), -draw(), draw(), correct, -draw())]
    return Scores(*fields, mask=jnp.asarray(mask), collision=clean(draw()), ref=clean(draw()))


def batch_for(s: Scores) -> Batch:
    rows = s.mask.shape[0]
    ints = jnp.ones(s.mask.shape, jnp.int32)
    aux = {"margin": jnp.full((rows,), 0.5), "tokens_per_group": jnp.full((rows,), 3.0)}
    return Batch(ints, s.mask, ints, ints, aux)


@pytest.mark.parametrize("name", [*OBJECTIVES, *BY_TOKEN])
def test_padding_weighs_nothing_and_halves_add_up(name: str) -> None:
    objective, whole = (OBJECTIVES | BY_TOKEN)[name], scores(6)
    total, count, metrics = objective(whole, batch_for(whole))
    assert count == 6
    parts = [jax.tree.map(lambda x, a=a: x[a : a + 3], whole) for a in (0, 3)]
    sums = [objective(part, batch_for(part)) for part in parts]
    np.testing.assert_allclose(sums[0][0] + sums[1][0], total, rtol=1e-5)
    for key, (value, weight) in metrics.items():
        np.testing.assert_allclose(sums[0][2][key][0] + sums[1][2][key][0], value, rtol=1e-4, atol=1e-5)
        assert sums[0][2][key][1] + sums[1][2][key][1] == weight > 0
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), whole)
    padded_batch = batch_for(padded)
    again = objective(padded, padded_batch)
    np.testing.assert_allclose(again[0], total, rtol=1e-6)
    assert again[1] == 6

    def loss(logp: jax.Array) -> jax.Array:
        return objective(replace(padded, logp=logp), padded_batch)[0]

    slope = np.asarray(jax.grad(loss)(padded.logp))
    assert np.isfinite(slope).all()
    assert not slope[~np.asarray(padded.mask)].any()
    assert slope[np.asarray(padded.mask)].any()


def test_metrics_have_trl_s_names_and_values() -> None:
    s = scores(4)
    _, _, metrics = over_pairs(p.DPO(beta=0.5), s, batch_for(s))
    logp, ref = (np.asarray(x).sum(-1) for x in (s.logp, s.ref))
    reward = 0.5 * (logp - ref)
    mean = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert mean["rewards/chosen"] == pytest.approx(reward[:, 0].mean(), rel=1e-5)
    assert mean["rewards/rejected"] == pytest.approx(reward[:, 1].mean(), rel=1e-5)
    assert mean["rewards/margins"] == pytest.approx((reward[:, 0] - reward[:, 1]).mean(), rel=1e-5)
    assert mean["rewards/accuracies"] == (reward[:, 0] > reward[:, 1]).mean()
    assert mean["logps/chosen"] == pytest.approx(logp[:, 0].mean(), rel=1e-5)
    assert mean["len/rejected"] == np.asarray(s.mask)[:, 1].sum(-1).mean()
    first = np.asarray(s.mask)[:, 0]
    assert mean["entropy"] == pytest.approx(np.asarray(s.entropy)[:, 0][first].mean(), rel=1e-5)
    assert mean["mean_token_accuracy"] == pytest.approx(np.asarray(s.correct)[:, 0][first].mean(), rel=1e-5)
