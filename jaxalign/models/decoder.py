"""The decoder-only transformer: its NNX modules, and `Model`, the pure functions everything else calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.attention import ATTENTION, Attend, cached, causal
from jaxalign.models.base import DecoderConfig, Functional, Numerics, merge_trees, stack_axes
from jaxalign.models.layers import ACTIVATIONS, PRODUCT, Embedding, Linear, RMSNorm
from jaxalign.models.rope import rotate
from jaxalign.types import Params

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

    def __init__(self, config: DecoderConfig, adapter: LoraConfig | None, rngs: nnx.Rngs) -> None:
        c, d = config, config.hidden_size
        heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def linear(name: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool) -> Linear:
            return Linear(name, shape, axes, rngs, bias=bias, adapter=adapter)

        self.q = linear("q", (d, heads), ("embed", "heads"), c.qkv_bias)
        self.k = linear("k", (d, kv_heads), ("embed", "kv_heads"), c.qkv_bias)
        self.v = linear("v", (d, kv_heads), ("embed", "kv_heads"), c.qkv_bias)
        self.o = linear("o", (heads, d), ("heads", "embed"), c.out_bias)
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
        """x [N, T, D] -> [N, T, D], and the keys and values that were attended to."""
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
        y = context.attend(
            q, k, v, allowed, scale=c.attention_scale, softcap=c.attention_softcap, numerics=numerics
        )
        return self.o(y.reshape(*x.shape[:2], -1), numerics, keys[3]), (k, v)


def _write(cache: jax.Array, new: jax.Array, start: jax.Array | None) -> jax.Array:
    """Put new [N, K, T, h] into the slots start[n], start[n] + 1, ... of cache [N, K, S, h]."""
    put = lambda c, u, s: jax.lax.dynamic_update_slice(c, u, (0, s, 0))  # noqa: E731
    return jax.vmap(put)(cache, new.astype(cache.dtype), start)


class MLP(nnx.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, adapter: LoraConfig | None, rngs: nnx.Rngs) -> None:
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

    def __init__(self, config: DecoderConfig, adapter: LoraConfig | None, rngs: nnx.Rngs) -> None:
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


# What a layer keeps for its gradient: everything, the results of its products, or only its input.
REMAT = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)),
    "full": jax.checkpoint,
}


def _identity(x: jax.Array, *axes: str | None) -> jax.Array:
    return x


@dataclass(frozen=True)
class Model:
    """A decoder as pure functions over (adapter, base). Adapter None is the unadapted reference model.

    Layers are stacked over a leading axis and scanned, so compile time does not grow with depth; where
    `base["layers"]` is a list of per-layer trees (`unstack`), or a cache is given, they are unrolled.
    """

    config: DecoderConfig
    adapter: LoraConfig | None = None
    numerics: Numerics = Numerics()
    attention: str = "xla"
    remat: str = "none"
    neftune_alpha: float = 0.0
    constrain: Callable[..., jax.Array] = _identity

    @cached_property
    def _ends(self) -> Functional:
        return Functional(lambda rngs: Ends(self.config, rngs))

    @cached_property
    def _block(self) -> Functional:
        return Functional(lambda rngs: Block(self.config, None, rngs))

    @cached_property
    def _adapted(self) -> Functional:
        return Functional(lambda rngs: Block(self.config, self.adapter, rngs))

    def shapes(self) -> tuple[Params, Params]:
        """(adapter, base) trees of float32 `ShapeDtypeStruct`; the adapter tree is empty without one."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def axes(self) -> tuple[Params, Params]:
        """(adapter, base) trees of logical axis names."""
        base = self._ends.axes | {"layers": stack_axes(self._block.axes)}
        return only_adapters({"layers": stack_axes(self._adapted.axes)}), base

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Random (adapter, base). Layers are drawn one by one, so that no fan-in counts the layer axis."""
        ends_key, block_key = jax.random.split(key)
        layers = jax.vmap(self._block.init)(jax.random.split(block_key, self.config.num_layers))
        return self.init_adapter(key), self._ends.init(ends_key) | {"layers": layers}

    def init_adapter(self, key: jax.Array) -> Params:
        """The adapter's start, float32."""
        # `init` splits the key into 0 and 1: with those the adapter would repeat the kernels' numbers.
        keys = jax.random.split(jax.random.fold_in(key, 2), self.config.num_layers)
        return only_adapters({"layers": jax.vmap(lambda k: only_adapters(self._adapted.init(k)))(keys)})

    def hidden(
        self,
        adapter: Params | None,
        base: Params,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        cache: list[KV] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KV] | None]:
        """tokens, segments, positions int32 [N, T] -> final hidden states [N, T, D] and the updated cache.

        With a cache the positions of a row are consecutive and say which slots are written. `key` switches
        training noise (adapter dropout, NEFTune) on.
        """
        x, shared = self.begin(
            base, tokens, segments, positions, None if cache is None else cache[0][0].shape[2]
        )
        if key is not None and self.neftune_alpha:
            x = x + self._neftune(jax.random.fold_in(key, 0), x, segments)
        layers = _adapt(base["layers"], adapter["layers"]) if adapter else base["layers"]
        block = self._adapted if adapter else self._block
        if cache is not None or isinstance(layers, list):
            x, cache = self._unrolled(block, layers, x, shared, positions, cache, key)
        else:
            x = self._scanned(block, layers, x, shared, key)
        return self._bound_ends(base).final_norm(x), cache

    def begin(
        self,
        base: Params,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        size: int | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """What stands before the layers: x [N, T, D], and (angles, allowed) of each kind of attention layer.
        `size` is the number of cache slots, where there is a cache."""
        x = self._bound_ends(base).embed(tokens, self.numerics) * self.config.embed_scale
        return self.constrain(x, "batch", None, None), self._shared(segments, positions, size)

    def layer(self, params: Params, x: jax.Array, angles: Any, allowed: jax.Array) -> tuple[jax.Array, KV]:
        """One layer without adapter or cache, from its own (not stacked) weights: x, and keys and values."""
        return self._block.bind()(params)(x, angles, allowed, self._context(None))

    def _bound_ends(self, base: Params) -> Any:
        return self._ends.bind()({k: v for k, v in base.items() if k != "layers"})

    def _context(self, start: jax.Array | None) -> Context:
        attend = ATTENTION[self.attention if start is None else "xla"]
        return Context(self.numerics, attend, self.constrain, start)

    def _shared(self, segments: jax.Array, positions: jax.Array, size: int | None) -> list[Any]:
        """(angles, allowed) of each kind of attention layer."""
        # Dynamic rotary scaling looks at the longest position: that of a token, never that of padding.
        real = jnp.where(segments != 0, positions, 0)

        def kind(rope: Any, window: int) -> Any:
            allowed = causal(segments, positions, window) if size is None else cached(positions, size, window)
            return rope.angles(real), allowed

        return [kind(rope, window) for rope, window in self.config.kinds]

    def _scanned(
        self, block: Functional, layers: Params, x: jax.Array, shared: list[Any], key: Any
    ) -> jax.Array:
        c, context, bound = self.config, self._context(None), block.bind()
        tables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shared) if len(shared) > 1 else None

        def body(x: jax.Array, layer: tuple[Params, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            params, kind, index = layer
            angles, allowed = jax.tree.map(lambda t: t[kind], tables) if tables else shared[0]
            layer_key = None if key is None else jax.random.fold_in(key, index + 1)
            return bound(params)(x, angles, allowed, context, None, layer_key)[0], None

        per_layer = (layers, jnp.array(c.layer_kinds), jnp.arange(c.num_layers))
        return jax.lax.scan(REMAT[self.remat](body), x, per_layer)[0]

    def _unrolled(
        self,
        block: Functional,
        layers: Params | list[Params],
        x: jax.Array,
        shared: list[Any],
        positions: jax.Array,
        cache: list[KV] | None,
        key: Any,
    ) -> tuple[jax.Array, list[KV] | None]:
        context = self._context(None if cache is None else positions[:, 0])
        bound, out = block.bind(), []
        for i, params in enumerate(unstack(layers)):
            angles, allowed = shared[self.config.layer_kinds[i]]
            layer_key = None if key is None else jax.random.fold_in(key, i + 1)
            kv = None if cache is None else cache[i]
            x, kv = bound(params)(x, angles, allowed, context, kv, layer_key)
            out.append(kv)
        return x, None if cache is None else out

    def _neftune(self, key: jax.Array, x: jax.Array, segments: jax.Array) -> jax.Array:
        """NEFTune (arXiv:2310.05914, algorithm 1): U(-1, 1) alpha / sqrt(L D), L the example's length."""
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] != 0)
        length = same.sum(-1, keepdims=True).astype(jnp.float32)
        scale = jnp.where(length > 0, self.neftune_alpha / jnp.sqrt(jnp.maximum(length, 1) * x.shape[-1]), 0)
        return (jax.random.uniform(key, x.shape, minval=-1, maxval=1) * scale).astype(x.dtype)

    def unembed(self, base: Params) -> jax.Array:
        """The output matrix [V, D]: the head's, or the embedding where they are tied."""
        return base["embed" if self.config.tied else "head"]["embedding"]

    def logits(self, base: Params, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] of final hidden states [..., D]: for a few rows, as when decoding."""
        dims = (((hidden.ndim - 1,), (1,)), ((), ()))
        x, w = hidden.astype(self.numerics.compute), self.unembed(base).astype(self.numerics.compute)
        z = jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return cap * jnp.tanh(z / cap) if cap else z

    def empty_cache(self, rows: int, size: int) -> list[KV]:
        """Zeroed keys and values of `size` slots for `rows` rows, in the compute dtype."""
        c = self.config
        zeros = lambda: jnp.zeros((rows, c.num_kv_heads, size, c.head_dim), self.numerics.compute)  # noqa: E731
        return [(zeros(), zeros()) for _ in range(c.num_layers)]

    def merge(self, adapter: Params | None, base: Params) -> Params:
        """`base` with the adapter folded into its kernels (float32, then cast): what is exported."""
        return _merge(self.adapter, adapter, base) if adapter and self.adapter else base


def _adapt(layers: Params | list[Params], adapter: Params) -> Params | list[Params]:
    if isinstance(layers, list):
        return [merge_trees(a, b) for a, b in zip(layers, unstack(adapter), strict=True)]
    return merge_trees(layers, adapter)


def _merge(config: LoraConfig, adapter: Params, base: Params) -> Params:
    if "adapter" in adapter:
        return base | {"kernel": config.merge(adapter["adapter"], base["kernel"])}
    return base | {name: _merge(config, sub, base[name]) for name, sub in adapter.items()}


def only_adapters(tree: Params) -> Params:
    """The part of a parameter tree that lies under a key `adapter`."""
    out: Params = {}
    for name, value in tree.items():
        if name == "adapter":
            out[name] = value
        elif isinstance(value, dict) and (inner := only_adapters(value)):
            out[name] = inner
    return out


def unstack(layers: Params | list[Params]) -> list[Params]:
    """Per-layer trees of a stacked one: the form in which decoding does not copy weights every token."""
    if isinstance(layers, list):
        return layers
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(itemgetter(i), layers) for i in range(count)]


def parameter_count(shapes: Any) -> int:
    """How many numbers a tree of shapes holds."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(shapes))
