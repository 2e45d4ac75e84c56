"""One gradient step of a tiny model on a mesh of any shape, as plain numpy: what invariance tests compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.models.decoder import Model
from jaxalign.objectives.sft import SFT
from jaxalign.sharding import MeshConfig, constrainer, make_mesh, tree_shardings
from jaxalign.train.feed import place
from jaxalign.train.programs import shape_of
from jaxalign.train.reference import ReferenceConfig, mover
from jaxalign.train.state import TrainState, init_state, state_shardings
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Params
from tests.tiny import quick


def random_tree(shapes: Params, seed: int) -> Params:
    """Normal numbers for a tree of shapes; norm scales are near 1."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, s: Any) -> np.ndarray:
        x = 0.2 * rng.standard_normal(s.shape).astype(np.float32)
        return x + 1 if jax.tree_util.keystr(path[-1:], simple=True) == "scale" else x

    return jax.tree.map_with_path(leaf, shapes)


@dataclass(frozen=True)
class Rig:
    """A model on a mesh (data, fsdp, tensor) over the first devices, and how it is trained."""

    model: Model
    mesh: tuple[int, int, int] = (1, 1, 1)
    full: bool = False
    optimizer: optax.GradientTransformation = optax.sgd(1.0)
    objective: Any = SFT()
    seed: int = 0
    reference: ReferenceConfig | None = None  # a copy of what trains, which moves if the mode is ema
    begins: tuple[int, ...] | None = None  # those of `mover`

    def devices(self) -> Mesh:
        """The mesh itself."""
        data, fsdp, tensor = self.mesh
        config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        return make_mesh(config, jax.devices()[: data * fsdp * tensor])

    def weights(self) -> tuple[Params, Params]:
        """(adapter, base) on the host, the same for every mesh."""
        adapter, base = _layout(self.model)[1]
        return random_tree(adapter, 1), random_tree(base, 0)

    def start(self) -> tuple[Any, TrainState, Params]:
        """The mesh's jitted step, the state before it, and the frozen base, placed."""
        mesh = self.devices()
        model = replace(self.model, constrain=constrainer(mesh))
        shardings = [tree_shardings(mesh, a, s) for a, s in zip(*_layout(self.model), strict=True)]
        placed = jax.device_put(self.weights(), tuple(shardings))
        trained, rest = (placed[1], {}) if self.full else placed
        lies = shardings[1] if self.full else shardings[0]
        copy = self.reference is not None
        state = init_state(trained, self.optimizer, lies, mesh, self.seed, copy)
        out = state_shardings(trained, self.optimizer, lies, mesh, copy)
        moves = self.reference is not None and self.reference.mode == "ema"
        move = mover(self.reference, "ema", self.begins) if self.reference and moves else None
        step = make_step(
            model,
            self.objective,
            self.optimizer,
            mesh,
            train_base=self.full,
            out_shardings=out,
            move=move,
        )
        return step, state, rest

    def place(self, batch: Batch) -> Batch:
        """A host batch [A, B, G, T] on this mesh."""
        return place(batch, self.devices())

    def run(self, batch: Batch) -> tuple[Params, dict[str, float]]:
        """What one step on a host batch [A, B, G, T] takes away from the trained parameters (with the default
        optimiser the gradient), and its metrics."""
        state, metrics = self.after(batch)
        change = jax.tree.map(lambda before, after: before - np.asarray(after), self.before(), state.params)
        return change, {k: float(v) for k, v in metrics.items()}

    def after(self, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """The state and the metrics of one step on a host batch [A, B, G, T]."""
        _, state, base = self.start()
        return compiled(self, batch)(state, base, self.place(batch))

    def before(self) -> Params:
        """What trains, as it was before the first step."""
        adapter, base = self.weights()
        return base if self.full else adapter


@cache
def _layout(model: Model) -> tuple[Any, Any]:
    """(axes, shapes) of a model, which it traces anew each time."""
    return model.axes(), model.shapes()


def program(rig: Rig, shape: tuple[int, ...]) -> Any:
    """The compiled step of `rig` for batches of this shape [A, B, G, T]; compiled once for all tests."""
    return compiled(rig, Batch(*(np.zeros(shape, d) for d in (np.int32, bool, np.int32, np.int32))))


def compiled(rig: Rig, batch: Batch) -> Any:
    """The compiled step of `rig` for batches like this one."""
    return _program(rig, _Like(batch))


class _Like:
    """A host batch that equals all of its shapes."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.key = (shape_of(batch), jax.tree.structure(batch))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Like) and self.key == other.key


@cache
def _program(rig: Rig, like: _Like) -> Any:
    step, state, base = rig.start()
    return step.lower(state, base, rig.place(like.batch)).compile(compiler_options=quick())


def assert_same_step(got: tuple[Params, dict[str, float]], want: tuple[Params, dict[str, float]]) -> None:
    """Metrics to 1e-5, gradients to 1e-4 of the largest of their array: float32 rounding, and no more."""
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)

    def compare(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(compare, got[0], want[0])
