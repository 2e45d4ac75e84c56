"""What a training step carries, and how it lies on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step int32, params (only what trains, float32), optimiser state, key data uint32.

    `reference` is the reference policy in the form of `params`, for losses that compare with one. None: the
    base without its adapter.
    """

    step: Any
    params: Params
    opt: Any
    key: Any
    reference: Params | None = None


def state_shardings(
    params: Params, optimizer: optax.GradientTransformation, shardings: Params, mesh: Mesh
) -> Any:
    """The `NamedSharding` of every leaf: moments lie like their parameter, the rest everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    like = lambda leaf, sharding: sharding if leaf.ndim == len(sharding.spec) else everywhere  # noqa: E731
    opt = optax.tree_utils.tree_map_params(
        optimizer, like, shapes, shardings, transform_non_params=lambda _: everywhere
    )
    return TrainState(step=everywhere, params=shardings, opt=opt, key=everywhere)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: Params, mesh: Mesh, seed: int
) -> TrainState:
    """The state before step 0, on the mesh. `params` may be donated."""

    def make(params: Params) -> TrainState:
        key = jax.random.key_data(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    out = state_shardings(params, optimizer, shardings, mesh)
    return jax.jit(make, out_shardings=out, donate_argnums=0)(params)
