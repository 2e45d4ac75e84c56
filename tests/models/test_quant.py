"""Quantised kernels: the published codes, their errors, the product, a whole model, and loading on meshes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import quant
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.decoder import Model, unstack
from jaxalign.models.layers import matmul
from jaxalign.models.load import load_model
from jaxalign.models.quant import DYNAMIC_MAP, KINDS, NF4, NF4_CODE, Int8, dequantise_base, quantise_base
from jaxalign.models.source import resolve
from jaxalign.sharding import constrainer, tree_shardings
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder
from tests.rig import random_tree
from tests.tiny import arrays, examples, quick_jit, tiny_config, tiny_model, unpacked


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def indices(packed: NF4) -> np.ndarray:
    """[in, out] of the indices, padding left out."""
    codes = np.asarray(packed.codes)
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)[:, : packed.columns]


# --- the codes; the numbers are those of loss_vectors.json -----------------------------------------------


def test_vector_nf4_block() -> None:
    """The block of the vector, padded: a padded block has the same maximum."""
    packed = NF4.of(jnp.array([[0.1, -0.5, 0.25, 2.0, -1.3, 0.0, 0.7, -0.05]]))
    assert indices(packed)[0].tolist() == [8, 4, 9, 15, 1, 7, 11, 7]
    assert np.asarray(packed.codes)[0, :4].tolist() == [132, 159, 23, 183]
    want = [0.1591605991, -0.5688827634, 0.3218604028, 2.0, -1.392385602, 0.0, 0.6758304834, 0.0]
    np.testing.assert_allclose(packed.astype(jnp.float32)[0], want, rtol=1e-6)
    assert packed.shape == (1, 8)


def test_the_code_is_made_of_normal_quantiles() -> None:
    """8 positive, 7 negative and zero, over the largest."""
    from jax.scipy.special import ndtri

    offset = 0.9677083
    up = ndtri(np.linspace(offset, 0.5, 9)[:-1])
    down = -ndtri(np.linspace(offset, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([up, [0.0], down])) / np.max(up)
    np.testing.assert_allclose(NF4_CODE, want, atol=2e-6)


def test_vector_nf4_double_quant() -> None:
    np.testing.assert_allclose(DYNAMIC_MAP[:4], [-0.99296875, -0.97890625, -0.96484375, -0.95078125])
    np.testing.assert_allclose(DYNAMIC_MAP[-4:], [0.96484375, 0.97890625, 0.99296875, 1.0])
    assert len(np.unique(DYNAMIC_MAP)) == 256
    index, tops, mean = quant.quantise_maxima(jnp.array([[0.9], [1.1], [1.0], [2.0]]))
    np.testing.assert_allclose((mean, tops[0, 0]), (1.25, 0.75), rtol=1e-6)
    assert index[:, 0].tolist() == [37, 56, 47, 255]
    got = quant.recover_maxima(index, tops, mean)[:, 0]
    np.testing.assert_allclose(got, [0.8955078125, 1.095898438, 1.000976562, 2.0], rtol=1e-6)


def test_vector_int8_rowwise() -> None:
    """The vector's rows are outputs; ours are columns."""
    packed = Int8.of(jnp.array([[0.5, -1.27, 0.0, 0.3]]).T)
    np.testing.assert_allclose(packed.scale, [0.01], rtol=1e-6)
    assert packed.q[:, 0].tolist() == [50, -127, 0, 30]
    np.testing.assert_allclose(packed.astype(jnp.float32)[:, 0], [0.5, -1.27, 0.0, 0.3], rtol=1e-6)


# --- round trips ------------------------------------------------------------------------------------------


def test_nf4_error_is_at_most_half_a_gap() -> None:
    """With exact maxima; double quantisation moves a maximum by at most half of the widest gap of its map."""
    w = normal(300, 192)
    packed = NF4.of(w)
    maxima = jnp.abs(w.reshape(300, 3, 64)).max(-1)
    exact = NF4_CODE[indices(packed)].reshape(300, 3, 64) * maxima[..., None]
    gap = np.diff(NF4_CODE).max() / 2
    error = np.abs(exact - w.reshape(300, 3, 64))
    assert (error <= gap * maxima[..., None] * (1 + 1e-6)).all()
    recovered = quant.recover_maxima(packed.maxima, packed.tops, packed.mean)
    assert packed.tops.shape == (2, 3)
    allowed = np.repeat(packed.tops, 256, axis=0)[:300] * np.diff(DYNAMIC_MAP).max() / 2
    assert (np.abs(recovered - maxima) <= allowed * (1 + 1e-5)).all()
    np.testing.assert_allclose(packed.astype(jnp.float32).reshape(300, 3, 64), exact, rtol=0.05)


