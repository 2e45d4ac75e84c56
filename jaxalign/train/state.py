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
    base without its adapter, or there is none. `past` is the sum and the count, float32 [2], of what a loss
    with a running mean (`needs` past) has seen.
    """

    step: Any
    params: Params
    opt: Any
    key: Any
    reference: Params | None = None
    past: Any = None


def state_shardings(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: Params,
    mesh: Mesh,
    reference: bool = False,
    past: bool = False,
) -> Any:
    """The `NamedSharding` of every leaf: moments lie like their parameter, the rest everywhere.

    `reference` and `past`: the state holds them too.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, params)
    like = lambda leaf, sharding: sharding if leaf.ndim == len(sharding.spec) else everywhere  # noqa: E731
    opt = optax.tree_utils.tree_map_params(
        optimizer, like, shapes, shardings, transform_non_params=lambda _: everywhere
    )
    moving = shardings if reference else None
    return TrainState(everywhere, shardings, opt, everywhere, moving, everywhere if past else None)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: Params,
    mesh: Mesh,
    seed: int,
    reference: bool = False,
    past: bool = False,
) -> TrainState:
    """The state before step 0, on the mesh. `params` may be donated; a `reference` is a copy of them, the
    `past` empty."""

    def make(params: Params) -> TrainState:
        key = jax.random.key_data(jax.random.key(seed))
        copy = jax.tree.map(jnp.copy, params) if reference else None
        seen = jnp.zeros(2) if past else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, copy, seen)

    out = state_shardings(params, optimizer, shardings, mesh, reference, past)
    return jax.jit(make, out_shardings=out, donate_argnums=0)(params)
