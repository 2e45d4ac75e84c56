"""Parameter-efficient adapters over linear layers. Adding a kind is one class here or beside it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from jaxalign.config import Config
from jaxalign.models.base import DecoderConfig
from jaxalign.models.layers import PRODUCT, matmul
from jaxalign.types import Params

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LoraConfig(Config):
    """Low-rank adaptation (arXiv:2106.09685, eq. 3): y = x W + s (x A) B with s = alpha / rank.

    What every kind says of itself: `key`, its name in the settings of a run; `foldable`, whether it can be
    merged into the weights; `mixes`, whether the mean of two of its trees stands between them; `rate`, its
    usual learning rate as a multiple of LoRA's; `virtual`, the tokens that it puts before position 0.
    """

    key: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    foldable: ClassVar[bool] = True
    mixes: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0
    virtual: ClassVar[int] = 0

    rank: int = Field(default=16, ge=1)
    """columns of A and rows of B"""
    alpha: float = Field(default=32.0, gt=0)
    """numerator of the scale"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """share of the adapter's input that is dropped while training"""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        default=TARGETS, min_length=1
    )
    """linear layers that get an adapter"""
    rslora: bool = False
    """rank-stabilised scale alpha / sqrt(rank) (arXiv:2312.03732)"""
    init: Literal["b_zero", "a_zero"] = "b_zero"
    """which factor starts at zero; a_zero moves away from the start faster in preference training"""
    dora: bool = False
    """train every output's magnitude apart from its direction (DoRA, arXiv:2402.09353)"""

    @property
    def scale(self) -> float:
        """s of the equation."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def needs_base(self) -> bool:
        """Whether `begin` changes anything."""
        return self.dora

    def make(
        self, name: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs
    ) -> LoRA | DoRA | None:
        """The adapter module of one linear layer, or None where `name` is not a target."""
        return (DoRA if self.dora else LoRA)(self, shape, axes, rngs) if name in self.targets else None

    def make_prefix(self, shape: tuple[int, int], rngs: nnx.Rngs) -> None:
        """Attention stays as it is."""

    def make_prompt(self, size: int, key: jax.Array) -> Params:
        """Nothing stands before the first layer."""
        return {}

    @property
    def in_layers(self) -> LoraConfig:
        """What the layers hold of it: all."""
        return self

    def begin(self, key: jax.Array, adapter: Params, base: Params, config: DecoderConfig) -> Params:
        """The part of the start that the base decides: DoRA's magnitudes are the norms of W's columns."""
        if not self.dora:
            return adapter
        if "adapter" in adapter:
            norm = column_norm(base["kernel"].astype(jnp.float32))
            return {"adapter": adapter["adapter"] | {"m": norm}}
        return {name: self.begin(key, sub, base[name], config) for name, sub in adapter.items()}

    def merge_tree(self, adapter: Params, base: Params) -> Params:
        """`base` with `merge` of every kernel that has an adapter."""
        if "adapter" in adapter:
            return base | {"kernel": self.merge(adapter["adapter"], base["kernel"])}
        return base | {name: self.merge_tree(sub, base[name]) for name, sub in adapter.items()}

    def merge(self, adapter: Params, kernel: jax.Array) -> jax.Array:
        """W + s A B (in DoRA times m / its norm) in float32, cast to the kernel's dtype. Leading axes
        (layers) are carried along."""
        delta = jnp.einsum("...ir,...ro->...io", adapter["a"], adapter["b"], precision="highest")
        merged = kernel.astype(jnp.float32) + self.scale * delta
        if self.dora:
            merged = merged * (adapter["m"] / column_norm(merged))[..., None, :]
        return merged.astype(kernel.dtype)


def column_norm(kernel: jax.Array) -> jax.Array:
    """float32 [..., out] of kernel [..., in, out], never zero: a dead output's magnitude is zero as well."""
    return jnp.maximum(jnp.sqrt(jnp.square(kernel).sum(axis=-2)), jnp.finfo(jnp.float32).tiny)


def _factors(config: LoraConfig, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> Any:
    """A [in, rank] and B [rank, out], one of them zero, the other uniform as torch draws a Linear."""
    zero = config.init == "a_zero"
    bound_a, bound_b = 1 / math.sqrt(shape[0]), 1 / math.sqrt(config.rank)
    a_shape, b_shape = (shape[0], config.rank), (config.rank, shape[1])
    draw = lambda s, bound: jax.random.uniform(rngs.params(), s, minval=-bound, maxval=bound)  # noqa: E731
    a = nnx.Param(jnp.zeros(a_shape) if zero else draw(a_shape, bound_a), logical=(axes[0], None))
    b = nnx.Param(draw(b_shape, bound_b) if zero else jnp.zeros(b_shape), logical=(None, axes[1]))
    return a, b


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share of `rate` of it zeroed and the rest scaled up; x itself without a key or a rate."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class LoRA(nnx.Module):
    """A [in, rank] and B [rank, out] in float32, applied to the activation: 2.25 forward passes a training
    step against 2.88 for W + AB."""

    def __init__(
        self, config: LoraConfig, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs
    ) -> None:
        self.a, self.b = _factors(config, shape, axes, rngs)
        self.scale, self.dropout = config.scale, config.dropout

    def __call__(self, x: jax.Array, kernel: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> float32 [..., out]."""
        dropped = _drop(x, self.dropout, key)
        low = checkpoint_name(matmul(dropped, self.a[...], dtype) * self.scale, PRODUCT)
        return matmul(x, kernel, dtype) + matmul(low, self.b[...], dtype)


class DoRA(nnx.Module):
    """Weight-decomposed LoRA (arXiv:2402.09353, eq. 5 and 6): y = x (W + s A B) m / n with m [out] trained.

    n [out] is the norm of each column of W + s A B, a constant to the gradient (section 4.3). Under dropout
    y = x W + (m / n - 1) d(x) W + (m / n) s d(x) A B, as the authors and peft have it: x W at the start.
    """

    def __init__(
        self, config: LoraConfig, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs
    ) -> None:
        self.a, self.b = _factors(config, shape, axes, rngs)
        # `LoraConfig.begin` puts the kernel's norms here.
        self.m = nnx.Param(jnp.ones(shape[1:]), logical=axes[1:])
        self.scale, self.dropout = config.scale, config.dropout

    def __call__(self, x: jax.Array, kernel: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> float32 [..., out]."""
        dropped, ratio = _drop(x, self.dropout, key), self._ratio(kernel)
        low = checkpoint_name(matmul(dropped, self.a[...], dtype) * self.scale, PRODUCT)
        whole = matmul(dropped, kernel, dtype) + matmul(low, self.b[...], dtype)
        # The gradient of m needs it.
        whole = checkpoint_name(whole.astype(dtype), PRODUCT).astype(jnp.float32)
        if dropped is x:
            return ratio * whole
        return matmul(x, kernel, dtype) - matmul(dropped, kernel, dtype) + ratio * whole

    def _ratio(self, kernel: jax.Array) -> jax.Array:
        """m / n, float32 [out]."""
        a, b = (jax.lax.stop_gradient(p[...]) for p in (self.a, self.b))
        adapted = jax.lax.stop_gradient(kernel).astype(jnp.float32) + self.scale * matmul(a, b, jnp.float32)
        return self.m[...] / checkpoint_name(column_norm(adapted), PRODUCT)
