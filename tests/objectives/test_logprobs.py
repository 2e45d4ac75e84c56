"""Chunked scores against the plain log-softmax over all logits in float64, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxalign.objectives.base import Scores
from jaxalign.objectives.logprobs import Head, prompt_vectors, token_scores
from jaxalign.types import Batch
from tests.objectives import vectors as golden
from tests.tiny import lay_out, quick_jit

T, D, V = 11, 8, 13
FIELDS = ("logp", "logsumexp", "mean_logit", "correct", "entropy", "collision")
FROZEN, TRAINED, ROWS = Head(chunk=4), Head(chunk=4, trained=True), Head(chunk=7, compact=False, softcap=2.0)
CASES = {
    "frozen": FROZEN,
    "frozen, one at a time": Head(chunk=1),
    "frozen, all at once": Head(chunk=512, compact=False),
    "frozen, rows": ROWS,
    "frozen, softcap": Head(chunk=5, softcap=1.5),
    "trained": TRAINED,
    "trained, softcap": Head(chunk=3, trained=True, softcap=1.5),
    "trained, smooth, rows": Head(chunk=9, trained=True, compact=False, smooth=True),
    "smooth": Head(chunk=4, smooth=True),
    "trained, smooth, softcap": Head(chunk=6, smooth=True, softcap=2.5, trained=True),
    "collision": Head(chunk=4, collision=True),
    "collision, rows, softcap": Head(chunk=7, collision=True, compact=False, softcap=2.0),
    "trained, collision": Head(chunk=4, trained=True, collision=True, softcap=1.5),
}


def free(x: jax.Array, *axes: str | None) -> jax.Array:
    return x


def pair(rng: np.random.Generator, length: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, V, length).astype(np.int32), np.arange(length) >= prompt


@pytest.fixture
def batch() -> Batch:
    """A full row, a packed one whose second example is trained from its first token on, one without targets,
    one empty."""
    rng = np.random.default_rng(0)
    rows = [[pair(rng, T, 1)], [pair(rng, 4, 1), pair(rng, 5, 0)], [pair(rng, 7, 7)], []]
    return lay_out(rows, T)


@pytest.fixture
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [4, T, D] and the head [V, D]."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((4, T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32)


def weights(batch: Batch) -> list[np.ndarray]:
    """What the gradient tests multiply log-prob, logsumexp and mean logit of each token with."""
    size = batch.tokens.size
    return [np.sin(np.arange(size) + i).reshape(batch.tokens.shape) for i in range(3)]


@cache
def compiled(head: Head) -> Any:
    """run(hidden, kernel, batch) -> (scores, gradients of their weighted sum in hidden and kernel)."""

    def run(hidden: jax.Array, kernel: jax.Array, batch: Batch) -> Any:
        def loss(h: jax.Array, k: jax.Array) -> Any:
            scores = token_scores(h, k, batch, head, free)
            parts = (scores.logp, scores.logsumexp, scores.mean_logit)[: 3 if head.smooth else 2]
            return sum((w * s).sum() for w, s in zip(weights(batch), parts, strict=False)), scores

        grads, scores = jax.grad(loss, (0, 1), has_aux=True)(hidden, kernel)
        return scores, grads

    return quick_jit(run)


def dense(hidden: np.ndarray, kernel: np.ndarray, batch: Batch, head: Head) -> tuple[dict[str, Any], Any]:
    """Every score by its definition, from all logits in float64, and the gradients of their weighted sum."""
    h, k = hidden.astype(np.float64).reshape(*batch.tokens.shape, -1)[:, :, :-1], kernel.astype(np.float64)
    raw = h @ k.T
    cap = head.softcap
    z = cap * np.tanh(raw / cap) if cap else raw
    segments = batch.segments
    mask = batch.mask[:, :, 1:] & (segments[:, :, 1:] == segments[:, :, :-1]) & (segments[:, :, 1:] > 0)
    one_hot = np.eye(V)[batch.tokens[:, :, 1:]]
    lse = np.log(np.exp(z).sum(-1))
    p = np.exp(z - lse[..., None])
    scores = {
        "logp": (one_hot * z).sum(-1) - lse,
        "logsumexp": lse,
        "mean_logit": z.mean(-1),
        "correct": (z.argmax(-1) == batch.tokens[:, :, 1:]).astype(float),
        "entropy": -(p * np.log(p)).sum(-1),
        "collision": np.log((p**2).sum(-1)),
    }
    w = [x[:, :, 1:, None] * mask[..., None] for x in weights(batch)]
    dz = w[0] * (one_hot - p) + w[1] * p + (w[2] / V if head.smooth else 0)
    dz = dz * (1 - (z / cap) ** 2) if cap else dz
    dh = np.pad(dz @ k, ((0, 0), (0, 0), (0, 1), (0, 0))).reshape(hidden.shape)
    dk = np.einsum("bgtv,bgtd->vd", dz, h)
    shift = lambda x: np.pad(x * mask, ((0, 0), (0, 0), (1, 0)))  # noqa: E731
    return {name: shift(x) for name, x in scores.items()} | {"mask": shift(mask)}, (dh, dk)


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_are_those_of_the_dense_path(batch: Batch, inputs: Any, case: str) -> None:
    head = CASES[case]
    want, want_grads = dense(*inputs, batch, head)
    got, grads = compiled(head)(*inputs, batch)
    assert np.array_equal(got.mask, want["mask"])
    assert got.mask.sum() == 10 + 3 + 4
    assert (got.collision is None) == (not head.collision)
    for name in FIELDS if head.collision else FIELDS[:-1]:
        if name != "mean_logit" or head.smooth:
            np.testing.assert_allclose(getattr(got, name), want[name], atol=1e-5, rtol=1e-5, err_msg=name)
        assert getattr(got, name).dtype == jnp.float32
    np.testing.assert_allclose(grads[0], want_grads[0], atol=1e-5, rtol=1e-5)
    kernel = want_grads[1] if head.trained or head.smooth else np.zeros_like(want_grads[1])
    np.testing.assert_allclose(grads[1], kernel, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [Head(chunk=4, collision=True), Head(chunk=4, collision=True, trained=True)])
def test_the_collision_passes_no_gradient_on(batch: Batch, inputs: Any, head: Head) -> None:
    total = lambda h, k: token_scores(h, k, batch, head, free).collision.sum()  # noqa: E731
    value, grads = quick_jit(jax.value_and_grad(total, (0, 1)))(*inputs)
    assert value < 0
    assert not any(np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("head", [replace(FROZEN, rivals=3), replace(ROWS, rivals=3, softcap=None)])
def test_rivals_are_the_likeliest_tokens_but_the_target(batch: Batch, inputs: Any, head: Head) -> None:
    """Values and gradients of the sorted log-softmax without the target, over all logits."""

    def dense_rivals(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(hidden[:, :-1] @ kernel.T).reshape(*batch.tokens.shape[:2], T - 1, V)
        others = jnp.where(jax.nn.one_hot(batch.tokens[:, :, 1:], V, dtype=bool), -jnp.inf, logs)
        return jnp.pad(jnp.sort(others, axis=-1)[..., :-4:-1], ((0, 0), (0, 0), (1, 0), (0, 0)))

    mask = token_scores(*inputs, batch, head, free).mask[..., None]
    factor = np.where(mask, np.cos(np.arange(mask.size * 3)).reshape(*mask.shape[:-1], 3), 0.0)
    loss = lambda h, k: (factor * token_scores(h, k, batch, head, free).rivals).sum()  # noqa: E731
    want = lambda h, k: (factor * dense_rivals(h, k)).sum()  # noqa: E731
    got = token_scores(*inputs, batch, head, free).rivals
    np.testing.assert_allclose(got, np.where(mask, dense_rivals(*inputs), 0.0), atol=1e-5)
    for a, b in zip(jax.grad(loss, (0, 1))(*inputs), jax.grad(want, (0, 1))(*inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_prompt_vectors(batch: Batch, inputs: Any) -> None:
    """The mean of the head's rows of what stands before the first target; nothing without a target."""
    kernel = inputs[1]
    got = prompt_vectors(kernel, batch)
    want = [kernel[batch.tokens[0, 0, :1]].mean(0), kernel[batch.tokens[1, 0, :1]].mean(0)]
    np.testing.assert_allclose(got[:2], want, rtol=1e-6)
    assert not np.asarray(got[2:]).any()
    long = replace(batch, mask=batch.mask & (np.arange(T) >= 3))
    want = kernel[batch.tokens[0, 0, :3]].mean(0)
    np.testing.assert_allclose(prompt_vectors(kernel, long)[0], want, rtol=1e-6)
    assert not np.asarray(jax.grad(lambda k: prompt_vectors(k, batch).sum())(kernel)).any()


