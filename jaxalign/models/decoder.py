"""The decoder-only transformer as `Model`, the pure functions everything else calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.attention import ATTENTION, cached, causal
from jaxalign.models.base import DecoderConfig, Functional, Numerics, merge_trees, stack_axes
from jaxalign.models.blocks import KV, Block, Context, Ends
from jaxalign.models.layers import PRODUCT
from jaxalign.models.prefix import PrefixConfig, PromptConfig, prefix_tree
from jaxalign.models.quant import dequantise_base
from jaxalign.types import Params

Adapter = LoraConfig | PrefixConfig | PromptConfig

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
    adapter: Adapter | None = None
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
    def _trained(self) -> Functional:
        return Functional(lambda rngs: Block(self.config, self.adapter, rngs))

    @cached_property
    def _adapted(self) -> Functional:
        if self.adapter is None or self.adapter.in_layers == self.adapter:
            return self._trained
        inner = self.adapter.in_layers
        return Functional(lambda rngs: Block(self.config, inner, rngs))

    def _block_of(self, layers: Params | list[Params]) -> Functional:
        """The block that has a place for everything in these layers."""
        one = layers[0] if isinstance(layers, list) else layers
        return self._adapted if only_adapters(one) else self._block

    def _prompt(self, key: jax.Array) -> Params:
        return self.adapter.make_prompt(self.config.hidden_size, key) if self.adapter else {}

    def shapes(self) -> tuple[Params, Params]:
        """(adapter, base) trees of float32 `ShapeDtypeStruct`; the adapter tree is empty without one."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def axes(self) -> tuple[Params, Params]:
        """(adapter, base) trees of logical axis names."""
        base = self._ends.axes | {"layers": stack_axes(self._block.axes)}
        prompt = jax.eval_shape(self._prompt, jax.random.key(0))
        plain = jax.tree.map(lambda x: (None,) * x.ndim, prompt)
        return only_adapters({"layers": stack_axes(self._trained.axes)}) | plain, base

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Random (adapter, base). Layers are drawn one by one, so that no fan-in counts the layer axis."""
        ends_key, block_key = jax.random.split(key)
        layers = jax.vmap(self._block.init)(jax.random.split(block_key, self.config.num_layers))
        base = self._ends.init(ends_key) | {"layers": layers}
        return self.init_adapter(key, base), base

    def init_adapter(self, key: jax.Array, base: Params | None = None) -> Params:
        """The adapter's start, float32. `base` is the model it goes on, which DoRA starts from."""
        if self.adapter is None:
            return {}
        if base is None and self.adapter.needs_base:
            raise ValueError("this adapter starts from the base's weights: init_adapter(key, base)")
        # `init` splits the key into 0 and 1: with those the adapter would repeat the kernels' numbers.
        keys = jax.random.split(jax.random.fold_in(key, 2), self.config.num_layers)
        layers = jax.vmap(lambda k: only_adapters(self._trained.init(k)))(keys)
        key = jax.random.fold_in(key, 3)
        adapter = only_adapters({"layers": layers}) | self._prompt(key)
        return adapter if base is None else self.adapter.begin(key, adapter, base, self.config)

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
        layers = _adapt(base["layers"], self._of_layers(adapter, base)) if adapter else base["layers"]
        if cache is not None or isinstance(layers, list):
            x, kv = self._unrolled(layers, x, shared, positions, cache, key)
            cache = None if cache is None else kv
        else:
            x = self._scanned(layers, x, shared, key)[0]
        return self.finish(base, x), cache

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
        return self._block_of(params).bind()(params)(x, angles, allowed, self._context(None))

    def finish(self, base: Params, x: jax.Array) -> jax.Array:
        """What stands behind the layers: final hidden states [N, T, D]."""
        return self._bound_ends(base).final_norm(x)

    def virtual(self, embeddings: jax.Array, base: Params) -> tuple[jax.Array, jax.Array]:
        """Keys and values [L, n, K, h] of n virtual tokens [n, D] that stand before position 0.

        They see no real token, so that theirs are the same in front of every sequence.
        """
        alone = replace(self, constrain=_identity)  # one row does not divide over devices
        segments, positions = jnp.ones((1, len(embeddings)), jnp.int32), jnp.arange(-len(embeddings), 0)[None]
        x = embeddings[None].astype(self.numerics.activation)
        shared = alone._shared(segments, positions, None)
        if isinstance(base["layers"], list):
            _, kv = alone._unrolled(base["layers"], x, shared, positions, None, None)
            k, v = (jnp.stack(part) for part in zip(*kv, strict=True))
        else:
            k, v = alone._scanned(base["layers"], x, shared, None, keep=True)[1]
        return k[:, 0].transpose(0, 2, 1, 3), v[:, 0].transpose(0, 2, 1, 3)

    def _of_layers(self, adapter: Params, base: Params) -> Params:
        """What stands in the layers: the adapter's own, or what a prompt comes to in them."""
        if "prompt" not in adapter:
            return adapter["layers"]
        return prefix_tree(*self.virtual(adapter["prompt"]["adapter"], base))["layers"]

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
        self, layers: Params, x: jax.Array, shared: list[Any], key: Any, keep: bool = False
    ) -> tuple[jax.Array, Any]:
        """x behind all layers, and their stacked keys and values where they are to be kept."""
        c, context, bound = self.config, self._context(None), self._block_of(layers).bind()
        tables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shared) if len(shared) > 1 else None

        def body(x: jax.Array, layer: tuple[Params, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            params, kind, index = layer
            angles, allowed = jax.tree.map(lambda t: t[kind], tables) if tables else shared[0]
            layer_key = None if key is None else jax.random.fold_in(key, index + 1)
            x, kv = bound(params)(x, angles, allowed, context, None, layer_key)
            return x, kv if keep else None

        per_layer = (layers, jnp.array(c.layer_kinds), jnp.arange(c.num_layers))
        return jax.lax.scan(REMAT[self.remat](body), x, per_layer)

    def _unrolled(
        self,
        layers: Params | list[Params],
        x: jax.Array,
        shared: list[Any],
        positions: jax.Array,
        cache: list[KV] | None,
        key: Any,
    ) -> tuple[jax.Array, list[KV]]:
        context = self._context(None if cache is None else positions[:, 0])
        bound, out = self._block_of(layers).bind(), []
        for i, params in enumerate(unstack(layers)):
            angles, allowed = shared[self.config.layer_kinds[i]]
            layer_key = None if key is None else jax.random.fold_in(key, i + 1)
            kv = None if cache is None else cache[i]
            x, kv = bound(params)(x, angles, allowed, context, kv, layer_key)
            out.append(kv)
        return x, out

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
        """`base` with the adapter folded into its kernels (float32, then cast): what is exported. A quantised
        base becomes bfloat16, except where there is nothing to fold. Raises `UserError` for an adapter that
        cannot be folded."""
        return dequantise_base(self.adapter.merge_tree(adapter, base)) if adapter and self.adapter else base

    @property
    def deployed(self) -> Model:
        """The model over what `deploy` returns."""
        inner = None if self.adapter is None or self.adapter.foldable else self.adapter.in_layers
        return replace(self, adapter=inner)

    def deploy(self, adapter: Params | None, base: Params) -> Params:
        """Base and adapter as one tree to sample from: merged, or where that cannot be, side by side in the
        layers. `deployed` reads it, without an adapter argument."""
        if not adapter or self.adapter is None or self.adapter.foldable:
            return self.merge(adapter, base)
        return base | {"layers": _adapt(base["layers"], self._of_layers(adapter, base))}


def _adapt(layers: Params | list[Params], adapter: Params) -> Params | list[Params]:
    if isinstance(layers, list):
        return [merge_trees(a, b) for a, b in zip(layers, unstack(adapter), strict=True)]
    return merge_trees(layers, adapter)


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
