"""Linear, norm and embedding layers, and the one matrix product they are made of."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.base import Numerics
from jaxalign.models.quant import Quantised

# Names the results of matrix products, which rematerialisation may keep while it computes the rest again.
PRODUCT = "product"


def dot(x: jax.Array, w: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    """Products of x and w [*batch, m, n] over one of the last two axes of each, with operands of `dtype`:
    float32 [*batch, rest of x, rest of w]."""
    x, w = x.astype(dtype), w.astype(dtype)
    if contract == (0, 0):
        return jax.lax.platform_dependent(x, w, cpu=_turned_dot, default=partial(_dot, contract))
    return _dot(contract, x, w)


def _dot(contract: tuple[int, int], x: jax.Array, w: jax.Array) -> jax.Array:
    batch = tuple(range(w.ndim - 2))
    dims = (((len(batch) + contract[0],), (len(batch) + contract[1],)), (batch, batch))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _turned_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x^T w for XLA's CPU backend, whose fast products (and those in bfloat16) take no transposed operand and
    want a wide result: the narrower operand is turned first. The barriers keep XLA from turning it back."""
    turn, barrier = partial(jnp.swapaxes, axis1=-1, axis2=-2), jax.lax.optimization_barrier
    if w.shape[-1] < x.shape[-1]:
        return turn(barrier(_dot((1, 0), barrier(turn(w)), x)))
    return _dot((1, 0), barrier(turn(x)), w)


def _rows(x: jax.Array, w: jax.Array) -> jax.Array:
    return x.reshape(*w.shape[:-2], -1, x.shape[-1])


def matmul(x: jax.Array, w: jax.Array | Quantised, dtype: Any) -> jax.Array:
    """x [*batch, ..., in] @ w [*batch, in, out] -> float32 [*batch, ..., out], operands cast to `dtype`.

    The gradient is written out so that its two products contract plain rows, take `dtype` operands and
    accumulate in float32 too: automatic differentiation would multiply in float32 or round the result.
    A quantised w gets no gradient.
    """
    product: Any = _quantised_matmul if isinstance(w, Quantised) else _matmul
    return product(x, w, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    return dot(_rows(x, w), w, (1, 0), dtype).reshape(*x.shape[:-1], w.shape[-1])


def _matmul_forward(x: jax.Array, w: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # The empty array carries the dtype of x, which the gradient must have, at no cost.
    return matmul(x, w, dtype), (x.astype(dtype), w, jnp.zeros((0,), x.dtype))


def _matmul_backward(dtype: Any, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[Any, Any]:
    x, w, like = saved
    g_rows, x_rows = _rows(g, w), _rows(x, w)
    dx = dot(g_rows, w, (1, 1), dtype).reshape(x.shape)
    dw = dot(x_rows, g_rows, (0, 0), dtype)
    return dx.astype(like.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantised_matmul(x: jax.Array, w: Quantised, dtype: Any) -> jax.Array:
    matrix, scale = w.parts(dtype)
    return (dot(_rows(x, matrix), matrix, (1, 0), dtype) * scale).reshape(*x.shape[:-1], w.shape[-1])


def _quantised_forward(x: jax.Array, w: Quantised, dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    # The dense matrix is not kept but made again: it would be four times as large as what it is made of.
    return _quantised_matmul(x, w, dtype), (w, jnp.zeros((0,), x.dtype))


def _quantised_backward(dtype: Any, saved: tuple[Any, ...], g: jax.Array) -> tuple[Any, None]:
    w, like = saved
    matrix, scale = w.parts(dtype)
    dx = dot(_rows(g * scale, matrix), matrix, (1, 1), dtype).reshape(*g.shape[:-1], w.shape[-2])
    return dx.astype(like.dtype), None


_quantised_matmul.defvjp(_quantised_forward, _quantised_backward)


class AdapterConfig(Protocol):
    """A kind of adapter, as layers see it."""

    def make(self, name: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> Any:
        """The adapter module of the layer called `name` with kernel `shape`, or None if it is no target.

        The module is called as `module(x, kernel, dtype, key)` and returns the adapted product in float32.
        """
        ...

    def make_prefix(self, shape: tuple[int, int], rngs: nnx.Rngs) -> Any:
        """What an attention layer with (key-value heads, head size) attends to besides its tokens, or None.

        The module is called as `module(k, v, allowed)` and returns all three with its own in front.
        """
        ...


class Linear(nnx.Module):
    """y = x W (+ b), with an optional adapter that takes over the product."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        *,
        bias: bool,
        adapter: AdapterConfig | None,
    ) -> None:
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape), logical=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1:]), logical=axes[1:]) if bias else None
        self.adapter = adapter.make(name, shape, axes, rngs) if adapter else None

    def __call__(self, x: jax.Array, numerics: Numerics, key: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out] in the activation dtype; `key` draws the adapter's dropout."""
        if self.adapter is None:
            y = matmul(x, self.kernel[...], numerics.compute)
        else:
            # Half the memory for what the gradient keeps. A product that stands alone stays in float32: XLA
            # would make the cast its output type, which is slow on a CPU.
            y = self.adapter(x, self.kernel[...], numerics.compute, key).astype(numerics.compute)
        y = checkpoint_name(y, PRODUCT).astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(numerics.activation)


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467, eq. 4) in float32; gemma's scale is stored less `offset`."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset), logical=(None,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class Embedding(nnx.Module):
    """One vector for each token [V, D]: the embedding, and the head where it has its own."""

    def __init__(self, vocab: int, size: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (vocab, size)), logical=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, numerics: Numerics) -> jax.Array:
        """int32 [N, T] -> [N, T, D]."""
        return self.embedding[...][tokens].astype(numerics.activation)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