def test_chunks_are_counted_in_tokens_of_a_device() -> None:
    """Four rows that lie on two devices: two rows a device, so 4 tokens are 2 columns."""
    spread = Head(chunk=4, compact=False, spread=2)
    seen: list[tuple[int, ...]] = []

    def watch(z: Any) -> None:
        seen.extend(v.aval.shape for e in z.eqns for v in e.outvars if V in v.aval.shape)
        for eqn in z.eqns:
            for inner in jaxprs_in_params(eqn.params):
                watch(inner)

    batch = lay_out([[pair(np.random.default_rng(0), T, 1)]] * 4, T)
    hidden, kernel = np.zeros((4, T, D), np.float32), np.zeros((V, D), np.float32)
    watch(jax.make_jaxpr(lambda h, k: token_scores(h, k, batch, spread, free))(hidden, kernel).jaxpr)
    assert max(np.prod(s) for s in seen) == 4 * 2 * V


def test_a_group_is_scored_like_rows(batch: Batch, inputs: Any) -> None:
    grouped = jax.tree.map(lambda x: x.reshape(2, 2, T), batch)
    a, b = compiled(FROZEN)(*inputs, batch)[0], compiled(FROZEN)(*inputs, grouped)[0]
    assert b.logp.shape == (2, 2, T)
    assert np.array_equal(a.logp.reshape(-1), b.logp.reshape(-1))


