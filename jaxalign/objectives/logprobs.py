"""Log-probabilities from hidden states, chunk by chunk over tokens: the only place that meets the vocabulary.

No [B, T, V] array is ever made. Only rows that predict a target are multiplied with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives.base import Scores
from jaxalign.types import Batch

Parts = dict[str, jax.Array]  # float32 [N, M] each


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    chunk      tokens a device that are multiplied with the head at once
    softcap    logits are cap * tanh(logits / cap), or None
    dtype      operand dtype of the product, which accumulates in float32
    trained    whether the head gets a gradient; a frozen one needs one pass less
    smooth     whether the mean logit is wanted
    collision  whether log sum_v p_v^2 is wanted
    rivals     how many of the likeliest tokens other than the target are wanted
    compact    gather the rows that predict a target first; off where rows lie on several devices
    spread     over how many devices the rows lie
    """

    chunk: int = 512
    softcap: float | None = None
    dtype: Any = jnp.float32
    trained: bool = False
    smooth: bool = False
    collision: bool = False
    rivals: int = 0
    compact: bool = True
    spread: int = 1


def token_scores(
    hidden: jax.Array, kernel: jax.Array, batch: Batch, head: Head, constrain: Callable[..., jax.Array]
) -> Scores:
    """Scores [B, G, T] of `batch` from final hidden states [B*G, T, D] and the head [V, D]."""
    shape = batch.tokens.shape
    # Column t predicts token t + 1; the last column predicts nothing.
    following = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    tokens, valid = (following(x.reshape(-1, shape[-1])) for x in (batch.tokens, targets(batch)))
    # One gather of a sharded head for all chunks, not one in each.
    kernel = constrain(kernel, "vocab", None)
    path = _recomputed if head.trained or head.smooth or head.rivals else _frozen
    parts = _chunked(partial(path, head), hidden, kernel, tokens, valid, head)
    back = lambda x: jnp.roll(x, 1, axis=1).reshape(shape)  # noqa: E731
    where = lambda x: jnp.where(valid, x, 0.0)  # noqa: E731
    parts = {name: back(where(x)) for name, x in parts.items()}
    return Scores(
        logp=parts["label"] - parts["lse"],
        logsumexp=parts["lse"],
        mean_logit=parts["mean"],
        correct=jax.lax.stop_gradient(parts["correct"]),
        entropy=jax.lax.stop_gradient(parts["entropy"]),
        mask=back(valid),
        collision=jax.lax.stop_gradient(parts["collision"]) if head.collision else None,
        rivals=_stacked(parts, head.rivals) if head.rivals else None,
    )


def _stacked(parts: Parts, count: int) -> jax.Array:
    """float32 [B, G, T, count]: log-probs of the rivals, from the likeliest on."""
    return jnp.stack([parts[f"rival{i}"] - parts["lse"] for i in range(count)], axis=-1)


def prompt_vectors(kernel: jax.Array, batch: Batch) -> jax.Array:
    """float32 [B, D], no gradient: the head's rows of the prompt's tokens, on average over the prompt.

    The prompt is what stands before the first target of member 0; without one, or without targets, 0.
    """
    tokens, mask, segments = (jnp.asarray(x)[:, 0] for x in (batch.tokens, batch.mask, batch.segments))
    before = (jnp.cumsum(mask, axis=-1) == 0) & (segments != 0) & mask.any(axis=-1, keepdims=True)
    rows = jnp.where(before[..., None], kernel[tokens].astype(jnp.float32), 0.0)
    mean = rows.sum(axis=1) / jnp.maximum(before.sum(axis=-1, keepdims=True), 1)
    return jax.lax.stop_gradient(mean)


def targets(batch: Batch) -> jax.Array:
    """bool [..., T]: the tokens of `batch.mask` that something predicts; the first of a segment is not."""
    segments = jnp.asarray(batch.segments)
    before = jnp.pad(segments[..., :-1], [(0, 0)] * (segments.ndim - 1) + [(1, 0)])
    return batch.mask & (segments != 0) & (before == segments)


