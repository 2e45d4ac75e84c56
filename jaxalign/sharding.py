"""The device mesh, and the one table that says which mesh axis shards which logical axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.config import Config
from jaxalign.errors import UserError
from jaxalign.types import Axes

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is not listed (layers, rank, time) is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


class MeshConfig(Config):
    """Sizes of the device mesh. One axis may be -1: it takes the devices that are left."""

    data: int = 1
    """copies of the model; each takes its share of the batch"""
    fsdp: int = -1
    """devices that share one copy of the weights, and its share of the batch"""
    tensor: int = 1
    """devices that share every matrix product; must divide the attention heads"""


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis. Raises `UserError` where they do not multiply to `devices`."""
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(s for s in sizes if s > 0)
    if sizes.count(-1) == 1 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if any(s < 1 for s in sizes) or math.prod(sizes) != devices:
        asked = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(
            f"the mesh {asked} does not cover {devices} device(s)",
            place="mesh",
            remedy="make mesh.data x mesh.fsdp x mesh.tensor equal the number of devices; one may be -1",
        )
    return dict(zip(MESH_AXES, sizes, strict=True))


def make_mesh(config: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over `devices` (all of them by default).

    Raises `UserError` when the sizes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = tuple(mesh_sizes(config or MeshConfig(), len(devices)).values())
    # Auto: the compiler places what the rules leave open. make_mesh defaults to Explicit axes.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a forward pass are cut."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(axes: Axes) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axis names."""
    return PartitionSpec(*(RULES.get(a) if a else None for a in axes))


def named(mesh: Mesh, axes: Axes, shape: tuple[int, ...] | None = None, what: str = "array") -> NamedSharding:
    """`spec(axes)` on `mesh`. With a shape, raises `UserError` where a dimension does not divide."""
    for size, axis in zip(shape or (), axes, strict=False):
        parts = math.prod(mesh.shape[m] for m in RULES.get(axis or "", ()))
        if size % parts:
            raise UserError(
                f"{what}: axis {axis!r} of size {size} does not divide over {parts} devices",
                place="mesh",
                remedy=f"choose mesh.{' x mesh.'.join(RULES[axis or ''])} as a divisor of {size}",
            )
    return NamedSharding(mesh, spec(axes))


def tree_shardings(mesh: Mesh, axes: Any, shapes: Any | None = None) -> Any:
    """A tree of `NamedSharding` for a tree of logical axes; checks divisibility where `shapes` is given."""
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    if shapes is None:
        return jax.tree.map(lambda a: named(mesh, a), axes, is_leaf=is_axes)
    return jax.tree.map_with_path(
        lambda path, a, s: named(mesh, a, s.shape, jax.tree_util.keystr(path, simple=True, separator=".")),
        axes,
        shapes,
        is_leaf=is_axes,
    )


def constrainer(mesh: Mesh) -> Callable[..., jax.Array]:
    """`constrain(x, *axes)` for model code: pins an activation to the rules; the identity on one device."""
    if mesh.size == 1:
        return lambda x, *axes: x
    return lambda x, *axes: jax.lax.with_sharding_constraint(x, named(mesh, axes))
