"""LoRA: its formula, its start, its gradients, its dropout, and merging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.models.adapters import TARGETS, LoRA, LoraConfig
from jaxalign.models.base import Functional, Numerics
from jaxalign.models.decoder import Model, parameter_count
from jaxalign.models.layers import Linear
from tests.objectives.vectors import LORA
from tests.rig import random_tree
from tests.tiny import arrays, examples, quick_jit, tiny_config, tiny_model, unpacked

CONFIG = tiny_config(qkv_bias=True)
MODEL = tiny_model(LoraConfig(rank=4, alpha=6.0), CONFIG)
BATCH = arrays(unpacked(examples(4)))


def golden_config(rslora: bool) -> LoraConfig:
    return LoraConfig(rank=int(LORA["rank"]), alpha=float(LORA["alpha"]), rslora=rslora)


def golden_factors() -> dict[str, jax.Array]:
    return {name: jnp.asarray(LORA[name]) for name in ("a", "b")}


@pytest.mark.parametrize("rslora", [False, True])
def test_vector_lora_forward(rslora: bool) -> None:
    """Through the layer as models build it: Linear with an adapter."""
    config = golden_config(rslora)
    make = lambda rngs: Linear("q", (2, 3), ("embed", "heads"), rngs, bias=False, adapter=config)  # noqa: E731
    layer = Functional(make)
    params = {"kernel": jnp.asarray(LORA["kernel"]), "adapter": golden_factors()}
    x = jnp.asarray(LORA["x"])[None]
    np.testing.assert_allclose(
        layer.bind()(params)(x, Numerics())[0], LORA["rslora" if rslora else "lora"], rtol=1e-6
    )
    np.testing.assert_allclose(x @ params["kernel"], [LORA["base"]], rtol=1e-6)
    merged = config.merge(golden_factors(), params["kernel"])
    np.testing.assert_allclose(x @ merged, [LORA["rslora" if rslora else "lora"]], rtol=1e-6)


def test_vector_merged_kernel() -> None:
    merged = golden_config(False).merge(golden_factors(), jnp.asarray(LORA["kernel"]))
    np.testing.assert_allclose(merged, LORA["merged"], rtol=1e-6)


def test_scale() -> None:
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


@pytest.mark.parametrize("init", ["b_zero", "a_zero"])
def test_start(init: str) -> None:
    """One factor is zero; the other is uniform on +-1 / sqrt(its inputs), as torch draws a Linear."""
    config = LoraConfig(rank=64, init=init)
    make = lambda rngs: LoRA(config, (400, 300), ("embed", "mlp"), rngs)  # noqa: E731
    factors = Functional(make).init(jax.random.key(0))
    assert (factors["a"].shape, factors["b"].shape) == ((400, 64), (64, 300))
    drawn, zero, fan_in = ("a", "b", 400) if init == "b_zero" else ("b", "a", 64)
    assert not factors[zero].any()
    bound = fan_in**-0.5
    assert 0.99 * bound < jnp.abs(factors[drawn]).max() <= bound
    np.testing.assert_allclose(factors[drawn].std(), bound / 3**0.5, rtol=0.02)


# --- in a model -------------------------------------------------------------------------------------------


def forward(model: Model, adapter: Any, base: Any, key: Any = None) -> jax.Array:
    rows = [x[:, 0] for x in (BATCH.tokens, BATCH.segments, BATCH.positions)]
    return model.hidden(adapter, base, *rows, key=key)[0]


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any]:
    adapter, base = MODEL.shapes()
    return random_tree(adapter, 1), random_tree(base, 0)


@pytest.fixture(scope="module")
def adapted(weights: Any) -> np.ndarray:
    """Hidden states under the random adapter."""
    return np.asarray(quick_jit(lambda a, b: forward(MODEL, a, b))(*weights))


@pytest.mark.parametrize("init", ["b_zero", "a_zero"])
def test_at_the_start_the_model_is_its_base_bit_for_bit(weights: Any, init: str) -> None:
    model = tiny_model(LoraConfig(rank=4, init=init), CONFIG)
    adapter = quick_jit(model.init_adapter)(jax.random.key(3))
    assert all(
        np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(drawn(adapter, "a" if init == "b_zero" else "b"))
    )
    got = quick_jit(lambda a, b: forward(model, a, b))(adapter, weights[1])
    assert np.array_equal(got, quick_jit(lambda b: forward(tiny_model(None, CONFIG), None, b))(weights[1]))


def drawn(adapter: Any, name: str) -> list[Any]:
    return [v for p, v in jax.tree_util.tree_leaves_with_path(adapter) if p[-1].key == name]


def test_no_adapter_is_the_base_bit_for_bit(weights: Any, adapted: np.ndarray) -> None:
    """The reference policy: the same model without the adapter argument, from the same weights in memory."""
    base = weights[1]
    reference = quick_jit(lambda b: forward(tiny_model(None, CONFIG), None, b))(base)
    assert np.array_equal(quick_jit(lambda b: forward(MODEL, None, b))(base), reference)
    assert np.abs(adapted - np.asarray(reference)).max() > 0.1


def test_layers_start_from_numbers_of_their_own() -> None:
    """No two layers, no two targets, and no kernel share random numbers with an adapter."""
    adapter, base = quick_jit(MODEL.init)(jax.random.key(0))
    factors = [np.asarray(x).reshape(2, -1)[:, :64] for x in drawn(adapter, "a")]
    flat = np.concatenate([*factors, *[np.asarray(x).reshape(2, -1)[:, :64] for x in drawn(base, "kernel")]])
    ranks = flat.argsort(-1).argsort(-1)
    related = np.corrcoef(ranks) - np.eye(len(ranks))
    assert np.abs(related).max() < 0.6


def test_gradients_are_on_the_adapter_only(weights: Any) -> None:
    """The gradient tree is the adapter's, every leaf of it moves, and nothing of the base is in it."""
    adapter, base = weights
    grads = quick_jit(jax.grad(lambda a, b: jnp.square(forward(MODEL, a, b)).sum()))(adapter, base)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(grads)]
    assert all("'adapter'" in p for p in paths)
    assert len(paths) == 2 * len(TARGETS)