@pytest.mark.parametrize("head", [FROZEN, TRAINED, ROWS])
def test_without_any_target_all_scores_and_gradients_are_zero(batch: Batch, inputs: Any, head: Head) -> None:
    empty = replace(batch, mask=np.zeros_like(batch.mask))
    for leaf in jax.tree.leaves(compiled(head)(*inputs, empty)):
        assert not np.asarray(leaf).any()


@pytest.mark.parametrize("head", [FROZEN, TRAINED, ROWS])
def test_only_targets_reach_the_scores(batch: Batch, inputs: Any, head: Head) -> None:
    """Hidden states that predict no target, and the ids of untrained tokens, may be anything."""
    hidden, kernel = inputs
    scores, grads = compiled(head)(hidden, kernel, batch)
    predicts = np.roll(np.asarray(scores.mask), -1, axis=-1).reshape(-1, T)
    other = np.where(predicts[..., None], hidden, 1e3 * hidden[::-1])
    changed = replace(batch, tokens=np.where(scores.mask, batch.tokens, (batch.tokens + 5) % V))
    scores_2, grads_2 = compiled(head)(other, kernel, changed)
    jax.tree.map(np.testing.assert_array_equal, (scores, grads[0]), (scores_2, grads_2[0]))
    assert not np.asarray(grads[0])[~predicts].any()
    # ... while a target's own id does change its score
    moved = compiled(head)(hidden, kernel, replace(batch, tokens=(batch.tokens + 1) % V))[0]
    assert (np.asarray(moved.logp != scores.logp) == np.asarray(scores.mask)).all()


@pytest.mark.parametrize("head", [FROZEN, TRAINED])
def test_extreme_logits_stay_finite(batch: Batch, inputs: Any, head: Head) -> None:
    """Logits of +-1e4: log-probs of -2e4 and 0, finite gradients, nothing clipped."""
    hidden, kernel = inputs
    hidden[..., 0], kernel[:] = 1.0, 0.0
    kernel[:2, 0] = 1e4, -1e4
    extreme = replace(batch, tokens=np.broadcast_to(np.arange(T) % 2, batch.tokens.shape).astype(np.int32))
    scores, grads = compiled(head)(hidden, kernel, extreme)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((scores, grads)))
    assert set(np.unique(scores.logp)) == {0.0, -2e4}


# --- golden numbers ---------------------------------------------------------------------------------------


def golden_scores(temperature: float, head: Head) -> Scores:
    row = lambda x: jnp.asarray(x)[None, None]  # noqa: E731
    ones = jnp.ones((1, 1, 5), jnp.int32)
    batch = Batch(row(golden.TOKENS), row(golden.MASK), ones, jnp.arange(5)[None, None])
    hidden = jnp.asarray(golden.LOGITS)[None] / temperature
    return quick_jit(lambda h: token_scores(h, jnp.eye(4), batch, head, free))(hidden)


