"""Scaled dot-product attention with grouped heads behind one function, and the masks it takes."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.base import Numerics
from jaxalign.models.layers import PRODUCT, matmul

# Large enough to vanish in a softmax, small enough that a row with nothing to attend to stays finite.
_MASKED = -1e30


class Attend(Protocol):
    """q [N, T, H, h], k and v [N, K, S, h], allowed bool [N, T, S] -> [N, T, H, h]."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        allowed: jax.Array,
        *,
        scale: float,
        softcap: float | None,
        numerics: Numerics,
    ) -> jax.Array:
        """Softmax of the capped, scaled scores over what is allowed, times the values."""
        ...


def causal(segments: jax.Array, positions: jax.Array, window: int) -> jax.Array:
    """bool [N, T, T]: same segment (0 is padding), not later, and within `window` tokens (0: no window)."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] != 0)
    distance = positions[:, :, None] - positions[:, None, :]
    near = (distance < window) if window else True
    return same & (distance >= 0) & near


def cached(positions: jax.Array, size: int, window: int) -> jax.Array:
    """bool [N, T, size]: a query at position p sees the cache slots 0..p, slot s holding position s."""
    distance = positions[:, :, None] - jnp.arange(size)
    return (distance >= 0) & ((distance < window) if window else True)


def _softmax(scores: jax.Array, allowed: jax.Array, softcap: float | None) -> jax.Array:
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(allowed, scores, _MASKED), axis=-1)


def _grouped(q: jax.Array, heads: int) -> jax.Array:
    """[N, T, H, h] -> [N, K, T, H/K, h]: the query heads that share a key-value head side by side."""
    n, t, h, size = q.shape
    return q.reshape(n, t, heads, h // heads, size).transpose(0, 2, 1, 3, 4)


@partial(jax.checkpoint, static_argnums=(4, 5, 6))
def _core(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
) -> jax.Array:
    """q [..., T, H/K, h], k and v [..., S, h], allowed [..., T, S]; the probabilities are not kept for the
    gradient but computed again."""
    scores = matmul(q * scale, jnp.swapaxes(k, -1, -2), numerics.compute)
    weights = _softmax(scores, allowed[..., None, :], softcap)
    out: jax.Array = matmul(weights, v, numerics.compute)
    return out.astype(numerics.activation)


def attend_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
) -> jax.Array:
    """Batched products: the form for accelerators and for sharded arrays, and the oracle of every other."""
    out: jax.Array = _core(_grouped(q, k.shape[1]), k, v, allowed[:, None], scale, softcap, numerics)
    return checkpoint_name(out.transpose(0, 2, 1, 3, 4).reshape(q.shape), PRODUCT)


def attend_loop(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
) -> jax.Array:
    """One key-value head of one row at a time: on a single CPU plain matrix products are over twice as fast
    as batched ones, forward and backward."""
    n, heads = k.shape[:2]
    flat = lambda x: x.reshape(n * heads, *x.shape[2:])  # noqa: E731
    row = jnp.repeat(jnp.arange(n), heads)

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        q_i, k_i, v_i, i = args
        return _core(q_i, k_i, v_i, allowed[i], scale, softcap, numerics)

    out = jax.lax.map(one, (flat(_grouped(q, heads)), flat(k), flat(v), row))
    out = out.reshape(n, heads, *out.shape[1:])
    return checkpoint_name(out.transpose(0, 2, 1, 3, 4).reshape(q.shape), PRODUCT)


ATTENTION: dict[str, Attend] = {"xla": attend_xla, "loop": attend_loop}