def test_size_is_that_of_the_factors() -> None:
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}
    sizes |= {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    want = 2 * sum(4 * (i + o) for i, o in sizes.values())
    assert parameter_count(MODEL.shapes()[0]) == want


def test_merged_weights_give_the_same_model(weights: Any, adapted: np.ndarray) -> None:
    adapter, base = weights
    merged = quick_jit(MODEL.merge)(adapter, base)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got = quick_jit(lambda b: forward(tiny_model(None, CONFIG), None, b))(merged)
    np.testing.assert_allclose(got, adapted, atol=1e-4)
    untouched = ("attn_norm", "mlp_norm")
    assert all(merged["layers"][n]["scale"] is not None for n in untouched)
    assert np.array_equal(merged["layers"]["attn"]["q"]["bias"], base["layers"]["attn"]["q"]["bias"])
    assert np.array_equal(merged["embed"]["embedding"], base["embed"]["embedding"])


def test_merging_into_bfloat16_rounds_once(weights: Any, adapted: np.ndarray) -> None:
    """The sum is made in float32 and then cast; hidden states move by less than 2e-2 of the largest."""
    adapter, base = jax.tree.map(jnp.asarray, weights)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merge = quick_jit(MODEL.merge)
    merged = merge(adapter, low)
    a, b = (adapter["layers"]["mlp"]["up"]["adapter"][n] for n in "ab")
    kernel = low["layers"]["mlp"]["up"]["kernel"].astype(jnp.float32)
    want = (kernel + 1.5 * jnp.einsum("lir,lro->lio", a, b)).astype(jnp.bfloat16)
    got = merged["layers"]["mlp"]["up"]["kernel"]
    assert got.dtype == jnp.bfloat16
    assert (np.asarray(got != want)).mean() < 1e-3  # sums that lie on a rounding boundary
    small = jax.tree.map(lambda x: 0.1 * x, adapter)
    wide = tiny_model(None, CONFIG)
    a = quick_jit(lambda a, b: forward(MODEL, a, b))(small, low)
    b = quick_jit(lambda b: forward(wide, None, b))(merge(small, low))
    assert np.abs(np.asarray(a - b)).max() < 2e-2 * np.abs(np.asarray(a)).max()


def test_merging_nothing_is_the_base(weights: Any) -> None:
    assert MODEL.merge(None, weights[1]) is weights[1]
    assert tiny_model(None, CONFIG).merge({}, weights[1]) is weights[1]


def test_some_targets_only(weights: Any) -> None:
    """Adapters exist at the targets and nowhere else; the rest of the model is the base."""
    model = tiny_model(LoraConfig(rank=2, targets=("v", "down")), CONFIG)
    adapter, _ = model.shapes()
    paths = {tuple(k.key for k in p) for p, _ in jax.tree_util.tree_leaves_with_path(adapter)}
    assert paths == {
        ("layers", part, name, "adapter", factor)
        for part, name in (("attn", "v"), ("mlp", "down"))
        for factor in "ab"
    }
    tree = random_tree(adapter, 1)
    got = quick_jit(lambda a, b: forward(model, a, b))(tree, weights[1])
    merged = quick_jit(lambda b: forward(tiny_model(None, CONFIG), None, b))(
        quick_jit(model.merge)(tree, weights[1])
    )
    np.testing.assert_allclose(got, merged, atol=1e-4)


def test_without_an_adapter_the_tree_is_empty() -> None:
    model = tiny_model(None, CONFIG)
    assert model.shapes()[0] == {}
    assert model.axes()[0] == {}
    assert model.init_adapter(jax.random.key(0)) == {}


# --- dropout ----------------------------------------------------------------------------------------------


def test_dropout_keeps_the_expectation_and_spares_the_base() -> None:
    """Over many draws the mean is the undropped output; each draw drops about its share of the inputs."""
    config = replace_config(LoraConfig(rank=3, alpha=3.0), dropout=0.25)
    rng = np.random.default_rng(0)
    a, b, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((40, 3), (3, 5), (40, 5)))
    layer = nnx.merge(
        nnx.split(LoRA(config, (40, 5), ("a", "b"), nnx.Rngs(0)))[0], nnx.State({"a": a, "b": b})
    )
    x = jnp.ones((1, 40))
    plain = layer(x, w, jnp.float32, None)
    np.testing.assert_allclose(plain, x @ w + (x @ a) @ b, rtol=1e-4, atol=1e-4)
    many = quick_jit(jax.vmap(lambda k: layer(x, w, jnp.float32, k)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    error = np.asarray(many).std(0) / 4000**0.5
    assert (np.abs(many.mean(0) - plain) < 5 * error).all()
    assert (error > 0).all()
    # Identity factors show which inputs were dropped, and that the rest is scaled by 1 / (1 - p).
    eye = LoRA(replace_config(config, rank=40, alpha=40.0), (40, 40), ("a", "b"), nnx.Rngs(0))
    shown = nnx.merge(nnx.split(eye)[0], nnx.State({"a": jnp.eye(40), "b": jnp.eye(40)}))
    out = shown(jnp.ones((200, 40)), jnp.zeros((40, 40)), jnp.float32, jax.random.key(1))
    values, counts = np.unique(np.asarray(out).round(4), return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], atol=1e-4)
    np.testing.assert_allclose(counts[0] / counts.sum(), 0.25, atol=0.02)


def replace_config(config: LoraConfig, **fields: Any) -> LoraConfig:
    return LoraConfig(**(config.model_dump() | fields))


def test_dropout_comes_with_a_key_only_and_differs_by_layer(weights: Any, adapted: np.ndarray) -> None:
    model = replace(MODEL, adapter=replace_config(LoraConfig(rank=4, alpha=6.0), dropout=0.3))
    run = quick_jit(lambda a, b, k: forward(model, a, b, k))
    quiet = quick_jit(lambda a, b: forward(model, a, b))(*weights)
    assert np.array_equal(quiet, adapted)
    one, same, other = (np.asarray(run(*weights, jax.random.key(i))) for i in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.abs(one - adapted)[np.asarray(BATCH.segments[:, 0]) > 0].min(-1).max() > 0


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ("lm_head",)}, {"targets": ()}]
)
def test_values_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraConfig(**bad)
