"""Attention against its definition in numpy; masks; gradients against those of a plain softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.attention import ATTENTION, cached, causal
from jaxalign.models.base import Numerics
from tests.objectives import vectors as golden
from tests.tiny import quick_jit

N, T, HEAD = 2, 9, 6
# H, K, window, softcap: what the families have between them.
KINDS = {
    "llama": (4, 2, 0, None),
    "multi-query": (4, 1, 0, None),
    "all heads": (3, 3, 0, None),
    "mistral": (4, 2, 3, None),
    "gemma2": (4, 2, 4, 2.0),
    "window of one": (2, 2, 1, None),
}
SEGMENTS = np.array([[1] * T, [1, 1, 1, 2, 2, 2, 2, 0, 0]])
POSITIONS = np.array([range(T), [0, 1, 2, 0, 1, 2, 3, 0, 0]])


def inputs(heads: int, kv: int, length: int = T) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    queries, keys = (N, length, heads, HEAD), (N, kv, length, HEAD)
    shapes = [queries, keys, keys, queries]
    return [jnp.asarray(rng.standard_normal(s).astype(np.float32)) for s in shapes]


def by_definition(q: Any, k: Any, v: Any, window: int, softcap: float | None, scale: float) -> np.ndarray:
    """One query at a time; zeros where a query is padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    shared = q.shape[2] // k.shape[1]
    for n, t, h in np.ndindex(q.shape[:3]):
        near = [
            s
            for s in range(t + 1)
            if SEGMENTS[n, s] == SEGMENTS[n, t] != 0 and (not window or t - s < window)
        ]
        if not near:
            continue
        z = scale * k[n, h // shared, near] @ q[n, t, h]
        z = softcap * np.tanh(z / softcap) if softcap else z
        w = np.exp(z - z.max())
        out[n, t, h] = w / w.sum() @ v[n, h // shared, near]
    return out


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_is_attention(kind: str, form: str) -> None:
    """Values against the definition; gradients are finite, and none comes from or goes to padding."""
    heads, kv, window, softcap = KINDS[kind]
    *qkv, g = inputs(heads, kv)
    allowed = causal(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), window)
    real = (SEGMENTS > 0)[..., None, None]
    call = partial(ATTENTION[form], allowed=allowed, scale=0.3, softcap=softcap, numerics=Numerics())

    @quick_jit
    def run(*qkv: jax.Array) -> Any:
        y, back = jax.vjp(call, *qkv)
        return y, back(g * real)

    y, grads = run(*qkv)
    want = by_definition(*qkv, window, softcap, 0.3)
    np.testing.assert_allclose(np.asarray(y) * real, want, atol=1e-5, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in (y, *grads))
    assert not np.asarray(grads[0])[~real[..., 0, 0]].any()
    # The gradient in v is a weighted mean of g: it is not zero, and the sum over keys is that over queries.
    total = lambda x: np.asarray(x).sum()  # noqa: E731
    np.testing.assert_allclose(total(grads[2]), total(g * real), rtol=1e-4)


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize(("kind", "length"), [("llama", 9), ("gemma2", 9), ("mistral", 200), ("gemma2", 200)])
def test_gradients_are_those_of_plain_softmax(kind: str, length: int, form: str) -> None:
    """Against automatic differentiation of softmax(Q K^T) V, in one block of queries and in several."""
    heads, kv, window, softcap = KINDS[kind]
    *qkv, g = inputs(heads, kv, length)
    segments = jnp.asarray([[1] * length, [1] * 5 + [2] * (length - 6) + [0]])
    positions = jnp.asarray([range(length), [*range(5), *range(length - 6), 0]])
    allowed = causal(segments, positions, window and 40)
    g = g * (segments > 0)[..., None, None]

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, heads // kv, axis=1) for x in (k, v))
        z = 0.3 * jnp.einsum("nthd,nhsd->nhts", q, k)
        z = softcap * jnp.tanh(z / softcap) if softcap else z
        p = jax.nn.softmax(jnp.where(allowed[:, None], z, -1e30), axis=-1)
        return jnp.einsum("nhts,nhsd->nthd", p, v)

    call = partial(ATTENTION[form], allowed=allowed, scale=0.3, softcap=softcap, numerics=Numerics())
    both = quick_jit(lambda *qkv: [jax.vjp(f, *qkv)[1](g) for f in (call, plain)])
    for got, want in zip(*both(*qkv), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ATTENTION)
def test_gradient_by_differences(form: str) -> None:
    """A directional derivative of a scalar of the output, in q, k and v together."""
    *qkv, g = inputs(4, 2)
    allowed = causal(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), 4)

    def loss(qkv: list[jax.Array]) -> jax.Array:
        y = ATTENTION[form](*qkv, allowed, scale=0.5, softcap=3.0, numerics=Numerics())
        return (y * g * (SEGMENTS > 0)[..., None, None]).sum()

    direction = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in qkv]
    value, gradient = quick_jit(loss), quick_jit(jax.grad(loss))
    slope = sum((a * b).sum() for a, b in zip(gradient(qkv), direction, strict=True))
    ends = [value([x + e * d for x, d in zip(qkv, direction, strict=True)]) for e in (1e-2, -1e-2)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, slope, rtol=2e-3)


