"""The device side of sampling: one state of N slots, and the compiled functions that fill and advance it.

A slot is a row of every array. Its keys and values lie left-aligned in the cache, slot s of the cache
holding position s, so that rows of any length and age decode side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.decoder import KV, Model
from jaxalign.sampling.samplers import Features, Settings, sample
from jaxalign.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """N requests under way.

    cache     keys and values of each layer, [N, K, S, h]
    token     int32 [N], the token at `position`, whose successor is sampled next
    position  int32 [N]
    emitted   int32 [N], tokens sampled so far
    limit     int32 [N], how many may be sampled
    active    bool [N]
    stops     int32 [N, M], tokens that end the row, filled up with -1
    seen      bool [N, V] tokens of prompt and answer, or [N, 0] where no row has a repetition penalty
    settings  how each row is sampled
    """

    cache: list[KV]
    token: Any
    position: Any
    emitted: Any
    limit: Any
    active: Any
    stops: Any
    seen: Any
    settings: Settings

    def with_active(self, active: Any) -> Slots:
        """The same slots with other rows running."""
        return replace(self, active=jnp.asarray(active))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Emitted:
    """What one call of `decode` sampled: [N, C] each; `count` int32 [N] says how many of a row are real."""

    tokens: Any
    logp: Any
    sample_logp: Any
    count: Any


# Calls that the host sends ahead of the devices. XLA's CPU client takes 32 for each device, and then blocks a
# thread that another device's collective waits for: eight simulated devices hang.
IN_FLIGHT = 16


@partial(jax.jit, static_argnums=0)
def begin(model: Model, ends: Params, tokens: jax.Array, lengths: jax.Array) -> Any:
    """`Model.begin` of right-padded prompts int32 [P, T] of lengths [P]: what their layers start from."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    return model.begin(ends, tokens, segments, positions)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 4))
def _layer(
    model: Model, params: Params, x: jax.Array, shared: Any, cache: KV, prompt: jax.Array, where: jax.Array
) -> tuple[jax.Array, KV]:
    """One layer over all prompts; row `prompt[m]` of its keys and values goes into the slot `where[m]`."""
    x, kv = model.layer(params, x, *shared)

    def put(cache: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[where, :, : new.shape[2]].set(new[prompt].astype(cache.dtype), mode="drop")

    return x, jax.tree.map(put, cache, kv)


@partial(jax.jit, donate_argnums=0)
def _start(slots: Slots, rows: Slots, where: jax.Array) -> Slots:
    """The slots `where` as `rows` has them; neither has a cache."""
    return jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), slots, rows)


def prefill(
    model: Model,
    base: Params,
    slots: Slots,
    tokens: Any,
    lengths: Any,
    prompt: Any,
    where: Any,
    rows: Slots,
) -> Slots:
    """Put M rows into the slots `where` [M] (N and beyond: nowhere), row m with the right-padded prompt
    `prompt[m]` of tokens int32 [P, T]. `rows` holds all of their state but the cache. `slots` is donated.

    The host walks the layers, which share one compiled program, so that its size does not grow with depth.
    """
    ends = {name: part for name, part in base.items() if name != "layers"}
    x, shared = begin(model, ends, tokens, lengths)
    cache = []
    layers = zip(model.config.layer_kinds, base["layers"], slots.cache, strict=True)
    for depth, (kind, params, kv) in enumerate(layers, 1):
        x, kv = _layer(model, params, x, shared[kind], kv, prompt, where)
        cache.append(kv)
        if depth % IN_FLIGHT == 0:
            x.block_until_ready()
    return replace(_start(replace(slots, cache=[]), rows, where), cache=cache)


@partial(jax.jit, static_argnums=2)
def resize(slots: Slots, where: jax.Array, size: int) -> Slots:
    """The rows `where` [N'] in a cache of `size` slots: grows, shrinks and reorders. A row -1 is empty."""

    def rows(x: jax.Array) -> jax.Array:
        taken = x[jnp.maximum(where, 0)]
        empty = (where < 0).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(empty, jnp.zeros_like(taken), taken)

    def fit(x: jax.Array) -> jax.Array:
        old = x.shape[2]
        return x[:, :, :size] if size <= old else jnp.pad(x, ((0, 0), (0, 0), (0, size - old), (0, 0)))

    cache = [(fit(rows(k)), fit(rows(v))) for k, v in slots.cache]
    return replace(jax.tree.map(rows, replace(slots, cache=[])), cache=cache)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: Model, features: Features, steps: int, base: Params, slots: Slots, wanted: jax.Array
) -> tuple[Slots, Emitted]:
    """Sample up to `steps` tokens in every active slot; returns early once only `wanted` rows or fewer are
    still active, so that the host can refill the others."""
    n = slots.token.shape[0]
    zeros = jnp.zeros((n, steps), jnp.float32)
    start = Emitted(jnp.zeros((n, steps), jnp.int32), zeros, zeros, jnp.zeros((n,), jnp.int32))

    def more(carry: tuple[jax.Array, Slots, Emitted]) -> jax.Array:
        step, slots, _ = carry
        return (step < steps) & (slots.active.sum() > wanted)

    def advance(carry: tuple[jax.Array, Slots, Emitted]) -> tuple[jax.Array, Slots, Emitted]:
        step, slots, out = carry
        slots, token, logp, sample_logp, was_active = _one(model, features, base, slots)
        column = lambda a, x: jax.lax.dynamic_update_slice(a, x[:, None].astype(a.dtype), (0, step))  # noqa: E731
        out = Emitted(
            column(out.tokens, token),
            column(out.logp, logp),
            column(out.sample_logp, sample_logp),
            out.count + was_active,
        )
        return step + 1, slots, out

    _, slots, out = jax.lax.while_loop(more, advance, (jnp.int32(0), slots, start))
    return slots, out


def _one(model: Model, features: Features, base: Params, slots: Slots) -> tuple[Slots, Any, Any, Any, Any]:
    """One token for every row. Rows that are not active write where they did before and stay as they are."""
    column = slots.token[:, None]
    ones = jnp.ones_like(column)
    hidden, cache = model.hidden(None, base, column, ones, slots.position[:, None], cache=slots.cache)
    logits = model.logits(base, hidden[:, 0])
    token, logp, sample_logp = sample(logits, slots.seen, slots.settings, slots.emitted, features)
    active = slots.active
    emitted = slots.emitted + active
    stopped = (token[:, None] == slots.stops).any(axis=1) | (emitted >= slots.limit)
    seen = slots.seen
    if features.penalty:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    slots = replace(
        slots,
        cache=cache or [],
        token=jnp.where(active, token, slots.token),
        position=slots.position + active,
        emitted=emitted,
        active=active & ~stopped,
        seen=seen,
    )
    return slots, token, logp, sample_logp, active
