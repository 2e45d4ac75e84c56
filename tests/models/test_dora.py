"""DoRA: its formula, its start, its gradients, dropout, merging, meshes and files."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.errors import UserError
from jaxalign.models.adapters import TARGETS, LoraConfig, column_norm
from jaxalign.models.base import Functional, Numerics
from jaxalign.models.decoder import Model
from jaxalign.models.export import export_peft
from jaxalign.models.layers import Linear
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder
from tests.objectives.vectors import LORA
from tests.rig import Rig, assert_same_step, random_tree
from tests.tiny import arrays, examples, micro, quick_jit, tiny_config, tiny_model, unpacked

CONFIG = tiny_config(qkv_bias=True)
DORA = LoraConfig(rank=4, alpha=6.0, dora=True)
MODEL = tiny_model(DORA, CONFIG)
PLAIN = tiny_model(None, CONFIG)
BATCH = arrays(unpacked(examples(4)))
# loss_vectors.json: dora_forward, over the inputs of lora_forward.
GOLDEN = {
    "magnitude": [1.58113883, 1.030776406, 2.061552813],
    "norm": [1.923538406, 1.364734406, 2.302172887],
    "y": [-2.054987341, 1.888236278, 4.029665935],
    "merged": [[0.7397954429, -0.1510589022, 1.701414506], [1.397391392, -1.01964759, -1.164125715]],
}


def golden(name: str) -> tuple[LoraConfig, dict[str, jax.Array], jax.Array]:
    """Configuration, adapter and kernel of the vector, `name` the magnitudes."""
    config = LoraConfig(rank=int(LORA["rank"]), alpha=float(LORA["alpha"]), dora=True)
    factors = {n: jnp.asarray(LORA[n]) for n in ("a", "b")}
    return config, factors | {"m": jnp.asarray(GOLDEN[name])}, jnp.asarray(LORA["kernel"])


def layer(config: LoraConfig, shape: tuple[int, int], params: Any, **options: Any) -> Any:
    make = lambda rngs: Linear("q", shape, ("embed", "heads"), rngs, bias=False, adapter=config)  # noqa: E731
    return Functional(make).bind()(params)


def test_vector_dora_forward() -> None:
    config, adapter, kernel = golden("magnitude")
    np.testing.assert_allclose(column_norm(kernel), GOLDEN["magnitude"], rtol=1e-6)
    adapted = kernel + config.scale * adapter["a"] @ adapter["b"]
    np.testing.assert_allclose(column_norm(adapted), GOLDEN["norm"], rtol=1e-6)
    x = jnp.asarray(LORA["x"])[None]
    y = layer(config, (2, 3), {"kernel": kernel, "adapter": adapter})(x, Numerics())
    np.testing.assert_allclose(y[0], GOLDEN["y"], rtol=1e-6)
    np.testing.assert_allclose(config.merge(adapter, kernel), GOLDEN["merged"], rtol=1e-6)


def test_magnitudes_equal_to_the_norms_make_it_lora() -> None:
    config, adapter, kernel = golden("norm")
    x = jnp.asarray(LORA["x"])[None]
    y = layer(config, (2, 3), {"kernel": kernel, "adapter": adapter})(x, Numerics())
    np.testing.assert_allclose(y[0], LORA["lora"], rtol=1e-6)


def test_the_norm_is_a_constant_to_the_gradient() -> None:
    """Against the formula with n fixed: gradients of A, B, m and x; and they differ from those through n."""
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 3), "b": (3, 5), "m": (5,)}
    adapter = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    kernel, x, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (4, 6), (4, 5)))
    config = LoraConfig(rank=3, alpha=4.5, dora=True)
    frozen = column_norm(kernel + 1.5 * adapter["a"] @ adapter["b"])

    def formula(p: Any, x: jax.Array, norm: Any) -> jax.Array:
        whole = kernel + 1.5 * p["a"] @ p["b"]
        return (g * ((x @ whole) * p["m"] / norm(whole))).sum()

    def ours(p: Any, x: jax.Array) -> jax.Array:
        return (g * layer(config, (6, 5), {"kernel": kernel, "adapter": p})(x, Numerics())).sum()

    got = jax.grad(ours, (0, 1))(adapter, x)
    want = jax.grad(formula, (0, 1))(adapter, x, lambda whole: frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    through = jax.grad(formula, (0, 1))(adapter, x, column_norm)
    assert np.abs(np.asarray(through[0]["a"] - want[0]["a"])).max() > 0.1


def test_a_dead_output_stays_finite() -> None:
    """A column of zeros has magnitude zero: nothing comes out, and no gradient is NaN."""
    config = LoraConfig(rank=2, dora=True)
    kernel = jnp.array([[1.0, 0.0], [2.0, 0.0]])
    start = {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2)), "m": column_norm(kernel)}

    def loss(p: Any) -> jax.Array:
        return layer(config, (2, 2), {"kernel": kernel, "adapter": p})(jnp.ones((1, 2)), Numerics()).sum()

    value, grads = jax.value_and_grad(loss)(start)
    assert value == 3.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- in a model -------------------------------------------------------------------------------------------


def forward(model: Model, adapter: Any, base: Any, key: Any = None) -> jax.Array:
    rows = [x[:, 0] for x in (BATCH.tokens, BATCH.segments, BATCH.positions)]
    return model.hidden(adapter, base, *rows, key=key)[0]


@pytest.fixture(scope="module")
def weights() -> tuple[Any, Any]:
    adapter, base = MODEL.shapes()
    return random_tree(adapter, 1), random_tree(base, 0)


@pytest.fixture(scope="module")
def reference(weights: Any) -> np.ndarray:
    return np.asarray(quick_jit(lambda b: forward(PLAIN, None, b))(weights[1]))


@pytest.mark.parametrize("init", ["b_zero", "a_zero"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_at_the_start_the_model_is_its_base(
    weights: Any, reference: np.ndarray, init: Any, dropout: float
) -> None:
    """To an ulp of each layer's products; with dropout as well, since the base's term is not dropped then."""
    model = tiny_model(LoraConfig(rank=4, dora=True, init=init, dropout=dropout), CONFIG)
    adapter = quick_jit(model.init_adapter)(jax.random.key(3), weights[1])
    norm = np.linalg.norm(weights[1]["layers"]["mlp"]["up"]["kernel"], axis=1)
    np.testing.assert_allclose(adapter["layers"]["mlp"]["up"]["adapter"]["m"], norm, rtol=1e-6)
    got = quick_jit(lambda a, b: forward(model, a, b, jax.random.key(0)))(adapter, weights[1])
    np.testing.assert_allclose(got, reference, atol=4e-6 * np.abs(reference).max())


def test_the_start_needs_the_base() -> None:
    with pytest.raises(ValueError, match=r"init_adapter\(key, base\)"):
        MODEL.init_adapter(jax.random.key(0))


def test_gradients_are_on_the_adapter_only(weights: Any) -> None:
    adapter, base = weights
    grads = quick_jit(jax.grad(lambda a, b: jnp.square(forward(MODEL, a, b)).sum()))(adapter, base)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    assert len(jax.tree.leaves(grads)) == 3 * len(TARGETS)


def test_without_the_adapter_it_is_the_base_bit_for_bit(weights: Any, reference: np.ndarray) -> None:
    got = quick_jit(lambda a, b: forward(MODEL, a, b))(*weights)
    assert np.abs(np.asarray(got) - reference).max() > 0.1
    assert np.array_equal(quick_jit(lambda b: forward(MODEL, None, b))(weights[1]), reference)


def test_merging_and_taking_it_out_again(weights: Any) -> None:
    """The merged model computes the same; W = merged n / m - s A B."""
    adapter, base = jax.tree.map(jnp.asarray, weights)
    merged = quick_jit(MODEL.merge)(adapter, base)
    got = quick_jit(lambda b: forward(PLAIN, None, b))(merged)
    want = quick_jit(lambda a, b: forward(MODEL, a, b))(adapter, base)
    np.testing.assert_allclose(got, want, atol=1e-4)
    part = adapter["layers"]["attn"]["q"]["adapter"]
    kernel = base["layers"]["attn"]["q"]["kernel"]
    delta = DORA.scale * jnp.einsum("lir,lro->lio", part["a"], part["b"], precision="highest")
    ratio = column_norm(kernel + delta) / part["m"]
    again = merged["layers"]["attn"]["q"]["kernel"] * ratio[:, None] - delta
    np.testing.assert_allclose(again, kernel, atol=1e-5)


def test_dropout_keeps_the_expectation() -> None:
    """The mean over many draws is the undropped output."""
    rng = np.random.default_rng(0)
    shapes = {"a": (40, 3), "b": (3, 5), "m": (5,)}
    adapter = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    kernel = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    config = LoraConfig(rank=3, alpha=3.0, dropout=0.25, dora=True)
    bound = layer(config, (40, 5), {"kernel": kernel, "adapter": adapter})
    x = jnp.ones((1, 40))
    many = quick_jit(jax.vmap(lambda k: bound(x, Numerics(), k)))(jax.random.split(jax.random.key(0), 4000))
    error = np.asarray(many).std(0) / 4000**0.5
    assert (error > 0).all()
    assert (np.abs(many.mean(0) - bound(x, Numerics())) < 5 * error).all()


RIG = Rig(tiny_model(DORA, CONFIG))


@pytest.fixture(scope="module")
def one_device() -> Any:
    return RIG.run(micro(unpacked(examples(8)), 1))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_eight_devices_agree_with_one(one_device: Any, shape: tuple[int, int, int]) -> None:
    assert_same_step(Rig(tiny_model(DORA, CONFIG), shape).run(micro(unpacked(examples(8)), 1)), one_device)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(one_device: Any, remat: str) -> None:
    rig = Rig(tiny_model(DORA, CONFIG, remat=remat), optimizer=optax.sgd(1.0))
    assert_same_step(rig.run(micro(unpacked(examples(8)), 1)), one_device)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_it_goes_out_and_comes_back(tmp_path: Any, monkeypatch: Any, sizes: dict[str, int]) -> None:
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    raw, model, base = tiny()
    source = resolve(str(write_folder(tmp_path / "source", raw, state_dict(model, base))))
    asked = LoraConfig(rank=4, alpha=8.0, targets=("q", "o", "up"), dora=True)
    got = load_model(source, mesh(**sizes), adapter=asked)
    adapter = quick_jit(got.model.init_adapter)(jax.random.key(1), got.base)
    noise = random_tree(got.model.shapes()[0], 2)
    adapter = jax.tree.map(lambda x, n: jax.device_put(x + n, x.sharding), adapter, noise)
    out = export_peft(got.model, adapter, source, tmp_path / "out", base_hash=got.base_hash)
    again = load_model(resolve(str(out)), mesh(**sizes))
    assert again.model.adapter == asked
    jax.tree.map(np.testing.assert_array_equal, again.adapter, adapter)
    assert "layers" in (again.adapter or {})
    with pytest.raises(UserError, match="dora True, the run asks for False"):
        load_model(resolve(str(out)), mesh(), adapter=asked.model_copy(update={"dora": False}))
