"""A tiny decoder, random examples, several ways to lay them out as a batch, and fast compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Model
from jaxalign.models.rope import Rope
from jaxalign.types import Batch, Params

V, D = 96, 32
Pair = tuple[np.ndarray, np.ndarray]  # tokens int32 [t] and mask bool [t] of one example


def tiny_config(**fields: Any) -> DecoderConfig:
    """Two Llama layers: H 4, K 2, head size 8, V 96. `fields` are overridden."""
    rope = Rope("default", 10000.0, fields.get("head_dim", 8), 64)
    layers = fields.get("num_layers", 2)
    plain: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-5,
        "activation": "silu",
        "tied": True,
        "max_positions": 64,
        "kinds": ((rope, 0),),
        "layer_kinds": (0,) * layers,
        "attention_scale": 8**-0.5,
    }
    return DecoderConfig(**(plain | fields))


def tiny_model(adapter: Any = None, config: DecoderConfig | None = None, **fields: Any) -> Model:
    """A `Model` over `tiny_config()`; `fields` are those of `Model`."""
    return Model(config or tiny_config(), adapter=adapter, **fields)


def noisy(tree: Params, seed: int, size: float = 0.1) -> Params:
    """`tree` plus normal noise of standard deviation `size`, so that nothing is zero or one by luck."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + size * rng.standard_normal(x.shape).astype(x.dtype), tree)


def examples(count: int, seed: int = 0, shortest: int = 4, longest: int = 16) -> list[Pair]:
    """Random examples of very unequal numbers of targets; tokens 0 and 2 are ordinary ones."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        length = int(rng.integers(shortest, longest + 1))
        prompt = int(rng.integers(1, length))
        out.append((rng.integers(0, V, length).astype(np.int32), np.arange(length) >= prompt))
    return out


def lay_out(rows: list[list[Pair]], length: int, pad: int = 0) -> Batch:
    """[B, 1, length]: each row holds its examples one after the other; positions of padding are 0."""
    shape = (len(rows), 1, length)
    tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for n, row in enumerate(rows):
        at = 0
        for number, (ids, trained) in enumerate(row, start=1):
            piece = (n, 0, slice(at, at + len(ids)))
            tokens[piece], mask[piece], segments[piece] = ids, trained, number
            positions[piece] = np.arange(len(ids))
            at += len(ids)
    return Batch(tokens, mask, segments, positions)


def unpacked(pairs: list[Pair], length: int = 16, pad: int = 0) -> Batch:
    """One example a row."""
    return lay_out([[pair] for pair in pairs], length, pad)


def packed(pairs: list[Pair], length: int, rows: int) -> Batch:
    """Several examples a row, in exactly `rows` rows, of which some may be empty: the longest first, each
    into the emptiest row."""
    bins: list[list[Pair]] = [[] for _ in range(rows)]
    for pair in sorted(pairs, key=lambda p: -len(p[0])):
        target = min(bins, key=lambda b: sum(len(t) for t, _ in b))
        target.append(pair)
        assert sum(len(t) for t, _ in target) <= length
    return lay_out(bins, length)


def micro(batch: Batch, count: int) -> Batch:
    """[B, G, T] cut into `count` micro-batches: [count, B / count, G, T]."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def arrays(batch: Batch) -> Batch:
    """The same batch as JAX arrays."""
    return jax.tree.map(jnp.asarray, batch)


@cache
def quick() -> dict[str, Any]:
    """Options that compile three times as fast, for programs that run a few times on tiny arrays."""
    known = {}
    for option, value in {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}.items():
        try:
            jax.jit(lambda x: x + 1, compiler_options={option: value})(1.0)
        except jax.errors.JaxRuntimeError as error:  # the names change between releases
            if "No such compile option" not in str(error):
                raise
        else:
            known[option] = value
    return known


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` with `quick()`."""
    return jax.jit(function, compiler_options=quick(), **options)
