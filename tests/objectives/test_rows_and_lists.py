"""Losses over labelled answers, over lists, and over sorted batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import listwise, transport, unpaired
from jaxalign.objectives.answers import Answers, Pair
from jaxalign.objectives.base import Scores
from jaxalign.objectives.pairwise import DPO, EXO
from jaxalign.types import Batch
from tests.objectives.test_pairs import fixture_pair, published, scores  # noqa: F401

RATIO = jnp.array([1.0, -0.5, -1.0, 0.5])
LABEL = jnp.array([True, True, False, False])
ROWS = {
    "kto": (unpaired.KTO(undesirable_weight=1.5), 2),
    "apo_zero_unpaired": (unpaired.APOZeroUnpaired(), 1),
    "bco": (unpaired.BCO(), 1),
    "bco pooled": (unpaired.BCO(shift="pooled"), 1),
}
LISTS = {
    "lipo": listwise.LiPO(),
    "pro": listwise.PRO(),
    "rrhf": listwise.RRHF(),
    "listmle": listwise.ListMLE(),
    "exo_list": listwise.EXOList(),
}


def test_kto(published: dict[str, Any]) -> None:  # noqa: F811
    v, kto = published["kto"]["expected"], unpaired.KTO(undesirable_weight=1.5)
    np.testing.assert_allclose(kto.loss(RATIO, LABEL, 0.25), v["per_example"], rtol=1e-5)
    shifted = kto.loss(RATIO + 3, LABEL, 3.25)
    np.testing.assert_allclose(shifted, v["per_example"], rtol=1e-5)


def test_kto_from_token_scores(published: dict[str, Any]) -> None:  # noqa: F811
    """Its z is the mean over the mismatched answers, at least 0, and passes no gradient on."""
    v = published["kto"]
    tokens = jnp.stack([RATIO, jnp.asarray(v["inputs"]["mismatched_logratio"])], axis=1)[..., None]
    ones = jnp.ones_like(tokens, bool)
    batch = Batch(ones, ones, ones, ones, {"label": LABEL})
    zeros = jnp.zeros_like(tokens)

    def loss(logp: jax.Array) -> Any:
        s = Scores(logp, zeros, zeros, zeros, zeros, ones, ref=zeros)
        return unpaired.KTO(undesirable_weight=1.5)(s, batch)

    total, count, metrics = loss(tokens)
    np.testing.assert_allclose(total / count, v["expected"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["kl"][0] / metrics["kl"][1], v["expected"]["z0_from_mismatched"], rtol=1e-5
    )
    slope = jax.grad(lambda x: loss(x)[0])(tokens)
    assert slope[:, 0].all()
    assert not slope[:, 1].any()
    flipped = tokens.at[:, 1].multiply(-1)
    assert loss(flipped)[2]["kl"][0] == 0
    want = 1.5 * unpaired.APOZeroUnpaired().loss(RATIO, LABEL)[2:].sum()
    np.testing.assert_allclose(
        loss(flipped)[0], unpaired.KTO().loss(RATIO, LABEL, 0.0)[:2].sum() + want, rtol=1e-5
    )


def test_other_labelled_losses(published: dict[str, Any]) -> None:  # noqa: F811
    want = published["apo_zero_unpaired"]["expected"]["per_example"]
    np.testing.assert_allclose(unpaired.APOZeroUnpaired().loss(RATIO, LABEL), want, rtol=1e-5)
    v = published["bco_unpaired"]
    ratio, label = jnp.asarray(v["inputs"]["logratio"]), jnp.asarray(v["inputs"]["desirable"]) > 0
    for shift, name in (("pooled", "trl_pooled_delta"), ("classes", "paper_half_sum_delta")):
        mean = unpaired.SHIFTS[shift](0.1 * ratio, label, jnp.ones(4, bool))
        np.testing.assert_allclose(mean, v["expected"][name]["delta"], rtol=1e-5)
        got = unpaired.BCO().loss(ratio, label, mean)
        np.testing.assert_allclose(got, v["expected"][name]["per_example"], rtol=1e-5)


def rewarded(rewards: list[float], past: Any) -> tuple[Scores, Batch]:
    """Rows [B, 1, 1] whose answers have these rewards at beta 0.1."""
    ratio = 10 * jnp.asarray(rewards)[:, None, None]
    zeros, ones = jnp.zeros_like(ratio), jnp.ones(ratio.shape, bool)
    label = jnp.arange(len(rewards)) != len(rewards) - 1
    batch = Batch(ones, ones, ones, ones, {"label": label, "past": past})
    return Scores(ratio, zeros, zeros, zeros, zeros, ones, ref=zeros), batch


def test_a_running_shift_is_over_all_rows_so_far(published: dict[str, Any]) -> None:  # noqa: F811
    v, bco, past = published["running_moments"], unpaired.BCO(shift="running"), (jnp.zeros(()),) * 2
    for number in ("1", "2"):
        rewards = v["inputs"][f"batch{number}"]
        total, _, metrics = bco(*rewarded(rewards, (*past, 1.0)))
        want = v["expected"][f"mean_after_batch{number}"]
        past = metrics["running_mean"]
        np.testing.assert_allclose(past[0] / past[1], want, rtol=1e-6)
        label = jnp.arange(len(rewards)) != len(rewards) - 1
        np.testing.assert_allclose(
            total, bco.loss(10 * jnp.asarray(rewards), label, jnp.float32(want)).sum(), rtol=1e-5
        )
    evaluated = bco(*rewarded([5.0, 7.0], (*past, 0.0)))[2]["running_mean"]
    np.testing.assert_allclose(evaluated, past)


def test_udm_weighs_the_rows() -> None:
    s, batch = grouped(4, 1)
    plain = unpaired.BCO()(s, batch)
    batch.aux["weight"] = jnp.array([1.0, 3.0, 1.0, 3.0])
    total, count, _ = unpaired.BCO(udm=True)(s, batch)
    label = batch.aux["label"]
    reward = 0.1 * jnp.where(s.mask, s.logp - s.ref, 0.0).sum((1, 2))
    loss = unpaired.BCO().loss(
        10 * reward, label, unpaired.SHIFTS["classes"](reward, label, s.mask.any((1, 2)))
    )
    np.testing.assert_allclose(plain[0], loss.sum(), rtol=1e-5)
    np.testing.assert_allclose(total, (loss * batch.aux["weight"]).sum(), rtol=1e-5)
    assert count == plain[1] == 4


def test_lists(published: dict[str, Any]) -> None:  # noqa: F811
    here = jnp.ones((1, 3), bool)
    row = lambda x: jnp.asarray([x])  # noqa: E731
    v = published["lipo_lambda"]
    got = listwise.LiPO().loss(row(v["inputs"]["score"]), row(v["inputs"]["label"]), here)
    np.testing.assert_allclose(got, v["expected"]["loss"], rtol=1e-5)
    v = published["pro"]
    average, reward = row(v["inputs"]["mean_logp_best_first"]), row(v["inputs"]["reward_best_first"])
    got = listwise.PRO().ranking(average, reward, here)
    np.testing.assert_allclose(got, v["expected"]["rank_loss"], rtol=1e-5)
    np.testing.assert_allclose(
        got + 0.05 * 4 * v["inputs"]["best_sum_nll"], v["expected"]["total"], rtol=1e-5
    )
    v = published["rrhf"]
    got = listwise.RRHF().ranking(row(v["inputs"]["len_norm_logp"]), row(v["inputs"]["reward"]), here)
    np.testing.assert_allclose(got, v["expected"]["rank_loss"], rtol=1e-5)


def test_lists_as_distributions(published: dict[str, Any]) -> None:  # noqa: F811
    # A fourth member is padding.
    row, here = lambda x: jnp.asarray([[*x, np.nan]]), jnp.array([[True, True, True, False]])
    v = published["exo_rw_k3"]
    for divergence, name in (("reverse", "loss"), ("forward", "forward_kl_dpo_rw")):
        exo = listwise.EXOList(beta=0.5, score_temperature=0.5, divergence=divergence)  # type: ignore[arg-type]
        got = exo.loss(row(v["inputs"]["logratio"]), row(v["inputs"]["reward"]), here)
        np.testing.assert_allclose(got, [v["expected"][name]], rtol=1e-5)
    v = published["lipo_listmle"]
    got = listwise.ListMLE().loss(row(v["inputs"]["score_sorted_by_label"]), here)
    np.testing.assert_allclose(got, [v["expected"]["loss"]], rtol=1e-5)


def test_two_answers_as_a_list_are_a_pair() -> None:
    ratio, both, e = jnp.array([[1.5, -0.5]]), jnp.ones((1, 2), bool), 0.02
    zero, one = jnp.zeros(1), jnp.ones(1)
    pair = Pair(Answers(ratio[:, 0], zero, one), Answers(ratio[:, 1], zero, one))
    np.testing.assert_allclose(listwise.ListMLE().loss(0.1 * ratio, both), DPO().loss(pair), rtol=1e-5)
    score = jnp.array([[0.5 * np.log((1 - e) / e), 0.0]])
    got = listwise.EXOList(beta=0.3, score_temperature=0.5).loss(ratio, score, both)
    np.testing.assert_allclose(got, EXO(beta=0.3, label_smoothing=e).loss(pair), rtol=1e-5)


def test_apo_zero_is_kto_without_a_shift() -> None:
    want = unpaired.KTO().loss(RATIO, LABEL, 0.0)
    np.testing.assert_allclose(unpaired.APOZeroUnpaired().loss(RATIO, LABEL), want, rtol=1e-6)


def test_two_answers_under_lipo_are_dpo_with_a_weight() -> None:
    score, label = jnp.array([[0.3, -0.2]]), jnp.array([[1.0, 0.0]])
    weight = abs(1 / np.log(2) - 1 / np.log(3))
    want = -weight * jax.nn.log_sigmoid(0.5)
    got = listwise.LiPO().loss(score, label, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ("wins", [[1, 0.5, 0], [0.75, 0.75, 0], [1, 0, 0]]),
        ("minmax", [[1, 2 / 3, 0], [1, 1, 0], [1, 0, 0]]),
    ],
)
def test_scores_of_any_scale_become_labels(labels: Any, want: list[list[float]]) -> None:
    """Ranks as OASST gives them, ties, and a list of two."""
    scores = jnp.array([[0.0, -1.0, -3.0], [7.0, 7.0, 2.0], [90.0, 10.0, jnp.nan]])
    present = jnp.array([[True] * 3, [True] * 3, [True, True, False]])
    given = jnp.where(present, scores, 0.0)
    got = listwise.LABELS[labels](given, present)
    np.testing.assert_allclose(jnp.where(present, got, 0.0), want, rtol=1e-6)
    s, batch = grouped(3, 3)
    s = jax.tree.map(lambda x: jnp.where(present[..., None], x, jnp.zeros_like(x)), s)
    batch.aux["scores"] = scores
    objective = listwise.LiPO(labels=labels)
    ratio = jnp.where(s.mask, s.logp - s.ref, 0.0).sum(-1)
    total = objective(s, batch)[0]
    here = s.mask.any(-1)
    np.testing.assert_allclose(
        total,
        objective.loss(objective.beta * ratio, listwise.LABELS[labels](given, here), here).sum(),
        rtol=1e-5,
    )
    assert total > 0


def test_scores_that_are_taken_as_they_are_lie_in_0_to_1() -> None:
    plain = listwise.LiPO(labels="scores")
    assert plain.fault({"scores": np.array([1.0, 0.0], np.float32)}) is None
    assert "outside 0 to 1" in str(plain.fault({"scores": np.array([-1.0, 0.5], np.float32)}))
    assert listwise.LiPO().fault({"scores": np.array([-1.0, 0.5], np.float32)}) is None


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_batches(published: dict[str, Any], name: str) -> None:  # noqa: F811
    objective = {"aot": transport.AOT(), "aot_unpaired": transport.AOTUnpaired()}[name]
    got = objective.loss(fixture_pair([]), jnp.ones(2, bool))
    np.testing.assert_allclose(got, published[name]["expected"]["per_example"], rtol=1e-5)
    # The order of the pairs means nothing; a single one is DPO's.
    s = scores(5)
    batch = Batch(s.mask, s.mask, s.mask, s.mask)
    turned = jax.tree.map(lambda x: x[::-1], s)
    np.testing.assert_allclose(objective(turned, batch)[0], objective(s, batch)[0], rtol=1e-5)
    one = jax.tree.map(lambda x: x[:1], s)
    single = jax.tree.map(lambda x: x[:1], batch)
    np.testing.assert_allclose(objective(one, single)[0], DPO()(one, single)[0], rtol=1e-5)
    padded = jax.tree.map(lambda x: jnp.concatenate([x[:2], jnp.zeros_like(x[:2]), x[2:]]), s)
    total, count, _ = objective(padded, jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), batch))
    np.testing.assert_allclose(total, objective(s, batch)[0], rtol=1e-5)
    assert count == 5


T = 5


def grouped(rows: int, group: int, empty: int = 0) -> tuple[Scores, Batch]:
    """Scores [rows + empty, group, T]; the last member of the first row, and the last rows, are padding."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(1, T + 1, (rows + empty, group, 1))
    mask[rows:] = False
    if group > 2:
        mask[0, -1] = False
    draw = lambda: jnp.where(mask, rng.normal(-1, 0.5, mask.shape).astype(np.float32), 0.0)  # noqa: E731
    s = Scores(draw(), draw(), draw(), draw(), draw(), jnp.asarray(mask), ref=draw())
    label = jnp.arange(rows + empty) % 2 == 0
    labels = np.sort(rng.random((rows + empty, group)).astype(np.float32), axis=1)[:, ::-1]
    labels = np.where(mask.any(-1), labels, np.nan)
    return s, Batch(mask, mask, mask, mask, {"label": label, "scores": jnp.asarray(labels)})


