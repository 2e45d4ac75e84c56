"""The matrix product and its written-out gradient, norms and embeddings."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.models.base import Functional, Numerics
from jaxalign.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, dot, matmul

SHAPES = {
    "rows": ((5, 4), (4, 3)),
    "batch and time": ((2, 5, 4), (4, 3)),
    "batched": ((2, 5, 4), (2, 4, 3)),
    "heads sharing": ((2, 3, 5, 2, 4), (2, 3, 4, 6)),
}


def operands(shapes: tuple[Any, Any], dtype: Any = np.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s).astype(np.float32), dtype) for s in shapes]


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [*batch, ..., in] @ w [*batch, in, out] by broadcasting."""
    between = x.ndim - w.ndim
    w = w.reshape(*w.shape[:-2], *[1] * between, *w.shape[-2:]) if w.ndim > 2 else w
    return x @ w


@pytest.mark.parametrize("case", SHAPES)
def test_matmul_and_its_gradient(case: str) -> None:
    x, w = operands(SHAPES[case])
    out = matmul(x, w, jnp.float32)
    np.testing.assert_allclose(out, plain(x, w), rtol=1e-5, atol=1e-6)
    g = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    got = jax.vjp(lambda x, w: matmul(x, w, jnp.float32), x, w)[1](g)
    want = jax.vjp(plain, x, w)[1](g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_matmul_in_bfloat16_accumulates_in_float32() -> None:
    """Operands are rounded, results are not: exact for rounded operands, forward and backward."""
    x, w = operands(((64, 300), (300, 7)), jnp.bfloat16)
    out, back = jax.vjp(lambda x, w: matmul(x, w, jnp.bfloat16), x.astype(jnp.float32), w.astype(jnp.float32))
    assert out.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(out, exact, atol=2e-5)
    g = operands(((64, 7), (1, 1)), jnp.bfloat16)[0]
    dx, dw = back(g.astype(jnp.float32))
    assert (dx.dtype, dw.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(dx, np.asarray(g, np.float64) @ np.asarray(w, np.float64).T, atol=2e-5)
    np.testing.assert_allclose(dw, np.asarray(x, np.float64).T @ np.asarray(g, np.float64), atol=2e-5)


@pytest.mark.parametrize("dtypes", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtypes: tuple[Any, Any]) -> None:
    x, w = operands(SHAPES["batch and time"])
    x, w = x.astype(dtypes[0]), w.astype(dtypes[1])
    dx, dw = jax.grad(lambda x, w: matmul(x, w, jnp.bfloat16).sum(), (0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == dtypes
    assert (dx.shape, dw.shape) == (x.shape, w.shape)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_products_of_bfloat16_take_bfloat16_operands(platform: str) -> None:
    """All three of them, in the program: none has quietly become a float32 product. Only the CPU's turns an
    operand first."""
    x, w = operands(SHAPES["batch and time"])
    gradient = jax.jit(jax.value_and_grad(lambda x, w: matmul(x, w, jnp.bfloat16).sum(), (0, 1)))
    text = gradient.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    dots = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
    assert len(dots) == 3
    for operand_types, result in dots:
        assert operand_types.count("xbf16>") == 2
        assert "xf32>" in result
    assert ("optimization_barrier" in text) == (platform == "cpu")


@pytest.mark.parametrize("shapes", [((7, 40), (7, 3)), ((7, 3), (7, 40)), ((2, 3, 7, 5), (2, 3, 7, 9))])
def test_product_with_a_transposed_operand(shapes: Any) -> None:
    """Whichever of the two is narrower, and in batches."""
    x, w = operands(shapes)
    got = jax.jit(lambda x, w: dot(x, w, (0, 0), jnp.float32))(x, w)
    np.testing.assert_allclose(got, np.swapaxes(np.asarray(x), -1, -2) @ np.asarray(w), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    make = lambda rngs: Linear("q", (4, 3), ("embed", "heads"), rngs, bias=bias, adapter=None)  # noqa: E731
    layer = Functional(make)
    assert layer.axes == {"kernel": ("embed", "heads")} | ({"bias": ("heads",)} if bias else {})
    x, w = operands(SHAPES["batch and time"])
    params = {"kernel": w} | ({"bias": jnp.asarray([1.0, 2.0, 3.0])} if bias else {})
    want = x @ w + (params["bias"] if bias else 0)
    np.testing.assert_allclose(layer.bind()(params)(x, Numerics()), want, rtol=1e-5, atol=1e-6)
    half = layer.bind()(params)(x, Numerics(jnp.bfloat16, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    """x / sqrt(mean(x^2) + eps) * (scale + offset) in float32, whatever comes in; at first the plain norm."""
    norm = Functional(lambda rngs: RMSNorm(6, 1e-2, offset))
    x = operands(((3, 6), (1, 1)))[0]
    unit = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm.bind()(norm.init(jax.random.key(0)))(x), unit, rtol=1e-5)
    scale = jnp.arange(6.0)
    got = norm.bind()({"scale": scale})(x)
    np.testing.assert_allclose(got, unit * (np.arange(6.0) + offset), rtol=1e-5)
    big = norm.bind()({"scale": scale.astype(jnp.bfloat16)})(jnp.full((1, 6), 1e20, jnp.bfloat16))
    assert big.dtype == jnp.bfloat16
    assert np.isnan(np.asarray(big, np.float32)).sum() == 0


def test_embedding() -> None:
    table = operands(((9, 4), (1, 1)))[0]
    layer = Functional(lambda rngs: Embedding(9, 4, rngs))
    assert layer.axes == {"embedding": ("vocab", "embed")}
    tokens = jnp.asarray([[0, 8, 3]])
    got = layer.bind()({"embedding": table})(tokens, Numerics(jnp.bfloat16, jnp.float32))
    np.testing.assert_array_equal(got, table[tokens])


def test_initial_weights_do_not_depend_on_the_fan_in_of_other_axes() -> None:
    """Kernels start at variance 1 / in; the stacked layers of a model are drawn one by one."""
    layer = Functional(
        lambda rngs: Linear("q", (256, 64), ("embed", "heads"), rngs, bias=False, adapter=None)
    )
    kernels = jax.vmap(layer.init)(jax.random.split(jax.random.key(0), 5))["kernel"]
    np.testing.assert_allclose(kernels.std((1, 2)), 1 / 16, rtol=0.02)
    assert len(np.unique(np.asarray(kernels[:, 0, 0]))) == 5


def test_activations_are_those_of_their_names() -> None:
    x = jnp.asarray([-2.0, -0.5, 0.0, 1.0, 3.0])
    erf = np.vectorize(__import__("math").erf)
    want = {
        "silu": x / (1 + np.exp(-x)),
        "gelu": x * (1 + erf(np.asarray(x) / np.sqrt(2))) / 2,
        "gelu_pytorch_tanh": x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": np.maximum(x, 0),
    }
    assert want.keys() == ACTIVATIONS.keys()
    for name, function in ACTIVATIONS.items():
        np.testing.assert_allclose(function(x), want[name], rtol=1e-5, atol=1e-6)


def test_functional_keeps_out_what_is_not_a_parameter() -> None:
    """Shapes, axes and random parameters are one and the same tree."""
    layer = Functional(
        lambda rngs: nnx.Sequential(
            RMSNorm(4, 1e-5), Linear("o", (4, 4), ("a", "b"), rngs, bias=True, adapter=None)
        )
    )
    shapes, axes, params = layer.shapes, layer.axes, layer.init(jax.random.key(0))
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    assert paths == [p for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    assert paths == [p for p, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)]
