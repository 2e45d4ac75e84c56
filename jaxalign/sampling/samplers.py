"""From logits to the next token: filters, draws and log-probabilities, every setting one number a row.

Rows are independent: a row's token depends on its own logits, settings and key alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import SamplingParams

_OUT = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """`SamplingParams` of N rows as arrays [N]; `sample` tells the n samples of one prompt apart."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any
    sample: Any

    @classmethod
    def of(cls, rows: list[tuple[SamplingParams, int]]) -> Settings:
        """From (params, sample index) of each row."""
        column = lambda name, dtype: np.array([getattr(p, name) for p, _ in rows], dtype)  # noqa: E731
        return cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            seed=column("seed", np.uint32),
            sample=np.array([i for _, i in rows], np.int32),
        )


@dataclass(frozen=True)
class Features:
    """Which parts of sampling a compiled loop contains: what no row asks for is not computed."""

    draws: bool
    filters: bool
    penalty: bool

    @classmethod
    def of(cls, params: list[SamplingParams]) -> Features:
        """What these requests need."""
        hot = [p for p in params if p.temperature > 0]
        return cls(
            draws=bool(hot),
            filters=any(p.top_k or p.top_p < 1 or p.min_p for p in hot),
            penalty=any(p.repetition_penalty != 1 for p in params),
        )

    def __or__(self, other: Features) -> Features:
        """What either needs."""
        return Features(
            self.draws or other.draws, self.filters or other.filters, self.penalty or other.penalty
        )


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858, section 4.1) on the tokens `seen` bool [N, V]."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: jax.Array, seen: jax.Array, settings: Settings, token_index: jax.Array, features: Features
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits float32 [N, V], seen bool [N, V], token_index int32 [N] -> token, logp, sample_logp, each [N].

    logp is the model's log-probability of the token (temperature 1, nothing filtered or penalised: what
    teacher forcing gives); sample_logp that under the distribution it was drawn from, 0 for a greedy row.
    """
    top = logits.max(axis=-1, keepdims=True)
    lse = top[:, 0] + jnp.log(jnp.exp(logits - top).sum(axis=-1))
    z = penalise(logits, seen, settings.repetition_penalty) if features.penalty else logits
    token, sample_logp = _choose(z, settings, token_index, features)
    return token, _at(logits, token) - lse, sample_logp


def _choose(
    z: jax.Array, settings: Settings, token_index: jax.Array, features: Features
) -> tuple[jax.Array, jax.Array]:
    greedy = _argmax(z)
    if not features.draws:
        return greedy, jnp.zeros(z.shape[:1], jnp.float32)
    hot = settings.temperature > 0
    z = z / jnp.where(hot, settings.temperature, 1.0)[:, None]
    drawn, logp = draw(keep(z, settings) if features.filters else z, settings, token_index)
    return jnp.where(hot, drawn, greedy), jnp.where(hot, logp, 0.0)


def _argmax(z: jax.Array) -> jax.Array:
    """The first index of the maximum, int32 [N], by two plain reductions: on a CPU several times faster than
    `jnp.argmax`, which reduces pairs."""
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    return jnp.where(z == z.max(axis=-1, keepdims=True), index, z.shape[-1] - 1).min(axis=-1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]


def keep(z: jax.Array, settings: Settings) -> jax.Array:
    """z [N, V] with what top-k, then top-p, then min-p exclude set to about minus infinity.

    Tokens tied with the last one kept are kept. Filters that are off leave their row alone.
    """
    vocabulary = z.shape[-1]
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, vocabulary), vocabulary)
    z = jnp.where(z >= _smallest_kept(z, jnp.ones_like(z), k.astype(jnp.float32)), z, _OUT)
    p = jnp.exp(z - z.max(axis=-1, keepdims=True))
    mass = jnp.where(settings.top_p < 1, settings.top_p * p.sum(axis=-1), 0.0)
    nucleus = z >= _smallest_kept(z, p, mass)
    likely = p >= settings.min_p[:, None]
    return jnp.where((nucleus | (settings.top_p >= 1)[:, None]) & likely, z, _OUT)


def _smallest_kept(z: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """[N, 1]: the largest t for which the weights of {z >= t} sum to at least `target`.

    Bisection over the float32 values themselves, in the order of their bits: exact after 32 rounds, and far
    cheaper than sorting the vocabulary.
    """
    keys = _ordered(z)
    lo = jnp.zeros(z.shape[:1], jnp.uint32)  # always satisfied
    hi = jnp.full(z.shape[:1], 0xFFFFFFFF, jnp.uint32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lo, hi = bounds
        mid = hi - (hi - lo) // 2  # rounded up, so that lo moves
        total = jnp.where(keys >= mid[:, None], weight, 0.0).sum(axis=-1)
        enough = total >= target
        return jnp.where(enough, mid, lo), jnp.where(enough, hi, mid - 1)

    lo, _ = jax.lax.fori_loop(0, 32, halve, (lo, hi))
    kept = jnp.where(keys >= lo[:, None], z, jnp.inf)
    return kept.min(axis=-1, keepdims=True)


def _ordered(z: jax.Array) -> jax.Array:
    """uint32 keys in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(0x80000000))


def draw(z: jax.Array, settings: Settings, token_index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token a row from softmax(z), and its log-probability.

    Inverse transform with one uniform number a row, in two levels (a block of the vocabulary, then a token
    in it), so that no cumulative sum is longer than the square root of the vocabulary.
    """
    n, vocabulary = z.shape
    top = z.max(axis=-1, keepdims=True)
    width = int(np.ceil(np.sqrt(vocabulary)))
    padded = jnp.pad(jnp.exp(z - top), ((0, 0), (0, width * width - vocabulary)))
    blocks = padded.reshape(n, width, width)
    sums = blocks.sum(axis=-1)
    total = sums.sum(axis=-1)
    target = jax.vmap(_uniform)(settings.seed, settings.sample, token_index) * total
    block, before = _inverse(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _inverse(inside, target - before)
    token = (block * width + place).astype(jnp.int32)
    return token, _at(z, token) - top[:, 0] - jnp.log(total)


def _uniform(seed: jax.Array, sample: jax.Array, token_index: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), token_index)
    return jax.random.uniform(key)


def _inverse(weight: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index [N] of the first entry whose cumulative weight passes `target`, and the sum before it.

    Only entries of positive weight are chosen, whatever rounding does to the last sum.
    """
    cumulative = jnp.cumsum(weight, axis=-1)
    passed = (cumulative > target[:, None]) & (weight > 0)
    last = weight.shape[-1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=-1)
    index = jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)
    return index, _at(cumulative, index) - _at(weight, index)
