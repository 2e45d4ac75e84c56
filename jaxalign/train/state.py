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
    base without its adapter, or there is none.
    """

    step: Any
    params: Params
    opt: Any
    key: Any
    reference: Params | None = None


def state_shardings(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: Params,
    mesh: Mesh,
    reference: bool = False,
) -> Any:
    """The `NamedSharding` of every leaf: moments lie like their parameter, the rest everywhere.

    `reference`: the state holds weights of a reference policy too.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    like = lambda leaf, sharding: sharding if leaf.ndim == len(sharding.spec) else everywhere  # noqa: E731
    opt = optax.tree_utils.tree_map_params(
        optimizer, like, shapes, shardings, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, shardings, opt, everywhere, shardings if reference else None)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: Params,
    mesh: Mesh,
    seed: int,
    reference: bool = False,
) -> TrainState:
    """The state before step 0, on the mesh. `params` may be donated; a `reference` is a copy of them."""

    def make(params: Params) -> TrainState:
        key = jax.random.key_data(jax.random.key(seed))
        copy = jax.tree.map(jnp.copy, params) if reference else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, copy)

    out = state_shardings(params, optimizer, shardings, mesh, reference)
    return jax.jit(make, out_shardings=out, donate_argnums=0)(params)
