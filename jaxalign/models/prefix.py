"""Adapters that are virtual tokens in front of every sequence: prefix tuning and prompt tuning.

Real tokens keep their positions, from 0 on, and every packed segment sees the virtual ones, in layers with a
window too. Neither kind can be folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, NoReturn, Self

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, model_validator

from jaxalign.config import Config
from jaxalign.errors import UserError
from jaxalign.models.base import DecoderConfig
from jaxalign.models.rope import rotate
from jaxalign.types import Params

_STD = 0.02


class PrefixConfig(Config):
    """Prefix tuning (arXiv:2101.00190, without its reparameterisation): keys and values that every token of
    every layer attends to. Zero is no neutral start: a zero key takes its share of the softmax."""

    key: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    needs_base: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    rate: ClassVar[float] = 150.0

    length: int = Field(default=20, ge=1)
    """number of virtual tokens"""

    @property
    def virtual(self) -> int:
        """Tokens that stand before position 0."""
        return self.length

    def make(self, name: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> None:
        """Linear layers stay as they are."""

    def make_prefix(self, shape: tuple[int, int], rngs: nnx.Rngs) -> Prefix:
        """The keys and values of one layer with (key-value heads, head size)."""
        return Prefix(self.length, shape, rngs)

    def make_prompt(self, size: int, key: jax.Array) -> Params:
        """Nothing stands before the first layer."""
        return {}

    @property
    def in_layers(self) -> PrefixConfig:
        """What the layers hold of it: all."""
        return self

    def begin(self, key: jax.Array, adapter: Params, base: Params, config: DecoderConfig) -> Params:
        """The start, which does not depend on the base."""
        return adapter

    def merge_tree(self, adapter: Params, base: Params) -> NoReturn:
        """Raises `UserError`."""
        _refuse_merge("prefix")


class Prefix(nnx.Module):
    """Keys and values [n, K, h] of one layer, as attention sees them: behind norm and rotation."""

    def __init__(self, length: int, shape: tuple[int, int], rngs: nnx.Rngs) -> None:
        draw = lambda: _STD * jax.random.normal(rngs.params(), (length, *shape))  # noqa: E731
        self.k = nnx.Param(draw(), logical=(None, "kv_heads", None))
        self.v = nnx.Param(draw(), logical=(None, "kv_heads", None))

    def __call__(self, k: jax.Array, v: jax.Array, allowed: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values [N, K, n + S, h], and allowed [N, T, n + S]: everyone sees the prefix."""
        own = (x[...].transpose(1, 0, 2) for x in (self.k, self.v))
        both = [
            jnp.concatenate([jnp.broadcast_to(mine, (len(x), *mine.shape)).astype(x.dtype), x], axis=2)
            for mine, x in zip(own, (k, v), strict=True)
        ]
        before = ((0, 0), (0, 0), (both[0].shape[2] - k.shape[2], 0))
        return *both, jnp.pad(allowed, before, constant_values=True)


