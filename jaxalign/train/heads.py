"""What trains beside a model: the head of a reward model, or a critic with its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.models.load import load_adapter
from jaxalign.models.source import resolve
from jaxalign.train.assemble import Weights
from jaxalign.train.score import init_head
from jaxalign.train.settings import TrainConfig
from jaxalign.types import Params


def with_head(weights: Weights, mesh: Mesh, config: TrainConfig) -> Weights:
    """The weights of a reward model: with the head that was loaded, or a new one."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    make = jax.jit(init_head, static_argnums=0, out_shardings=everywhere)
    head = weights.loaded.head or make(weights.model.config.hidden_size, jax.random.key(config.seed))
    lies = {"trunk": weights.shardings, "head": {"kernel": everywhere}}
    return replace(weights, params={"trunk": weights.params, "head": head}, shardings=lies)


def with_critic(weights: Weights, mesh: Mesh, config: TrainConfig) -> Weights:
    """The weights of an actor and its critic: policy and critic are two adapters over one base. Values begin
    at 0, or as the scores of the reward model that the key `critic` names.

    Raises `UserError` where every weight trains, and for a reward model of another base or adapter.
    """
    if weights.full or weights.model.adapter is None:
        raise UserError(
            "policy, critic and reference share one frozen base here, and every weight trains",
            place="lora",
            remedy="train an adapter (leave lora=null out), or a method without a critic: grpo, rloo",
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    name = getattr(config, "critic", None)
    if name is None:
        make = jax.jit(weights.model.init_adapter, out_shardings=weights.shardings)
        critic = make(
            jax.random.key(config.seed + 1), weights.base if weights.model.adapter.needs_base else None
        )
        head = {"kernel": jnp.zeros((1, weights.model.config.hidden_size))}
    else:
        critic, head = _scorer(name, weights, mesh)
    # A row for each signal that has values; costs begin at 0.
    more = (2 if getattr(config, "costs", None) else 1) - 1
    head = {"kernel": jax.device_put(jnp.pad(head["kernel"], ((0, more), (0, 0))), everywhere)}
    params = {"trunk": weights.params, "critic": critic, "head": head}
    lies = {"trunk": weights.shardings, "critic": weights.shardings, "head": {"kernel": everywhere}}
    return replace(weights, params=params, shardings=lies)


def _scorer(name: str, weights: Weights, mesh: Mesh) -> tuple[Params, Params]:
    """Adapter and head of the reward model `name`, in the form of what trains."""
    folder = resolve(name).adapter
    found = load_adapter(weights.loaded, folder, mesh) if folder else None
    adapter, params, head = found or (None, {}, None)
    if head is None:
        cause, remedy = "it is no adapter with the head of a reward model", "train one: jaxalign train reward"
    elif adapter != weights.model.adapter:
        cause = f"its adapter is another than the policy's: {adapter} and {weights.model.adapter}"
        remedy = "train both with the same keys of lora"
    else:
        return params, head
    raise UserError(f"the critic cannot start as {name}: {cause}", place="critic", remedy=remedy)


# What a loss of some kind trains beside the model, by that kind.
HEADS: dict[str, Callable[[Weights, Mesh, TrainConfig], Weights]] = {
    "reward": with_head,
    "actor_critic": with_critic,
}
