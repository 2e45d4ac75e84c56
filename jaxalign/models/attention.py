"""Scaled dot-product attention with grouped heads behind one function, and the masks it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.base import Numerics
from jaxalign.models.layers import PRODUCT, dot
from jaxalign.types import BRANCH

# Large enough to vanish in a softmax, small enough that a row with nothing to attend to stays finite.
_MASKED = -1e30


class Attend(Protocol):
    """q [N, T, H, h], k and v [N, K, S, h], allowed bool [N, T, S] -> [N, T, H, h].

    Where S = T, no query may be allowed a later key: forms are free not to look there.
    """

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
    """bool [N, T, T]: same segment (0 is padding) or the one that it is a branch of, not later, and within
    `window` tokens (0: no window)."""
    own, keys = segments[:, :, None], segments[:, None, :]
    same = ((own == keys) | (own % BRANCH == keys)) & (own != 0)
    distance = positions[:, :, None] - positions[:, None, :]
    near = (distance < window) if window else True
    return same & (distance >= 0) & near


def cached(positions: jax.Array, size: int, window: int) -> jax.Array:
    """bool [N, T, size]: a query at position p sees the cache slots 0..p, slot s holding position s."""
    distance = positions[:, :, None] - jnp.arange(size)
    return (distance >= 0) & ((distance < window) if window else True)


def _grouped(q: jax.Array, heads: int) -> jax.Array:
    """[N, T, H, h] -> [N, K, T, H/K, h]: the query heads that share a key-value head side by side."""
    n, t, h, size = q.shape
    return q.reshape(n, t, heads, h // heads, size).transpose(0, 2, 1, 3, 4)


@dataclass(frozen=True)
class _Softmax:
    """softmax(cap(s Q K^T)) V over what is allowed.

    q is [N, K, T, G, h], G query heads to a key-value head, k and v [N, K, S, h], allowed bool [N, T, S].
    The T G queries that share a key-value head are the rows of one matrix.
    """

    scale: float
    softcap: float | None
    numerics: Numerics

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """float32 [N, K, T, G, S], capped but not masked."""
        z = self.scale * dot(_rows(q), k, (1, 1), self.numerics.compute)
        z = self.softcap * jnp.tanh(z / self.softcap) if self.softcap else z
        return z.reshape(*q.shape[:-1], k.shape[2])

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> Any:
        """The output in the form of q, and what the gradient needs: the logsumexp, not the probabilities."""
        z = jnp.where(allowed[:, None, :, None], self.scores(q, k), _MASKED)
        top = z.max(axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        total = e.sum(axis=-1, keepdims=True)
        out = dot(_rows(e), v, (1, 0), self.numerics.compute).reshape(q.shape) / total
        out = checkpoint_name(out.astype(self.numerics.activation), PRODUCT)
        lse = checkpoint_name(top + jnp.log(total), PRODUCT)
        return out, (q, k, v, allowed, out, lse)

    def backward(self, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[Any, ...]:
        """Gradients by algorithm 2 of FlashAttention-2 (arXiv:2307.08691), without its tiles."""
        q, k, v, allowed, out, lse = saved
        dtype, g = self.numerics.compute, g.astype(jnp.float32)
        z = self.scores(q, k)
        # Masked here and not in the scores: a row with nothing allowed then passes no gradient on.
        p = jnp.where(allowed[:, None, :, None], jnp.exp(z - lse), 0.0)
        dp = dot(_rows(g), v, (1, 1), dtype).reshape(z.shape)
        dz = self.scale * p * (dp - (g * out.astype(jnp.float32)).sum(axis=-1, keepdims=True))
        if self.softcap:
            dz = dz * (1 - jnp.square(z / self.softcap))
        dz, p = _rows(dz), _rows(p)
        dq = dot(dz, k, (1, 0), dtype).reshape(q.shape)
        dk, dv = dot(dz, _rows(q), (0, 0), dtype), dot(p, _rows(g), (0, 0), dtype)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _rows(x: jax.Array) -> jax.Array:
    """[N, K, T, G, ...] -> [N, K, T G, ...]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Softmax, q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    return form.forward(q, k, v, allowed)[0]


_attend.defvjp(_Softmax.forward, _Softmax.backward)


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
    """Batched products that XLA compiles for any device and any sharding: the oracle of every other form.

    Queries go block by block against the keys up to the block's end: 5/8 of the arithmetic with four blocks.
    """
    form, grouped, t = _Softmax(scale, softcap, numerics), _grouped(q, k.shape[1]), q.shape[1]
    ends = [t] if t != k.shape[2] else block_ends(t)
    out, start = [], 0
    for end in ends:
        seen = end if len(ends) > 1 else k.shape[2]
        part: Any = _attend(
            form, grouped[:, :, start:end], k[:, :, :seen], v[:, :, :seen], allowed[:, start:end, :seen]
        )
        out.append(part)
        start = end
    whole = jnp.concatenate(out, axis=2) if len(out) > 1 else out[0]
    return whole.transpose(0, 2, 1, 3, 4).reshape(q.shape)


def block_ends(queries: int) -> list[int]:
    """Where the blocks of a square of this many queries end: at least 64 queries each, at most 8 blocks."""
    count = max(1, min(8, queries // 64))
    return [queries * (i + 1) // count for i in range(count)]


ATTENTION: dict[str, Attend] = {"xla": attend_xla}
