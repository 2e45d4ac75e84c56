"""A stand-in for model, objective and data: small enough that the loop's own tests take no time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.checkpoint import Parts
from jaxalign.train.feed import place
from jaxalign.train.flops import Work, work_of
from jaxalign.train.programs import Programs
from jaxalign.types import Batch

ROWS, WIDTH = 8, 16
MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def batch(step: int, length: int = WIDTH, poison: tuple[int, ...] = ()) -> Batch:
    """Leaves [1, 8, 1, length], a pure function of `step`. A poisoned step carries token -1."""
    rng = np.random.default_rng(step)
    shape = (1, ROWS, 1, length)
    tokens = rng.integers(0, 100, shape, dtype=np.int32)
    if step in poison:
        tokens[0, 3] = -1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens, np.ones(shape, bool), np.ones(shape, np.int32), positions.copy())


def new_state(mesh: Any) -> dict[str, Any]:
    """{"params": {"w": [16]}, "opt": momentum, "step": int32} over `mesh`."""
    spread = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    whole = jax.NamedSharding(mesh, jax.P())
    return {
        "params": {"w": jax.device_put(jnp.zeros(WIDTH), spread)},
        "opt": ({"m": jax.device_put(jnp.zeros(WIDTH), spread)}, ()),
        "step": jax.device_put(jnp.int32(0), whole),
    }


def parts(state: dict[str, Any]) -> Parts:
    """The state as a checkpoint holds it."""
    return {"params": state["params"], "opt": state["opt"], "rest": {"step": state["step"]}}


def _update(state: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    x = batch.tokens.astype(jnp.float32).reshape(ROWS, -1)[:, :WIDTH] / 100
    loss = jnp.mean(jnp.square(x @ state["params"]["w"] - 1))
    bad = jnp.any(batch.tokens < 0)
    gradient = 2 * x.T @ (x @ state["params"]["w"] - 1) / ROWS
    m = 0.9 * state["opt"][0]["m"] + gradient
    w = state["params"]["w"] - 0.01 * m
    keep = lambda new, old: jnp.where(bad, old, new)  # noqa: E731
    new = {
        "params": {"w": keep(w, state["params"]["w"])},
        "opt": ({"m": keep(m, state["opt"][0]["m"])}, ()),
        "step": state["step"] + 1,
    }
    count = jnp.sum(batch.segments > 0)
    metrics = {
        "loss": jnp.where(bad, jnp.nan, loss),
        "num_tokens": count,
        "nonfinite": bad.astype(jnp.float32),
    }
    return new, metrics


class Toy:
    """State, programs and feed of one toy run on the eight simulated devices, in a mesh of any shape."""

    def __init__(
        self, poison: tuple[int, ...] = (), mesh: dict[str, int] | None = None, **kinds: Any
    ) -> None:
        self.mesh = make_mesh(MeshConfig(**(mesh or MESH)))
        self.state = new_state(self.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step = jax.jit(_update, donate_argnums=0, out_shardings=(shardings, None))
        self.messages: list[str] = []
        self.programs = Programs(step, "step", self.messages.append)
        self.poison = poison
        self.lengths = kinds.get("lengths", (WIDTH,))

    def make(self, step: int) -> tuple[Batch, Work]:
        """The placed batch of a step, and its work."""
        host = batch(step, self.lengths[step % len(self.lengths)], self.poison)
        return place(host, self.mesh), work_of(host, {0: 2})

    def rows(self, step: int) -> list[str]:
        """Ids of the rows of a step."""
        return [f"row-{step}-{i}" for i in range(ROWS)]

    def like(self) -> Parts:
        """What `Checkpoints.restore` wants."""
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
        return jax.tree.map(abstract, dict(parts(self.state)))
