"""Parameter-efficient adapters over linear layers. Adding a kind is one class here or beside it."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from jaxalign.config import Config
from jaxalign.models.layers import PRODUCT, matmul
from jaxalign.types import Params

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LoraConfig(Config):
    """Low-rank adaptation (arXiv:2106.09685, eq. 3): y = x W + s (x A) B with s = alpha / rank."""

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

    @property
    def scale(self) -> float:
        """s of the equation."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def make(self, name: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> LoRA | None:
        """The adapter module of one linear layer, or None where `name` is not a target."""
        return LoRA(self, shape, axes, rngs) if name in self.targets else None

    def merge(self, adapter: Params, kernel: jax.Array) -> jax.Array:
        """W + s A B in float32, cast to the kernel's dtype. Leading axes (layers) are carried along."""
        delta = jnp.einsum("...ir,...ro->...io", adapter["a"], adapter["b"], precision="highest")
        return (kernel.astype(jnp.float32) + self.scale * delta).astype(kernel.dtype)


class LoRA(nnx.Module):
    """A [in, rank] and B [rank, out] in float32, applied to the activation: 2.25 forward passes a training
    step against 2.88 for W + AB."""

    def __init__(
        self, config: LoraConfig, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs
    ) -> None:
        zero = config.init == "a_zero"
        bound_a, bound_b = 1 / math.sqrt(shape[0]), 1 / math.sqrt(config.rank)
        a_shape, b_shape = (shape[0], config.rank), (config.rank, shape[1])
        draw = lambda s, bound: jax.random.uniform(rngs.params(), s, minval=-bound, maxval=bound)  # noqa: E731
        self.a = nnx.Param(jnp.zeros(a_shape) if zero else draw(a_shape, bound_a), logical=(axes[0], None))
        self.b = nnx.Param(draw(b_shape, bound_b) if zero else jnp.zeros(b_shape), logical=(None, axes[1]))
        self.scale, self.dropout = config.scale, config.dropout

    def __call__(self, x: jax.Array, kernel: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> float32 [..., out]."""
        dropped = x
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            dropped = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low = checkpoint_name(matmul(dropped, self.a[...], dtype) * self.scale, PRODUCT)
        return matmul(x, kernel, dtype) + matmul(low, self.b[...], dtype)
