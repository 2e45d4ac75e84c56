"""The parts of a run put together: mesh, precision, parameters, state, and the compiled steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxalign.errors import UserError
from jaxalign.models.base import DTYPES
from jaxalign.models.decoder import Model, parameter_count
from jaxalign.models.load import Loaded, load_model
from jaxalign.sharding import RULES, tree_shardings
from jaxalign.train.feed import place
from jaxalign.train.flops import Cost, peak_flops, training_cost
from jaxalign.train.loop import Speed
from jaxalign.train.optim import make_optimizer, make_schedule
from jaxalign.train.programs import Programs
from jaxalign.train.settings import TrainConfig
from jaxalign.train.state import TrainState, init_state, state_shardings
from jaxalign.train.step import make_eval, make_step
from jaxalign.types import Batch, ModelSource, Params

REMAT = ("none", "dots", "full")  # from the one that keeps most to the leanest
HEADROOM = 0.92  # share of a device's memory that a program may ask for


def data_shards(mesh: Mesh) -> int:
    """Parts into which the rows of a forward pass are cut."""
    shards = 1
    for axis in RULES["batch"]:
        shards *= mesh.shape[axis]
    return shards


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `UserError` unless a forward pass's rows divide over the devices. `config` must be resolved."""
    rows, shards = config.batch_size or 0, data_shards(mesh)
    if rows % (config.grad_accumulation * shards):
        unit = config.grad_accumulation * shards
        raise UserError(
            f"batch_size={rows} does not divide by grad_accumulation={config.grad_accumulation} "
            f"x {shards} devices (mesh.data x mesh.fsdp)",
            place="batch_size",
            remedy=f"try batch_size={-(-rows // unit) * unit}, less grad_accumulation, or more mesh.tensor",
        )


def remat_policies(asked: str, platform: str) -> tuple[str, ...]:
    """What to try in turn. On a CPU keeping everything is slower than `dots`: fresh memory costs more there
    than elementwise arithmetic."""
    if asked != "auto":
        return (asked,)
    return REMAT[1:] if platform == "cpu" else REMAT


@dataclass(frozen=True)
class Weights:
    """A loaded model as training sees it: `params` move, `base` does not (and is empty in full tuning)."""

    loaded: Loaded
    model: Model
    params: Params
    base: Params
    full: bool
    shardings: Params

    @property
    def counts(self) -> tuple[int, int]:
        """(numbers that are trained, numbers in all)."""
        trained = parameter_count(self.params)
        return trained, trained if self.full else trained + parameter_count(self.base)


def load_weights(source: ModelSource, mesh: Mesh, config: TrainConfig) -> Weights:
    """Base and adapter on the mesh, ready to train. `config` must be resolved.

    An imported adapter is trained on, or folded into the base where `lora` is null. Raises `UserError` as
    `load_model` does.
    """
    compute, full = DTYPES[config.dtype], config.lora is None
    imported = source.adapter is not None
    wanted = config.lora if not imported or "lora" in config.model_fields_set else None
    param_dtype = jnp.float32 if full else compute
    loaded = load_model(source, mesh, adapter=wanted, param_dtype=param_dtype, compute_dtype=compute)
    model = replace(loaded.model, neftune_alpha=config.neftune_alpha)
    (adapter_shapes, shapes), (adapter_axes, axes) = model.shapes(), model.axes()
    if full:
        shardings = tree_shardings(mesh, axes, shapes)
        params = _merged(model, loaded, shardings) if imported else loaded.base
        bare = replace(model, adapter=None)
        return Weights(replace(loaded, model=bare, base={}, adapter=None), bare, params, {}, full, shardings)
    shardings = tree_shardings(mesh, adapter_axes, adapter_shapes)
    make = jax.jit(model.init_adapter, out_shardings=shardings)
    params = loaded.adapter if loaded.adapter is not None else make(jax.random.key(config.seed))
    return Weights(replace(loaded, adapter=None), model, params, loaded.base, full, shardings)


def _merged(model: Model, loaded: Loaded, shardings: Params) -> Params:
    merge = jax.jit(model.merge, out_shardings=shardings, donate_argnums=1)
    return merge(loaded.adapter, loaded.base)


def learning_rate(config: TrainConfig) -> float:
    """The peak learning rate: the configured one, or the usual one of the mode."""
    if config.learning_rate is not None:
        return config.learning_rate
    return 2e-5 if config.lora is None else 2e-4