@pytest.mark.parametrize(("kind", "want", "within"), [("nf4", 0.092, 0.002), ("int8", 0.006, 0.0005)])
def test_error_of_normal_weights(kind: str, want: float, within: float) -> None:
    """Root mean square over the weights' own: blocks of 64, and 64 weights a scale in int8."""
    w = normal(64, 4096)
    error = jnp.sqrt(jnp.square(KINDS[kind].of(w).astype(jnp.float32) - w).mean())
    np.testing.assert_allclose(error, want, atol=within)


def test_int8_error_is_at_most_half_a_step() -> None:
    w = normal(50, 30)
    packed = Int8.of(w)
    error = np.abs(packed.astype(jnp.float32) - w)
    assert (error <= np.asarray(packed.scale) * 0.5 * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_again_changes_nothing(kind: str) -> None:
    once = KINDS[kind].of(normal(128, 128))
    twice = KINDS[kind].of(once.astype(jnp.float32))
    assert np.array_equal(jax.tree.leaves(once)[0], jax.tree.leaves(twice)[0])
    # Double quantisation moves the maxima by one step of their own at most.
    np.testing.assert_allclose(twice.astype(jnp.float32), once.astype(jnp.float32), rtol=0.03)


def test_order_within_a_block_does_not_matter() -> None:
    w = normal(4, 128)
    order = np.random.default_rng(0).permutation(64)
    shuffled = NF4.of(w.at[:, :64].set(w[:, order]))
    assert np.array_equal(indices(shuffled)[:, :64], indices(NF4.of(w))[:, order])
    assert np.array_equal(shuffled.maxima, NF4.of(w).maxima)


@pytest.mark.parametrize("shape", [(3, 1), (1, 63), (5, 65), (257, 130), (2, 6, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind: str, shape: tuple[int, ...]) -> None:
    w = normal(*shape)
    packed = KINDS[kind].of(w)
    assert packed.shape == shape
    assert packed.ndim == len(shape)
    got = packed.astype(jnp.float32)
    assert got.shape == shape
    assert np.abs(np.asarray(got - w)).max() < 0.16 * np.abs(np.asarray(w)).max() + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    packed = KINDS[kind].of(jnp.zeros((4, 128)))
    assert not np.asarray(packed.astype(jnp.float32)).any()


def test_bits() -> None:
    """4 + 8 / 64 + 32 / (64 * 256) a weight."""
    packed = NF4.of(normal(512, 256))
    held = sum(x.size * x.dtype.itemsize for x in (packed.codes, packed.maxima, packed.tops))
    assert held * 8 / (512 * 256) == 4.126953125


# --- the product ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_and_its_gradient_are_those_of_the_dense_kernel(kind: str, dtype: Any) -> None:
    packed = KINDS[kind].of(normal(48, 70))
    x, g = normal(2, 5, 48, seed=1), normal(2, 5, 70, seed=2)
    dense = packed.astype(jnp.float32)
    got, pull = jax.vjp(lambda x: matmul(x, packed, dtype), x)
    want, dense_pull = jax.vjp(lambda x: jnp.matmul(x, dense, precision="highest"), x)
    within = 1e-4 if dtype == jnp.float32 else 0.2
    np.testing.assert_allclose(got, want, atol=within)
    np.testing.assert_allclose(pull(g)[0], dense_pull(g)[0], atol=within)
    assert pull(g)[0].dtype == x.dtype


def test_the_dense_kernel_is_not_kept_for_the_gradient() -> None:
    """Between the passes only the codes are held."""
    packed, x = NF4.of(normal(128, 256)), normal(3, 128)
    _, pull = jax.vjp(lambda x: matmul(x, packed, jnp.float32), x)
    held = [v for v in jax.tree.leaves(pull) if hasattr(v, "shape")]
    assert held
    assert max(v.size * v.dtype.itemsize for v in held) <= 128 * 256 / 2


# --- a model ----------------------------------------------------------------------------------------------

CONFIG = tiny_config(qkv_bias=True)
BATCH = arrays(unpacked(examples(8)))
LORA = LoraConfig(rank=4, alpha=6.0)


def forward(model: Model, adapter: Any, base: Any) -> jax.Array:
    rows = [x[:, 0] for x in (BATCH.tokens, BATCH.segments, BATCH.positions)]
    return model.hidden(adapter, base, *rows)[0]


@pytest.fixture(scope="module")
def base() -> Any:
    return random_tree(tiny_model(None, CONFIG).shapes()[1], 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_model_over_a_quantised_base(base: Any, kind: Any, dora: bool) -> None:
    """It is the model over the dequantised base: at the start, adapted, merged, its gradients; and the start
    is the quantised base itself."""
    model = tiny_model(LORA.model_copy(update={"dora": dora}), CONFIG)
    low = quick_jit(lambda b: quantise_base(b, kind))(base)
    dense = quick_jit(lambda b: dequantise_base(b, jnp.float32))(low)
    assert isinstance(low["layers"]["mlp"]["up"]["kernel"], KINDS[kind])
    assert np.array_equal(low["embed"]["embedding"], base["embed"]["embedding"])
    run = quick_jit(lambda a, b: forward(model, a, b))
    plain = np.asarray(quick_jit(lambda b: forward(model, None, b))(low))
    start = quick_jit(model.init_adapter)(jax.random.key(0), low)
    np.testing.assert_allclose(run(start, low), plain, atol=4e-6 * np.abs(plain).max())
    adapter = random_tree(model.shapes()[0], 1)
    got = np.asarray(run(adapter, low))
    assert np.abs(got - plain).max() > 0.1
    np.testing.assert_allclose(got, run(adapter, dense), atol=1e-4)
    gradient = quick_jit(jax.grad(lambda a, b: jnp.square(forward(model, a, b)).sum()))
    grads, want = gradient(adapter, low), gradient(adapter, dense)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(np.asarray(b)).max())
    merged = quick_jit(model.merge)(adapter, low)
    kernel = merged["layers"]["attn"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    exact = quick_jit(model.merge)(adapter, dense)["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_allclose(kernel.astype(jnp.float32), exact, rtol=4e-3)


def test_decoding_over_a_quantised_base(base: Any) -> None:
    """Layer by layer, with a cache."""
    model = tiny_model(None, CONFIG)
    low = quantise_base(jax.tree.map(jnp.asarray, base), "nf4")
    want = quick_jit(lambda b: forward(model, None, b))(low)
    rows = [x[:, 0] for x in (BATCH.tokens, BATCH.segments, BATCH.positions)]
    loose = low | {"layers": unstack(low["layers"])}
    steps = jnp.broadcast_to(jnp.arange(16), rows[0].shape)
    got = quick_jit(
        lambda b: model.hidden(None, b, rows[0], rows[1], steps, cache=model.empty_cache(8, 16))[0]
    )(loose)
    real = np.asarray(rows[1]) > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-4)


def test_nothing_quantised_stays_what_it_is(base: Any) -> None:
    assert quantise_base(base, "none") is base
    assert dequantise_base(base) is base


# --- meshes and files -------------------------------------------------------------------------------------

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8}


@pytest.fixture
def folder(tmp_path: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    raw, model, base = tiny(**WIDE)
    return resolve(str(write_folder(tmp_path / "model", raw, state_dict(model, base))))


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_on_any_mesh(folder: Any, kind: Any) -> None:
    """Codes and model are those of quantising afterwards; every device holds its share, in whole blocks."""
    plain = load_model(folder, mesh())
    want = quick_jit(lambda b: quantise_base(b, kind))(plain.base)
    reference = None
    for sizes in ({}, *MESHES):
        on = mesh(**sizes)
        got = load_model(folder, on, adapter=LORA, quantise=kind)
        for a, b in zip(jax.tree.leaves(got.base), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
        codes = jax.tree.leaves(got.base["layers"]["mlp"]["down"]["kernel"])[0]
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        assert np.prod(codes.sharding.shard_shape(codes.shape)) * parts == codes.size
        adapter = jax.device_put(random_tree(got.model.shapes()[0], 1), shardings_of(got.model, on))
        hidden = np.asarray(quick_jit(lambda a, b, m=got.model: forward(m, a, b))(adapter, got.base))
        reference = hidden if reference is None else reference
        np.testing.assert_allclose(hidden, reference, atol=1e-4)


def shardings_of(model: Model, on: Any) -> Any:
    return tree_shardings(on, model.axes()[0], model.shapes()[0])


def test_gradients_agree_over_meshes(folder: Any) -> None:
    got = []
    for sizes in ({}, MESHES[1]):
        on = mesh(**sizes)
        loaded = load_model(folder, on, adapter=LORA.model_copy(update={"dora": True}), quantise="nf4")
        model = replace(loaded.model, constrain=constrainer(on))
        adapter = jax.device_put(random_tree(model.shapes()[0], 1), shardings_of(model, on))
        gradient = quick_jit(jax.grad(lambda a, b, m=model: jnp.square(forward(m, a, b)).sum()))
        got.append(jax.tree.map(np.asarray, gradient(adapter, loaded.base)))
    for other in got[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), other, got[0]
        )


def test_a_mesh_that_cannot_hold_whole_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"100 x 96 does not divide over 8 devices.*blocks of 64"):
        NF4.shardings(mesh(fsdp=4, tensor=2), ("layers", "embed", "mlp"), (2, 100, 96))
    lies = NF4.shardings(mesh(fsdp=4, tensor=2), ("layers", "embed", "mlp"), (2, 104, 128))
    assert lies.codes.shard_shape((2, 104, 64)) == (2, 26, 32)
    # Half of 96 is no whole block: the rows take both axes.
    lies = NF4.shardings(mesh(fsdp=4, tensor=2), ("layers", "embed", "mlp"), (2, 104, 96))
    assert lies.codes.shard_shape((2, 104, 64)) == (2, 13, 64)