@pytest.mark.parametrize("head", [Head(chunk=2), Head(chunk=2, trained=True)])
def test_vector_token_logps(head: Head) -> None:
    scores = golden_scores(1.0, head)
    np.testing.assert_allclose(scores.logp[0, 0], golden.TOKEN_LOGPS, rtol=1e-5)
    np.testing.assert_allclose(scores.logp.sum(), golden.TOKEN_LOGPS_SUM, rtol=1e-5)
    np.testing.assert_allclose(scores.entropy.sum() / 3, golden.ENTROPY_MEAN, rtol=1e-5)
    np.testing.assert_allclose(1e-4 * (scores.logsumexp**2).sum() / 3, golden.Z_LOSS_MEAN, rtol=1e-5)
    assert scores.mask[0, 0].tolist() == [False, False, True, True, True]
    assert scores.correct[0, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_vector_token_logps_at_a_temperature() -> None:
    np.testing.assert_allclose(golden_scores(0.7, Head(chunk=2)).logp[0, 0], golden.COLD_LOGPS, rtol=1e-5)


def test_vector_packing_masks() -> None:
    """The first token of a segment is never a target, though the mask says so; nor is padding."""
    row = lambda x: jnp.asarray(x)[None, None]  # noqa: E731
    mask = jnp.ones((1, 1, 6), bool)
    batch = Batch(row([7, 8, 9, 4, 5, 0]), mask, row(golden.SEGMENTS), row(golden.POSITIONS))
    ones = jnp.ones((1, 6, D)), jnp.ones((V, D))
    scores = quick_jit(lambda h, k: token_scores(h, k, batch, Head(), free))(*ones)
    assert scores.mask[0, 0].astype(int).tolist() == golden.TARGETS
    assert (np.asarray(scores.logp[0, 0]) != 0).astype(int).tolist() == golden.TARGETS


# --- bfloat16 ---------------------------------------------------------------------------------------------


def rounded(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kernel_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_gradient_of_confident_tokens(
    batch: Batch, inputs: Any, trained: bool, kernel_dtype: Any
) -> None:
    """The gradient of a nearly certain token is the small difference of two large vectors: it must not be
    rounded before they are subtracted."""
    head = Head(chunk=4, dtype=jnp.bfloat16, trained=trained)
    noise, kernel = inputs
    sure = 1.4 * kernel[np.roll(batch.tokens.reshape(-1, T), -1, axis=1)]
    hidden, kernel = jnp.asarray(sure + 0.3 * noise, jnp.bfloat16), jnp.asarray(kernel, kernel_dtype)
    nll = lambda h: -token_scores(h, kernel, batch, head, free).logp.sum()  # noqa: E731
    got = np.asarray(quick_jit(jax.grad(nll))(hidden), np.float64)
    # The same numbers: operands are rounded to bfloat16 first, and everything after that is exact.
    z = np.asarray(hidden, np.float64) @ rounded(kernel).astype(np.float64).T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dz = p - np.eye(V)[np.roll(batch.tokens.reshape(-1, T), -1, axis=1)]
    mask = dense(*inputs, batch, head)[0]["mask"]
    predicts = np.roll(np.asarray(mask), -1, -1).reshape(-1, T)
    want = (dz @ rounded(kernel).astype(np.float64))[predicts]
    size = np.abs(want).max(-1)
    assert np.median(size) < 0.1  # most of them are confident
    assert (np.abs(got[predicts] - want).max(-1) <= 0.01 * size + 1e-6).all()


@pytest.mark.parametrize("head", [FROZEN, TRAINED, ROWS])
def test_products_of_bfloat16_take_bfloat16_operands(batch: Batch, inputs: Any, head: Head) -> None:
    """Forward and backward: none of them has become a float32 product, and all accumulate in float32."""
    low = replace(head, dtype=jnp.bfloat16)
    dots = []

    def collect(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                dots.append(([v.aval.dtype for v in eqn.invars], eqn.outvars[0].aval.dtype))
            for inner in jaxprs_in_params(eqn.params):
                collect(inner)

    collect(compiled(low).trace(*inputs, batch).jaxpr.jaxpr)
    assert len(dots) >= 2
    assert all(d == ([jnp.bfloat16, jnp.bfloat16], jnp.float32) for d in dots)


@pytest.mark.parametrize("head", [FROZEN, TRAINED])
def test_bfloat16_scores(batch: Batch, inputs: Any, head: Head) -> None:
    """Operands are rounded, nothing else; the entropy weighs with a rounded p where the head is frozen."""
    want, _ = dense(*(rounded(x) for x in inputs), batch, head)
    got = compiled(replace(head, dtype=jnp.bfloat16))(*inputs, batch)[0]
    np.testing.assert_allclose(got.logp, want["logp"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got.entropy, want["entropy"], atol=1e-5 if head.trained else 5e-3)