def _chunked(
    path: Callable[..., Parts],
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    head: Head,
) -> Parts:
    """Apply `path` to rows cut into chunks [C, N, c], the rows that predict something first."""
    n, t = targets.shape
    if not head.compact:
        return _cut(path, x, kernel, targets, valid, max(1, head.chunk * head.spread // n))
    order = jnp.argsort(~valid.reshape(-1), stable=True)
    pick = lambda a: a.reshape(1, n * t, *a.shape[2:])[:, order]  # noqa: E731
    parts = _cut(path, pick(x), kernel, pick(targets), pick(valid), head.chunk)
    inverse = jnp.argsort(order)
    return {name: a[0][inverse].reshape(n, t) for name, a in parts.items()}


def _cut(
    path: Callable[..., Parts],
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    chunk: int,
) -> Parts:
    n, m = targets.shape
    chunk = min(chunk, m)
    count = -(-m // chunk)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, [(0, 0), (0, count * chunk - m)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(n, count, chunk, *a.shape[2:]), 1, 0)

    parts = path(split(x), kernel, split(targets), split(valid))
    return {name: jnp.moveaxis(a, 0, 1).reshape(n, -1)[:, :m] for name, a in parts.items()}


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [..., D] and kernel [V, D] -> float32 [..., V]. The gradient's products take `dtype` operands too:
    automatic differentiation would multiply in float32 and round the kernel's gradient in every chunk."""
    return _dot(x, kernel, (x.ndim - 1, 1), dtype)


def _product_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(x, kernel, dtype), (x, kernel)


def _product_backward(dtype: Any, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = g.reshape(-1, g.shape[-1])
    dx = _dot(rows, kernel, (1, 0), dtype).reshape(x.shape)
    dk = _dot(rows, x.reshape(-1, x.shape[-1]), (0, 0), dtype)
    return dx.astype(x.dtype), dk.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _logits(x: jax.Array, kernel: jax.Array, head: Head) -> jax.Array:
    z: jax.Array = _product(x, kernel, head.dtype)  # pyright: ignore[reportAssignmentType]
    return head.softcap * jnp.tanh(z / head.softcap) if head.softcap else z


def _parts(z: jax.Array, targets: jax.Array, head: Head) -> tuple[Parts, jax.Array, jax.Array]:
    """The scores of a chunk from its logits [..., V], with exp(z - max) and its sum."""
    top = jax.lax.stop_gradient(z.max(axis=-1))
    e = jnp.exp(z - top[..., None])
    total = e.sum(axis=-1)
    lse = top + jnp.log(total)
    label = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    parts = {
        "label": label,
        "lse": lse,
        "mean": z.mean(axis=-1) if head.smooth else jnp.zeros_like(lse),
        "correct": (label >= top).astype(jnp.float32),
        "entropy": lse - (e * z).sum(axis=-1) / total,
    }
    if head.collision:
        parts["collision"] = jnp.log(jnp.square(e).sum(axis=-1)) - 2 * jnp.log(total)
    for i, rival in enumerate(_rivals(z, targets, head.rivals) if head.rivals else ()):
        parts[f"rival{i}"] = rival
    return parts, e, total


def _rivals(z: jax.Array, targets: jax.Array, count: int) -> list[jax.Array]:
    """Logits of the `count` likeliest tokens other than the target, from the likeliest on."""
    values, ids = jax.lax.top_k(z, count + 1)
    past = jnp.cumsum(ids == targets[..., None], axis=-1) > 0  # at the target or behind it
    return [jnp.where(past[..., i], values[..., i + 1], values[..., i]) for i in range(count)]


def _recomputed(head: Head, x: jax.Array, kernel: jax.Array, targets: jax.Array, valid: jax.Array) -> Parts:
    """Chunks under `jax.checkpoint`: the gradient computes the logits again, for hidden and head alike."""

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array]) -> Parts:
        return _parts(_logits(chunk[0], kernel, head), chunk[1], head)[0]

    return jax.lax.map(one, (x, targets))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(head: Head, x: jax.Array, kernel: jax.Array, targets: jax.Array, valid: jax.Array) -> Parts:
    """Chunks under a head without gradient.

    The label's logit and the logsumexp of a token are scalars of one hidden state h only, so their gradients
    in h are two vectors that the forward pass can produce from the same logits: W[y] and softmax(z) W.
    The backward pass scales and adds them: one product with the head where recomputing takes two.
    """
    return _frozen_loop(head, x, kernel, targets, valid, gradient=False)[0]


def _frozen_loop(
    head: Head, x: jax.Array, kernel: jax.Array, targets: jax.Array, valid: jax.Array, gradient: bool
) -> tuple[Parts, tuple[jax.Array, jax.Array]]:
    def one(i: jax.Array, out: Any) -> Any:
        z = _logits(x[i], kernel, head)
        parts, e, total = _parts(z, targets[i], head)
        slopes = _slopes(head, z, e, total, kernel, targets[i]) if gradient else None
        if slopes and not head.softcap:
            # sum_v p_v z_v = h . d lse / d h where z = W h: a short product instead of a pass over the logits
            # (5 % of a LoRA step of a 135M model on a CPU). p is rounded like an operand in it.
            h = x[i].astype(head.dtype).astype(jnp.float32)
            parts["entropy"] = parts["lse"] - (h * slopes[1]).sum(axis=-1)
        new = (parts, tuple(s.astype(x.dtype) for s in slopes or ()))
        return jax.tree.map(lambda a, b: a.at[i].set(b), out, new)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    names = ("label", "lse", "mean", "correct", "entropy", *(("collision",) if head.collision else ()))
    parts = dict.fromkeys(names, zeros)
    slopes = (jnp.zeros_like(x), jnp.zeros_like(x)) if gradient else ()
    # Chunks behind the last target are not computed.
    used = jnp.max(jnp.where(valid.any(axis=(1, 2)), jnp.arange(valid.shape[0]) + 1, 0))
    return jax.lax.fori_loop(0, used, one, (parts, slopes))


def _slopes(
    head: Head, z: jax.Array, e: jax.Array, total: jax.Array, kernel: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d logp / d hidden and d logsumexp / d hidden, [N, c, D] each.

    Not d label / d hidden: rounded apart, it and the other would not cancel where a token is nearly certain.
    """
    v = kernel.astype(head.dtype)
    label = v[targets].astype(jnp.float32)
    if head.softcap:
        bend = 1 - jnp.square(z / head.softcap)
        e = e * bend
        label = label * jnp.take_along_axis(bend, targets[..., None], axis=-1)
    rows = e.reshape(-1, e.shape[-1]).astype(head.dtype)
    lse = jax.lax.dot_general(rows, v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    lse = lse.reshape(*e.shape[:-1], -1) / total[..., None]
    return label - lse, lse


def _frozen_forward(head: Head, *args: jax.Array) -> tuple[Parts, Any]:
    parts, slopes = _frozen_loop(head, *args, gradient=True)
    return parts, slopes


def _frozen_backward(head: Head, slopes: Any, g: Parts) -> tuple[Any, ...]:
    logp, lse = slopes
    # label = logp + lse, so the second factor is exactly 0 for a loss of log-probs alone.
    dx = g["label"][..., None] * logp + (g["label"] + g["lse"])[..., None] * lse
    return dx.astype(logp.dtype), None, None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)