class PromptConfig(Config):
    """Prompt tuning (arXiv:2104.08691): trained vectors where the embeddings of n tokens would stand."""

    key: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    foldable: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    rate: ClassVar[float] = 50.0

    length: int = Field(default=20, ge=1)
    """number of virtual tokens"""
    init: Literal["vocab", "normal"] = "vocab"
    """start from the embeddings of tokens, or from small random numbers"""
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """ids of the tokens to start from, repeated or cut to length; none draws them at random"""
    text: str = ""
    """words to start from, repeated or cut to length, in place of tokens"""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        chosen = [name for name in ("tokens", "text") if getattr(self, name)]
        chosen += ["init=normal"] if self.init == "normal" else []
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are two ways to start: leave one of them out")
        return self

    @property
    def virtual(self) -> int:
        """Tokens that stand before position 0."""
        return self.length

    def spelled(self, encode: Callable[[str], Sequence[int]]) -> PromptConfig:
        """The same with the words of `text` as `tokens`."""
        return self.model_copy(update={"tokens": tuple(encode(self.text)), "text": ""}) if self.text else self

    @property
    def needs_base(self) -> bool:
        """Whether the start is made of the base's embeddings."""
        return self.init == "vocab"

    def make(self, name: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> None:
        """Linear layers stay as they are."""

    def make_prefix(self, shape: tuple[int, int], rngs: nnx.Rngs) -> None:
        """Nothing in attention is trained."""

    def make_prompt(self, size: int, key: jax.Array) -> Params:
        """The vectors [n, D], as the first layer sees them."""
        return {"prompt": {"adapter": _STD * jax.random.normal(key, (self.length, size))}}

    @property
    def in_layers(self) -> PrefixConfig:
        """What the layers hold of it: the keys and values that the vectors come to (`Model.virtual`)."""
        return PrefixConfig(length=self.length)

    def begin(self, key: jax.Array, adapter: Params, base: Params, config: DecoderConfig) -> Params:
        """The start from the base's embeddings, where that is asked for. Raises `UserError` for tokens that
        the model has not, and `ValueError` for words, which only a tokenizer can turn into tokens."""
        if not self.needs_base:
            return adapter
        if self.text:
            raise ValueError("words to start from are turned into tokens first: PromptConfig.spelled")
        if max(self.tokens, default=0) >= config.vocab_size:
            raise UserError(
                f"there is no token {max(self.tokens)}, the model knows 0 to {config.vocab_size - 1}",
                place="prompt.tokens",
                remedy="name tokens of this model, or words with prompt.text",
            )
        ids = jnp.asarray(self.tokens or (0,), jnp.int32)[jnp.arange(self.length) % max(len(self.tokens), 1)]
        if not self.tokens:
            ids = jax.random.randint(key, (self.length,), 0, config.vocab_size)
        rows = base["embed"]["embedding"][ids].astype(jnp.float32) * config.embed_scale
        return {"prompt": {"adapter": rows}}

    def merge_tree(self, adapter: Params, base: Params) -> NoReturn:
        """Raises `UserError`."""
        _refuse_merge("prompt")


def _refuse_merge(kind: str) -> NoReturn:
    raise UserError(
        f"a trained {kind} cannot be folded into the weights",
        remedy="export it in PEFT form, which peft and transformers load on top of the base",
    )


def prefix_tree(k: jax.Array, v: jax.Array) -> Params:
    """Keys and values [L, n, K, h] as the adapter of prefix tuning."""
    return {"layers": {"attn": {"adapter": {"k": k, "v": v}}}}


def pack_prefix(adapter: Params, config: DecoderConfig) -> jax.Array:
    """The adapter of prefix tuning as peft stores it: [n, L * 2 * K * h]."""
    own = adapter["layers"]["attn"]["adapter"]
    n = own["k"].shape[1]
    both = jnp.stack([turned(own["k"], config, n), own["v"]], axis=1)  # [L, 2, n, K, h]
    return both.transpose(2, 0, 1, 3, 4).reshape(n, -1)


def unpack_prefix(stored: jax.Array, config: DecoderConfig) -> Params:
    """The reverse of `pack_prefix`."""
    shape = (len(stored), config.num_layers, 2, config.num_kv_heads, config.head_dim)
    both = stored.reshape(shape).transpose(1, 2, 0, 3, 4)
    return prefix_tree(turned(both[:, 0], config, -len(stored)), both[:, 1])


def turned(k: jax.Array, config: DecoderConfig, by: int) -> jax.Array:
    """Keys [L, n, K, h] rotated by so many positions, each layer's by its own angles.

    peft counts a prefix in the positions of the tokens behind it. Rotation is relative: a query at p sees a
    key as a query at p + n sees the key rotated by n, so that one becomes the other.
    """
    layers = []
    for keys, kind in zip(k, config.layer_kinds, strict=True):
        cos, sin = config.kinds[kind][0].angles(jnp.full((1, 1), by))
        length = jnp.sqrt(jnp.square(cos) + jnp.square(sin))  # not 1 where angles carry a factor (YaRN)
        layers.append(rotate(keys[:, None], cos / length, sin / length)[:, 0])
    return jnp.stack(layers)
