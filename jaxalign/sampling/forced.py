"""Teacher forcing: how likely the tokens of a given text are, and which would have been likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxalign.models.decoder import Model
from jaxalign.sampling.buckets import groups
from jaxalign.sampling.engine import Engine
from jaxalign.sampling.slots import IN_FLIGHT, begin
from jaxalign.types import Params

TOP = 20  # alternatives to each token, as many as OpenAI's API gives


@dataclass(frozen=True)
class Forced:
    """The T tokens of one text, each given those before it; temperature 1. The first one is given nothing:
    its row holds nan, and ids that mean nothing.

    logp  float32 [T], of the text's own tokens
    ids   int32 [T, K], the likeliest tokens in their place, the likeliest first
    tops  float32 [T, K], their log-probabilities
    """

    logp: np.ndarray
    ids: np.ndarray
    tops: np.ndarray


def forced(engine: Engine, texts: Sequence[Sequence[int]]) -> list[Forced]:
    """What the engine's model makes of texts of one token or more, in their order."""
    found: dict[int, Forced] = {}
    for members, rows, columns in groups([len(t) for t in texts], engine.fewest):
        tokens, lengths = np.zeros((rows, columns), np.int32), np.zeros((rows,), np.int32)
        for row, member in enumerate(members):
            lengths[row] = len(texts[member])
            tokens[row, : lengths[row]] = texts[member]
        logp, ids, tops = jax.device_get(_forward(engine.model, engine.base, tokens, lengths))
        for row, member in enumerate(members):
            end = lengths[row]
            found[member] = Forced(*(_shifted(x[row, : end - 1]) for x in (logp, ids, tops)))
    return [found[i] for i in range(len(texts))]


def _shifted(x: np.ndarray) -> np.ndarray:
    """What column t says of token t + 1, moved there."""
    nothing = np.full((1, *x.shape[1:]), np.nan if x.dtype == np.float32 else 0, x.dtype)
    return np.concatenate([nothing, x])


def _forward(model: Model, base: Params, tokens: Any, lengths: Any) -> Any:
    """logp [P, T], ids and tops [P, T, K] of what follows each of tokens int32 [P, T].

    The host walks the layers, which share one compiled program, as in `slots.prefill`.
    """
    ends = {name: part for name, part in base.items() if name != "layers"}
    x, shared = begin(model, ends, tokens, lengths)
    layers = zip(model.config.layer_kinds, base["layers"], strict=True)
    for depth, (kind, params) in enumerate(layers, 1):
        x = _layer(model, params, x, shared[kind])
        if depth % IN_FLIGHT == 0:
            x.block_until_ready()
    return _likeliest(model, ends, x, np.roll(tokens, -1, axis=1))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _layer(model: Model, params: Params, x: jax.Array, shared: Any) -> jax.Array:
    return model.layer(params, x, *shared)[0]


@partial(jax.jit, static_argnums=0)
def _likeliest(model: Model, ends: Params, x: jax.Array, following: jax.Array) -> Any:
    """From x [P, T, D] behind the layers. The vocabulary is met for 64 tokens at a time."""
    hidden, count = model.finish(ends, x), min(TOP, model.config.vocab_size)

    def one(place: tuple[jax.Array, jax.Array]) -> Any:
        logits = model.logits(ends, place[0])
        lse = jax.nn.logsumexp(logits)
        tops, ids = jax.lax.top_k(logits, count)
        return logits[place[1]] - lse, ids, tops - lse

    flat = (hidden.reshape(-1, hidden.shape[-1]), following.reshape(-1))
    found = jax.lax.map(one, flat, batch_size=64)
    return jax.tree.map(lambda a: a.reshape(*following.shape, *a.shape[1:]), found)
