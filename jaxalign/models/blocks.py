"""The layers of a decoder-only transformer as NNX modules; `decoder.Model` makes pure functions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxalign.models.attention import Attend
from jaxalign.models.base import DecoderConfig, Numerics
from jaxalign.models.layers import ACTIVATIONS, AdapterConfig, Embedding, Linear, RMSNorm
from jaxalign.models.rope import rotate

KV = tuple[jax.Array, jax.Array]  # keys and values of one layer, [N, K, S, h] each


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares. `start` is the cache slot of each row's first token."""

    numerics: Numerics
    attend: Attend
    constrain: Callable[..., jax.Array]
    start: jax.Array | None = None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, adapter: AdapterConfig | None, rngs: nnx.Rngs) -> None:
        c, d = config, config.hidden_size
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def linear(name: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool) -> Linear:
            return Linear(name, shape, axes, rngs, bias=bias, adapter=adapter)

        self.q = linear("q", (d, heads), ("embed", "heads"), c.qkv_bias)
        self.k = linear("k", (d, kv_heads), ("embed", "kv_heads"), c.qkv_bias)
        self.v = linear("v", (d, kv_heads), ("embed", "kv_heads"), c.qkv_bias)
        self.o = linear("o", (heads, d), ("heads", "embed"), c.out_bias)
        self.adapter = adapter.make_prefix((c.num_kv_heads, c.head_dim), rngs) if adapter else None
        norm = (lambda: RMSNorm(c.head_dim, c.norm_eps, c.norm_offset)) if c.qk_norm else lambda: None
        self.q_norm, self.k_norm = norm(), norm()
        self.config = c

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        allowed: jax.Array,
        context: Context,
        cache: KV | None,
        keys: list[Any],
    ) -> tuple[jax.Array, KV]:
        """x [N, T, D] -> [N, T, D], and the tokens' keys and values, with those of the cache."""
        c, numerics = self.config, context.numerics
        split = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
        q = split(self.q(x, numerics, keys[0]))
        k = split(self.k(x, numerics, keys[1]))
        v = split(self.v(x, numerics, keys[2]))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = _write(cache[0], k, context.start), _write(cache[1], v, context.start)
        seen = (k, v, allowed) if self.adapter is None else self.adapter(k, v, allowed)
        y = context.attend(q, *seen, scale=c.attention_scale, softcap=c.attention_softcap, numerics=numerics)
        return self.o(y.reshape(*x.shape[:2], -1), numerics, keys[3]), (k, v)


def _write(cache: jax.Array, new: jax.Array, start: jax.Array | None) -> jax.Array:
    """Put new [N, K, T, h] into the slots start[n], start[n] + 1, ... of cache [N, K, S, h]."""
    put = lambda c, u, s: jax.lax.dynamic_update_slice(c, u, (0, s, 0))  # noqa: E731
    return jax.vmap(put)(cache, new.astype(cache.dtype), start)


class MLP(nnx.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, adapter: AdapterConfig | None, rngs: nnx.Rngs) -> None:
        d, f = config.hidden_size, config.intermediate_size

        def linear(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Linear:
            return Linear(name, shape, axes, rngs, bias=config.mlp_bias, adapter=adapter)

        self.gate = linear("gate", (d, f), ("embed", "mlp"))
        self.up = linear("up", (d, f), ("embed", "mlp"))
        self.down = linear("down", (f, d), ("mlp", "embed"))
        self.activation = config.activation

    def __call__(self, x: jax.Array, numerics: Numerics, keys: list[Any]) -> jax.Array:
        """x [N, T, D] -> [N, T, D]."""
        gate = ACTIVATIONS[self.activation](self.gate(x, numerics, keys[0]))
        return self.down(gate * self.up(x, numerics, keys[1]), numerics, keys[2])


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm (and, in gemma, in front of one)."""

    def __init__(self, config: DecoderConfig, adapter: AdapterConfig | None, rngs: nnx.Rngs) -> None:
        norm = lambda: RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)  # noqa: E731
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.post_attn_norm = norm() if config.post_norms else None
        self.post_mlp_norm = norm() if config.post_norms else None
        self.attn = Attention(config, adapter, rngs)
        self.mlp = MLP(config, adapter, rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        allowed: jax.Array,
        context: Context,
        cache: KV | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """x [N, T, D] -> [N, T, D], and the keys and values. `key` draws the dropout of adapters."""
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        y, kv = self.attn(self.attn_norm(x), angles, allowed, context, cache, keys[:4])
        x = x + (y if self.post_attn_norm is None else self.post_attn_norm(y))
        y = self.mlp(self.mlp_norm(x), context.numerics, keys[4:])
        x = x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))
        return context.constrain(x, "batch", None, None), kv


class Ends(nnx.Module):
    """What stands before and after the layers: embedding, final norm and, unless tied, the head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.embed = Embedding(c.vocab_size, c.hidden_size, rngs)
        self.final_norm = RMSNorm(c.hidden_size, c.norm_eps, c.norm_offset)
        self.head = None if c.tied else Embedding(c.vocab_size, c.hidden_size, rngs)