@pytest.mark.parametrize("name", [*ROWS, *LISTS])
def test_padding_weighs_nothing_and_gradients_are_finite(name: str) -> None:
    objective, group = ROWS[name] if name in ROWS else (LISTS[name], 4)
    whole = objective(*grouped(6, group))
    padded_scores, padded_batch = grouped(6, group, empty=2)
    first = jax.tree.map(lambda x: x[:6], (padded_scores, padded_batch))
    total, count, _ = objective(padded_scores, padded_batch)
    assert whole[1] == count == 6
    np.testing.assert_allclose(total, objective(*first)[0], rtol=1e-5)

    def loss(logp: jax.Array) -> jax.Array:
        s = padded_scores
        return objective(
            Scores(logp, s.logsumexp, s.mean_logit, s.correct, s.entropy, s.mask, ref=s.ref), padded_batch
        )[0]

    slope = np.asarray(jax.grad(loss)(padded_scores.logp))
    assert np.isfinite(slope).all()
    assert slope[np.asarray(padded_scores.mask)].any()
    assert not slope[6:].any()


def test_one_class_only_is_finite() -> None:
    s, batch = grouped(4, 2)
    batch.aux["label"] = jnp.ones(4, bool)
    for objective in (unpaired.KTO(), unpaired.BCO(), unpaired.APOZeroUnpaired()):
        total, count, metrics = objective(s, batch)
        assert np.isfinite(total)
        assert count == 4
        assert metrics["rewards/rejected"][1] == 0