@dataclass(frozen=True)
class Machine:
    """Everything that runs on the devices. `say` is told about compilations."""

    weights: Weights
    objective: Any
    mesh: Mesh
    config: TrainConfig
    total: int
    say: Callable[[str], None]

    @cached_property
    def schedule(self) -> Callable[[Any], Any]:
        """Learning rate by step."""
        return make_schedule(self.config, learning_rate(self.config), self.total)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain."""
        return make_optimizer(self.config, self.schedule)

    @cached_property
    def state_shardings(self) -> Any:
        """Where every leaf of the state lies."""
        return state_shardings(self.weights.params, self.optimizer, self.weights.shardings, self.mesh)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state: what a checkpoint is read into."""
        w = self.weights
        args = (self.optimizer, w.shardings, self.mesh, self.config.seed)
        shapes = jax.eval_shape(lambda params: init_state(params, *args), w.params)
        like = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(like, shapes, self.state_shardings)

    def new_state(self) -> TrainState:
        """The state before the first step. Takes the weights' `params`: they are gone afterwards."""
        w = self.weights
        return init_state(w.params, self.optimizer, w.shardings, self.mesh, self.config.seed)

    def forget_start(self) -> None:
        """Frees the weights' `params` on the devices, where a checkpoint takes their place."""
        _ = self.abstract_state
        jax.tree.map(lambda x: x.delete(), self.weights.params)

    def train_programs(self, batches: list[Batch]) -> Programs:
        """The step, compiled for the abstract `batches`, the largest last, with the remat that was asked for.

        `auto` takes the first policy whose program fits the device's memory.
        """
        policies = remat_policies(self.config.remat, self.mesh.devices.flat[0].platform)
        state = self.abstract_state
        for policy in policies:
            model = replace(self.weights.model, remat=policy)
            step = make_step(
                model,
                self.objective,
                self.optimizer,
                self.mesh,
                train_base=self.weights.full,
                out_shardings=self.state_shardings,
            )
            programs = Programs(step, "the training step", self.say)
            if self._prepared(programs, state, batches) or policy == policies[-1]:
                break
            self.say(f"remat={policy} does not fit the device, trying the next leaner one")
        for batch in batches:
            programs.prepare(state, self.weights.base, batch)
        return programs

    def _prepared(self, programs: Programs, state: TrainState, batches: list[Batch]) -> bool:
        """Compiles for the largest batch; whether it fits."""
        try:
            return fits(programs.prepare(state, self.weights.base, batches[-1]))
        except jax.errors.JaxRuntimeError as error:  # TPU compilers refuse what does not fit
            if "RESOURCE_EXHAUSTED" in str(error):
                return False
            raise

    def eval_programs(self, batches: list[Batch]) -> Programs:
        """The evaluation pass, compiled for the abstract `batches` [B, G, T]."""
        evaluate = make_eval(self.weights.model, self.objective, self.mesh, train_base=self.weights.full)
        programs = Programs(evaluate, "the evaluation", self.say)
        for batch in batches:
            programs.prepare(self.abstract_state, self.weights.base, batch)
        return programs

    def evaluator(self, programs: Programs, batches: list[Batch]) -> Callable[[TrainState], dict[str, float]]:
        """evaluate(state) -> `eval_` metrics: sums and weights over all the host `batches`, divided once."""

        def evaluate(state: TrainState) -> dict[str, float]:
            totals: dict[str, list[float]] = {}
            parts = [programs(state, self.weights.base, place(b, self.mesh, 0)) for b in batches]
            for part in jax.device_get(parts):
                for name, (total, weight) in part.items():
                    old = totals.setdefault(name, [0.0, 0.0])
                    old[0], old[1] = old[0] + float(total), old[1] + float(weight)
            return {f"eval_{name}": total / max(weight, 1e-8) for name, (total, weight) in totals.items()}

        return evaluate

    @property
    def layer_windows(self) -> dict[int, int]:
        """How many layers have each attention window, for `work_of`."""
        config = self.weights.model.config
        return dict(Counter(config.kinds[kind][1] for kind in config.layer_kinds))

    @property
    def speed(self) -> Speed:
        """FLOPs of a step's work, and the device's peak where it is known."""
        config, kind = self.weights.model.config, jax.devices()[0].device_kind
        cost: Cost = training_cost(
            self.weights.model.shapes()[1],
            heads=config.num_heads,
            head_dim=config.head_dim,
            full=self.weights.full,
        )
        return Speed(cost.of, peak_flops(kind, self.config.dtype))


def fits(program: Any) -> bool:
    """Whether a compiled program's memory is within what its device has; True where either is not known."""
    stats = jax.local_devices()[0].memory_stats()
    limit = (stats or {}).get("bytes_limit")
    analysis = program.memory_analysis()
    if limit is None or analysis is None:
        return True
    a = analysis
    asked = a.argument_size_in_bytes + a.output_size_in_bytes + a.temp_size_in_bytes - a.alias_size_in_bytes
    return asked <= HEADROOM * limit
