"""Meshes, the table of rules, and what is said when sizes do not fit."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    constrainer,
    make_mesh,
    named,
    spec,
    tree_shardings,
)
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, (1, 8, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 4, "fsdp": 1, "tensor": -1}, (4, 1, 2)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1)),
    ],
)
def test_sizes(asked: dict[str, int], got: tuple[int, ...]) -> None:
    """-1 takes what is left, also where that is 1; axes are Auto."""
    mesh = make_mesh(MeshConfig(**asked))
    assert tuple(mesh.shape[axis] for axis in MESH_AXES) == got
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_a_mesh_over_some_devices() -> None:
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[2:6])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert {d.id for d in mesh.devices.flat} == {2, 3, 4, 5}
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"data": 3},
        {"data": 3, "fsdp": 1},
        {"data": 16},
        {"data": 2, "fsdp": 2, "tensor": 1},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"data": -2},
        {"data": -2, "fsdp": -4, "tensor": 1},
    ],
)
def test_sizes_that_do_not_cover_the_devices(asked: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"does not cover 8 device") as error:
        make_mesh(MeshConfig(**asked))
    assert f"data={asked['data']}" in str(error.value)
    assert "mesh.tensor" in str(error.value)


def test_every_rule_names_axes_of_the_mesh_and_none_twice_in_an_array() -> None:
    assert {axis for rule in RULES.values() for axis in rule} == set(MESH_AXES)
    for axes in tiny_model(LoraConfig()).axes():
        for leaf in jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple)):
            used = [m for name in leaf for m in RULES.get(name or "", ())]
            assert len(used) == len(set(used)), leaf


def test_spec() -> None:
    assert spec(("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert spec(("batch", None, None)) == PartitionSpec(("data", "fsdp"), None, None)


def test_an_axis_that_does_not_divide_is_named() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    with pytest.raises(UserError) as error:
        named(mesh, ("embed", "mlp"), (32, 50), "layers.mlp.up.kernel")
    text = str(error.value)
    assert re.search(r"layers\.mlp\.up\.kernel.*'mlp' of size 50.* 4 ", text)
    assert "mesh.tensor" in text
    assert "mesh.fsdp" not in text
    with pytest.raises(UserError, match=r"(?s)'batch' of size 3 .*mesh\.data x mesh\.fsdp"):
        named(mesh, ("batch", None), (3, 5))
    assert named(mesh, ("embed", "mlp"), (32, 48)).spec == PartitionSpec(("fsdp",), ("tensor",))


def test_a_model_that_does_not_divide_is_refused_with_the_parameter() -> None:
    model = tiny_model(config=tiny_config(vocab_size=97))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"embed\.embedding: axis 'vocab' of size 97"):
        tree_shardings(mesh, model.axes()[1], model.shapes()[1])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_every_device_holds_its_share_of_every_parameter(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))
    model = tiny_model(LoraConfig(rank=2))
    # A factor of an adapter has one axis to cut, a kernel has two.
    least = min(1 / sizes[1], 1 / sizes[2]), 1 / (sizes[1] * sizes[2])
    for axes, shapes, share in zip(model.axes(), model.shapes(), least, strict=True):
        shardings = tree_shardings(mesh, axes, shapes)
        assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
        assert jax.tree.map(lambda a: a.spec, tree_shardings(mesh, axes)) == jax.tree.map(
            lambda a: a.spec, shardings
        )

        def held(shape: Any, sharding: Any) -> float:
            return np.prod(sharding.shard_shape(shape.shape)) / np.prod(shape.shape)

        shares = jax.tree.leaves(jax.tree.map(held, shapes, shardings))
        assert min(shares) == share
        assert max(shares) <= 1


def test_constrainer() -> None:
    """The identity on one device; elsewhere it puts rows where the rules say."""
    x = jnp.ones((8, 4))
    assert constrainer(make_mesh(devices=jax.devices()[:1]))(x, "batch", None) is x
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    y = jax.jit(lambda x: constrainer(mesh)(x, "batch", None))(x)
    assert y.addressable_shards[0].data.shape == (2, 4)
    assert np.array_equal(y, x)