@pytest.mark.parametrize("form", ATTENTION)
def test_a_row_of_padding_is_finite(form: str) -> None:
    """Nothing to attend to at all: finite values, finite gradients, none of it reaching the queries."""
    *qkv, _ = inputs(4, 2)
    nothing = jnp.zeros((N, T, T), bool)
    call = lambda q, k, v: ATTENTION[form](  # noqa: E731
        q, k, v, nothing, scale=0.3, softcap=None, numerics=Numerics()
    )
    y, grads = quick_jit(lambda *qkv: (call(*qkv), jax.grad(lambda x: call(*x).sum())(qkv)))(*qkv)
    assert all(np.isfinite(x).all() for x in (y, *grads))
    assert not np.asarray(grads[0]).any()


@pytest.mark.parametrize("form", ATTENTION)
def test_bfloat16(form: str) -> None:
    """Operands in bfloat16, the softmax in float32: within two roundings of the definition."""
    *qkv, _ = (x.astype(jnp.bfloat16) for x in inputs(4, 2))
    allowed = causal(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), 0)
    numerics = Numerics(jnp.bfloat16, jnp.bfloat16)
    y = ATTENTION[form](*qkv, allowed, scale=0.25, softcap=None, numerics=numerics)
    assert y.dtype == jnp.bfloat16
    wide = [x.astype(jnp.float32) for x in qkv]
    want, real = by_definition(*wide, 0, None, 0.25), SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(y, np.float32)[real], want[real], atol=0.02)


def test_vector_causal_mask_of_packed_segments() -> None:
    mask = causal(jnp.asarray([golden.SEGMENTS]), jnp.asarray([golden.POSITIONS]), 0)
    assert mask[0].astype(int).tolist() == golden.ALLOWED


@pytest.mark.parametrize("window", [0, 1, 3])
def test_causal_mask_by_definition(window: int) -> None:
    """By loops over pairs, left padding included: a window counts tokens, not slots."""
    segments = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2]])
    positions = np.array([[0, 0, 0, 1, 2, 3, 0, 1, 2]])
    got = causal(jnp.asarray(segments), jnp.asarray(positions), window)
    for i, j in np.ndindex(T, T):
        want = segments[0, i] == segments[0, j] != 0 and j <= i and (not window or i - j < window)
        assert got[0, i, j] == want, (i, j)


@pytest.mark.parametrize("window", [0, 3])
def test_cached_mask(window: int) -> None:
    """A query at position p sees the slots up to p (within the window), in rows of different lengths."""
    got = cached(jnp.asarray([[4, 5], [0, 1]]), 8, window)
    for n, first in enumerate((4, 0)):
        for i, s in np.ndindex(2, 8):
            p = first + i
            assert got[n, i, s] == (s <= p and (not window or p - s < window))
