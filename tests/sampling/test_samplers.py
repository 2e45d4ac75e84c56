"""Filters and draws against their definitions, computed the slow way in numpy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.sampling.samplers import Features, Settings, draw, keep, penalise, sample
from jaxalign.types import SamplingParams

V = 50


def rows(*params: SamplingParams) -> Settings:
    return jax.tree.map(jnp.asarray, Settings.of([(p, 0) for p in params]))


def kept_by_definition(z: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Indices that top-k, then top-p on what is left, then min-p keep; no two logits are equal."""
    order = np.argsort(-z, kind="stable")
    order = order[: p.top_k] if p.top_k else order
    weight = np.exp(z[order].astype(np.float64) - z.max())
    weight /= weight.sum()
    if p.top_p < 1:
        before = np.cumsum(weight) - weight
        order = order[before < p.top_p]
    likely = np.exp(z[order] - z.max()) >= p.min_p
    return np.sort(order[likely])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, V + 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_filters_keep_what_their_definition_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    z = np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)
    p = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.flatnonzero(np.asarray(jax.jit(keep)(z[None], rows(p))[0]) > -1e29)
    assert kept.tolist() == kept_by_definition(z, p).tolist()


def test_ties_with_the_last_kept_token_are_kept() -> None:
    z = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    assert (keep(z, rows(SamplingParams(top_k=2)))[0] > -1e29).tolist() == [True, True, True, False]


def test_rows_do_not_affect_each_other() -> None:
    z = np.random.default_rng(0).normal(0, 2, (3, V)).astype(np.float32)
    params = [SamplingParams(top_k=5), SamplingParams(), SamplingParams(top_p=0.5)]
    together = keep(jnp.asarray(z), rows(*params))
    for i, p in enumerate(params):
        assert np.array_equal(together[i], keep(jnp.asarray(z[i : i + 1]), rows(p))[0])
    assert (together[1] > -1e29).all()


def test_draws_follow_the_distribution_and_say_its_log_probability() -> None:
    z = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
    count = 20000
    many = jnp.broadcast_to(z, (count, V))
    p = Settings.of([(SamplingParams(seed=7), 0)] * count)
    token, logp = jax.jit(draw)(many, jax.tree.map(jnp.asarray, p), jnp.arange(count))
    expected = np.asarray(jax.nn.softmax(z), np.float64)
    np.testing.assert_allclose(logp, np.log(expected)[token], atol=1e-5)
    seen = np.bincount(token, minlength=V)
    chi_square = ((seen - count * expected) ** 2 / (count * expected)).sum()
    assert chi_square < 95  # the 0.9999 quantile with 49 degrees of freedom
    assert chi_square > 10  # and not better than chance allows


def test_only_tokens_of_positive_probability_are_drawn() -> None:
    z = np.full((4000, V), -1e30, np.float32)
    z[:, [3, 49]] = 0.0
    p = jax.tree.map(jnp.asarray, Settings.of([(SamplingParams(seed=1), 0)] * 4000))
    token, _ = draw(jnp.asarray(z), p, jnp.arange(4000))
    assert set(np.unique(token)) == {3, 49}


def test_a_draw_depends_on_seed_sample_and_token_index_alone() -> None:
    z = jnp.zeros((1, V))
    at = lambda seed, number, index: int(  # noqa: E731
        draw(
            z,
            jax.tree.map(jnp.asarray, Settings.of([(SamplingParams(seed=seed), number)])),
            jnp.array([index]),
        )[0][0]
    )
    assert at(1, 2, 3) == at(1, 2, 3)
    assert len({at(s, n, i) for s in range(4) for n in range(4) for i in range(4)}) > 25


def test_repetition_penalty() -> None:
    z = np.array([[2.0, -2.0, 3.0, -1.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    assert penalise(z, seen, np.array([2.0]))[0].tolist() == [1.0, -4.0, 3.0, -1.0]


def test_log_probabilities_of_a_sample() -> None:
    """logp is the model's, sample_logp that of the distribution drawn from; greedy rows take the maximum."""
    z = jnp.asarray(np.random.default_rng(2).normal(0, 2, (3, V)).astype(np.float32))
    seen = jnp.zeros((3, V), bool).at[2, int(z[2].argmax())].set(True)
    params = [
        SamplingParams(temperature=0.5, top_k=4, seed=3),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=50.0),
    ]
    features = Features.of(params)
    assert features == Features(draws=True, filters=True, penalty=True)
    token, logp, sample_logp = sample(z, seen, rows(*params), jnp.zeros(3, jnp.int32), features)
    np.testing.assert_allclose(logp, jax.nn.log_softmax(z)[jnp.arange(3), token], atol=1e-5)
    top = jax.lax.top_k(z[0] / 0.5, 4)
    place = top[1].tolist().index(int(token[0]))
    np.testing.assert_allclose(sample_logp, [jax.nn.log_softmax(top[0])[place], 0.0, 0.0], atol=1e-5)
    assert token[1] == z[1].argmax()
    assert token[2] != z[2].argmax()


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (SamplingParams(temperature=0, top_k=3), Features(False, False, False)),
        (SamplingParams(), Features(True, False, False)),
        (SamplingParams(min_p=0.1), Features(True, True, False)),
        (SamplingParams(temperature=0, repetition_penalty=1.1), Features(False, False, True)),
    ],
)
def test_only_what_is_asked_for_is_compiled(params: SamplingParams, wanted: Features) -> None:
    assert Features.of([params]) == wanted


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    z = jnp.array([[0.0, 5.0, 5.0, 1.0]])
    run = partial(sample, features=Features(False, False, False))
    empty: Any = jnp.zeros((1, 0), bool)
    assert run(z, empty, rows(SamplingParams(temperature=0)), jnp.zeros(1, jnp.int32))[0].tolist() == [1]
