"""The decoder as pure functions: what a token sees, the two ways through the layers, decoding, its trees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import DecoderConfig, Numerics, merge_trees
from jaxalign.models.decoder import Model, parameter_count, unstack
from jaxalign.models.rope import Rope
from jaxalign.registry import FAMILIES
from tests.objectives.vectors import NEFTUNE
from tests.rig import random_tree
from tests.tiny import V, quick_jit, tiny_config, tiny_model

N, T = 2, 10
EVERYTHING = tiny_config(
    num_layers=3,
    kinds=((Rope("default", 10000.0, 8, 64), 0), (Rope("default", 500.0, 8, 64), 4)),
    layer_kinds=(1, 0, 1),
    attention_softcap=20.0,
    final_softcap=10.0,
    embed_scale=3.0,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    tied=False,
)
MODEL = tiny_model(LoraConfig(rank=2, targets=("q", "down"), dropout=0.3), EVERYTHING, neftune_alpha=2.0)


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any]:
    """(adapter, base) of MODEL."""
    adapter, base = MODEL.shapes()
    return jax.tree.map(jnp.asarray, (random_tree(adapter, 1), random_tree(base, 0)))


@pytest.fixture(scope="module")
def run(weights: Any) -> Any:
    """run(tokens, segments, positions) -> hidden [N, T, D] of the adapted model, one compiled program."""
    jitted = quick_jit(lambda *args: MODEL.hidden(*args)[0])
    return lambda *rows: np.asarray(jitted(*weights, *rows))


@pytest.fixture
def rows() -> list[np.ndarray]:
    """tokens, segments and positions of two full rows."""
    tokens = np.random.default_rng(0).integers(0, V, (N, T)).astype(np.int32)
    return [tokens, np.ones((N, T), np.int32), np.broadcast_to(np.arange(T, dtype=np.int32), (N, T)).copy()]


def test_no_token_sees_a_later_one(run: Any, rows: list[np.ndarray]) -> None:
    want = run(*rows)
    rows[0][:, 6] = (rows[0][:, 6] + 1) % V
    got = run(*rows)
    assert np.array_equal(got[:, :6], want[:, :6])
    assert (np.abs(got - want).max(-1)[:, 6:] > 0).all()


def test_packed_examples_do_not_see_each_other(run: Any, rows: list[np.ndarray]) -> None:
    """Bit for bit; and each gives what it gives at the start of a row of its own."""
    tokens, segments, positions = rows
    alone = run(*rows)
    segments[0], positions[0] = [1] * 4 + [2] * 6, [*range(4), *range(6)]
    tokens[0, 4:] = tokens[1, :6]
    packed = run(*rows)
    np.testing.assert_allclose(packed[0, 4:], alone[1, :6], atol=1e-5)
    tokens[0, 1] = (tokens[0, 1] + 1) % V
    assert np.array_equal(run(*rows)[0, 4:], packed[0, 4:])
    tokens[0, 7] = (tokens[0, 7] + 1) % V
    changed = run(*rows)
    assert np.array_equal(changed[0, :7], run(*rows)[0, :7])
    assert (np.abs(changed - packed)[0, 7:].max(-1) > 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(run: Any, rows: list[np.ndarray], side: str) -> None:
    """Six real tokens beside four of padding: as the first six of a full row, whatever the padding is."""
    want = run(*rows)[:, :6]
    tokens, segments, positions = rows
    real = slice(4, 10) if side == "left" else slice(0, 6)
    padded = [np.full((N, T), 7, np.int32), np.zeros((N, T), np.int32), np.zeros((N, T), np.int32)]
    for new, old in zip(padded, (tokens, segments, positions), strict=True):
        new[:, real] = old[:, :6]
    got = run(*padded)
    np.testing.assert_allclose(got[:, real], want, atol=1e-5)
    assert np.isfinite(got).all()
    padded[0][:, [i for i in range(T) if not real.start <= i < real.stop]] = 50
    assert np.array_equal(run(*padded)[:, real], got[:, real])


def test_positions_of_padding_do_not_matter(rows: list[np.ndarray]) -> None:
    """Not even to rotary frequencies that depend on how long a row is."""
    rope = Rope("dynamic", 10000.0, 8, 4, (("factor", 2.0),))
    model = tiny_model(config=tiny_config(num_layers=1, kinds=((rope, 0),)))
    base = jax.tree.map(jnp.asarray, random_tree(model.shapes()[1], 0))
    run = quick_jit(lambda *rows: model.hidden(None, base, *rows)[0])
    rows[1][:, 6:] = 0
    rows[2][:, 6:] = 0
    want = run(*rows)
    rows[2][:, 6:] = np.arange(6, T)
    assert np.array_equal(run(*rows)[:, :6], want[:, :6])
    rows[1][:, 6:] = 1
    assert not np.array_equal(run(*rows)[:, :6], want[:, :6])


@pytest.mark.parametrize("noisy", [False, True])
def test_scanned_and_unrolled_layers_are_one_model(weights: Any, rows: list[np.ndarray], noisy: bool) -> None:
    """Stacked weights through scan, a list of layers through a loop: the same numbers, the same noise."""
    adapter, base = weights
    key = jax.random.key(5) if noisy else None
    apart = base | {"layers": unstack(base["layers"])}
    assert len(apart["layers"]) == 3
    call = quick_jit(lambda base: MODEL.hidden(adapter, base, *rows, key=key)[0])
    np.testing.assert_allclose(call(apart), call(base), atol=1e-4)


def test_decoding_through_the_cache_is_the_full_pass(weights: Any, run: Any, rows: list[np.ndarray]) -> None:
    """Rows of different lengths: a padded prefill, then token by token, each row at its own position; two
    kinds of layers, adapter on, the cache longer than the row."""
    want, tokens = run(*rows), jnp.asarray(rows[0])
    base = weights[1] | {"layers": unstack(weights[1]["layers"])}

    @quick_jit
    def forward(tokens: jax.Array, positions: jax.Array, cache: Any) -> Any:
        return MODEL.hidden(weights[0], base, tokens, jnp.ones_like(tokens), positions, cache=cache)

    lengths = np.array([3, 5])
    ragged = jnp.where(jnp.arange(5) < lengths[:, None], tokens[:, :5], 9)
    h, cache = forward(ragged, jnp.broadcast_to(jnp.arange(5), (N, 5)), MODEL.empty_cache(N, T + 3))
    for n, length in enumerate(lengths):
        np.testing.assert_allclose(h[n, :length], want[n, :length], atol=1e-4)
    for step in range(4):
        at = jnp.asarray(lengths + step)[:, None]
        h, cache = forward(jnp.take_along_axis(tokens, at, 1), at, cache)
        np.testing.assert_allclose(h[:, 0], want[np.arange(N), at[:, 0]], atol=1e-4)


def test_logits(weights: Any) -> None:
    """Of the untied head, with the soft cap; a tied model uses its embedding."""
    base = weights[1]
    h = np.random.default_rng(2).standard_normal((2, 3, 32)).astype(np.float32)
    z = h @ base["head"]["embedding"].T
    np.testing.assert_allclose(MODEL.logits(base, h), 10 * np.tanh(z / 10), rtol=1e-4, atol=1e-4)
    tied = tiny_model()
    assert "head" not in tied.shapes()[1]
    np.testing.assert_allclose(tied.logits(base, h), h @ base["embed"]["embedding"].T, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32(weights: Any, run: Any, rows: list[np.ndarray]) -> None:
    """Operands alone (CPU), and activations too; hidden states come in the activation dtype."""
    want = run(*rows)
    for numerics in (Numerics.choose(jnp.bfloat16, "cpu"), Numerics.choose(jnp.bfloat16, "gpu")):
        low = replace(MODEL, numerics=numerics)
        got = quick_jit(lambda *a, m=low: m.hidden(*a)[0])(*weights, *rows)
        assert got.dtype == numerics.activation
        error = np.abs(np.asarray(got, np.float32) - want).mean() / np.abs(want).mean()
        assert 1e-4 < error < 0.1
    assert Numerics.choose(jnp.bfloat16, "cpu").activation == jnp.float32
    assert Numerics.choose(jnp.bfloat16, "tpu").activation == jnp.bfloat16


# --- noise ------------------------------------------------------------------------------------------------


def test_neftune_noise_has_the_papers_size_and_spares_padding() -> None:
    """Uniform on +-alpha / sqrt(L D), L the length of each example: deviation magnitude / sqrt(3)."""
    model = tiny_model(neftune_alpha=NEFTUNE["alpha"])
    length, size, rows = int(NEFTUNE["length"]), int(NEFTUNE["size"]), 64
    segments = jnp.asarray([[1] * length + [2] * 8 + [0] * 8] * rows)
    x = jnp.zeros((rows, length + 16, size))
    noise = np.asarray(quick_jit(model._neftune)(jax.random.key(0), x, segments))
    first, second = noise[:, :length], noise[:, length : length + 8]
    magnitude = NEFTUNE["magnitude"]
    assert 0.99 * magnitude < np.abs(first).max() <= magnitude * (1 + 1e-6)
    np.testing.assert_allclose(first.std(), magnitude / np.sqrt(3), rtol=0.01)
    np.testing.assert_allclose(first.mean(), 0, atol=0.001)
    np.testing.assert_allclose(second.std(), 2 * magnitude / np.sqrt(3), rtol=0.01)
    assert not noise[:, length + 8 :].any()


def test_neftune_comes_with_a_key_only(weights: Any, rows: list[np.ndarray]) -> None:
    base = weights[1]
    model, quiet = tiny_model(config=EVERYTHING, neftune_alpha=5.0), tiny_model(config=EVERYTHING)
    run = quick_jit(lambda model, key: model.hidden(None, base, *rows, key=key)[0], static_argnums=0)
    plain = np.asarray(run(quiet, None))
    assert np.array_equal(run(model, None), plain)
    noisy = np.asarray(run(model, jax.random.key(1)))
    assert (np.abs(noisy - plain).max(-1) > 0).all()


# --- trees ------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module", params=[(name, tied) for name in FAMILIES for tied in (False, True)], ids=str)
def family(request: Any) -> tuple[str, DecoderConfig]:
    name, tied = request.param
    raw = SIZES | {"model_type": name, "tie_word_embeddings": tied}
    return name, FAMILIES[name].from_hf(raw | {"attention_bias": name in ("llama", "qwen3")})


def paths(tree: Any) -> dict[tuple[str, ...], Any]:
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return {
        tuple(k.key for k in p): leaf
        for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def test_axes_match_shapes_in_every_family(family: tuple[str, DecoderConfig]) -> None:
    """One logical axis a dimension, for adapter and base; the sizes behind a name are one of a few."""
    config = family[1]
    model = Model(config, LoraConfig(rank=3))
    sizes = {
        "layers": {4}, "embed": {32}, "mlp": {48}, "heads": {48}, "kv_heads": {24}, "vocab": {96},
        None: {3, 12, 32},
    }  # fmt: skip
    for axes, shapes in zip(model.axes(), model.shapes(), strict=True):
        named, shaped = paths(axes), paths(shapes)
        assert named.keys() == shaped.keys()
        for path, names in named.items():
            assert len(names) == len(shaped[path].shape), path
            assert shaped[path].dtype == jnp.float32
            for name, size in zip(names, shaped[path].shape, strict=True):
                assert size in sizes[name], (path, name)
    assert ("head" in model.shapes()[1]) == (not config.tied)


def test_every_parameter_has_a_name_in_the_checkpoint(family: tuple[str, DecoderConfig]) -> None:
    """The name table covers the tree: each leaf once, stacked leaves by a name with {layer}."""
    name, config = family
    rules = FAMILIES[name].names(config)
    shapes = paths(Model(config).shapes()[1])
    assert sorted(rule.path for rule in rules) == sorted(shapes)
    assert len({rule.hf for rule in rules}) == len(rules)
    for rule in rules:
        assert ("{layer}" in rule.hf) == (rule.path[0] == "layers")
        assert rule.transpose == (rule.path[-1] == "kernel")


def test_shapes_are_those_of_init() -> None:
    model = tiny_model(LoraConfig(rank=2), tiny_config(num_layers=1, tied=False, qkv_bias=True))
    shapes, trees = model.shapes(), quick_jit(model.init)(jax.random.key(0))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), trees
    )
    d, f, kv = 32, 48, 16
    layer = 2 * d * d + 2 * d * kv + (d + 2 * kv) + 3 * d * f + 2 * d
    assert parameter_count(shapes[1]) == 2 * V * d + d + layer


def test_merge_trees_changes_neither() -> None:
    base, extra = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"z": 4}, "c": {"w": 5}}
    assert merge_trees(base, extra) == {"a": {"x": 1, "y": 2, "z": 4}, "b": 3, "c": {"w": 5}}
    assert (base, extra) == ({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"z": 4}, "c": {"w": 5}})
    assert merge_trees(base, None) is base
