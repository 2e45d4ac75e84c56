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
from jaxalign.models.decoder import Adapter, Model, parameter_count
from jaxalign.models.hashing import adapter_hash
from jaxalign.models.load import Loaded, load_model
from jaxalign.sharding import data_shards, tree_shardings
from jaxalign.train.checkpoint import Parts
from jaxalign.train.feed import place
from jaxalign.train.flops import Cost, peak_flops, training_cost
from jaxalign.train.loop import Speed
from jaxalign.train.optim import make_optimizer, make_schedule
from jaxalign.train.precompute import Reference
from jaxalign.train.programs import Programs
from jaxalign.train.reference import REFERENCE, Mode, Move, ReferenceConfig, held, mover, resolve_mode
from jaxalign.train.settings import TrainConfig
from jaxalign.train.stages import renewed
from jaxalign.train.state import TrainState, init_state, state_shardings
from jaxalign.train.step import make_eval, make_step
from jaxalign.types import Batch, ModelSource, Params

REMAT = ("none", "dots", "full")  # from the one that keeps most to the leanest
HEADROOM = 0.92  # share of a device's memory that a program may ask for


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
    """A loaded model as training sees it: `params` move, `base` does not (and is empty in full tuning).

    `imported`: the adapter that trains had been trained before.
    """

    loaded: Loaded
    model: Model
    params: Params
    base: Params
    full: bool
    shardings: Params
    imported: bool = False

    def split(self, params: Params) -> tuple[Params, Params | None]:
        """(adapter or all weights, head of a reward model or None) of `params` in their form. A critic is no
        part of what is kept."""
        if "trunk" not in params:
            return params, None
        return params["trunk"], None if "critic" in params else params["head"]

    @property
    def counts(self) -> tuple[int, int]:
        """(numbers that are trained, numbers in all)."""
        trained = parameter_count(self.params)
        return trained, trained if self.full else trained + parameter_count(self.model.shapes()[1])


def load_weights(source: ModelSource, mesh: Mesh, config: TrainConfig) -> Weights:
    """Base and adapter on the mesh, ready to train. `config` must be resolved.

    An imported adapter is trained on, or folded into the base where every weight trains. Raises `UserError`
    as `load_model` does, and for an adapter that cannot be folded.
    """
    compute, full = DTYPES[config.dtype], config.adapter is None
    if full and config.quantise != "none":
        raise UserError(
            f"every weight trains, and weights in {config.quantise} cannot",
            place="quantise",
            remedy="leave it out, or train an adapter (lora)",
        )
    imported = source.adapter is not None
    wanted = config.adapter if not imported or config.names_adapter else None
    param_dtype = jnp.float32 if full else compute
    loaded = load_model(
        source,
        mesh,
        adapter=wanted,
        param_dtype=param_dtype,
        compute_dtype=compute,
        quantise=config.quantise,
    )
    model = replace(loaded.model, neftune_alpha=config.neftune_alpha)
    (adapter_shapes, shapes), (adapter_axes, axes) = model.shapes(), model.axes()
    if full:
        shardings = tree_shardings(mesh, axes, shapes)
        params = _merged(model, loaded, shardings) if imported else loaded.base
        bare = replace(model, adapter=None)
        return Weights(replace(loaded, model=bare, base={}, adapter=None), bare, params, {}, full, shardings)
    shardings = tree_shardings(mesh, adapter_axes, adapter_shapes)
    make = jax.jit(model.init_adapter, out_shardings=shardings)
    base = loaded.base if model.adapter is not None and model.adapter.needs_base else None
    params = loaded.adapter if loaded.adapter is not None else make(jax.random.key(config.seed), base)
    trained_before = loaded.adapter is not None
    return Weights(replace(loaded, adapter=None), model, params, loaded.base, full, shardings, trained_before)


def check_foldable(adapter: Adapter) -> None:
    """Raises `UserError` where every weight is to train over an adapter that cannot be folded into them."""
    if not adapter.foldable:
        raise UserError(
            f"every weight is to train, and the {adapter.key} that the model comes with cannot be folded "
            "into them",
            place="lora",
            remedy="leave lora=null out to train it on, or start from its base",
        )


def _merged(model: Model, loaded: Loaded, shardings: Params) -> Params:
    if model.adapter is not None:
        check_foldable(model.adapter)
    merge = jax.jit(model.merge, out_shardings=shardings, donate_argnums=1)
    return merge(loaded.adapter, loaded.base)


def learning_rate(config: TrainConfig, rates: tuple[float, float]) -> float:
    """The peak learning rate: the configured one, or the method's usual one, `rates` (full, LoRA), times what
    the kind of adapter asks for."""
    if config.learning_rate is not None:
        return config.learning_rate
    return rates[0] if config.adapter is None else float(f"{rates[1] * config.adapter.rate:.6g}")


@dataclass(frozen=True)
class Machine:
    """Everything that runs on the devices. `say` is told about compilations; `begins`: the numbers of updates
    after which another stage of the data begins."""

    weights: Weights
    objective: Any
    mesh: Mesh
    config: TrainConfig
    total: int
    say: Callable[[str], None]
    begins: tuple[int, ...] = ()

    @cached_property
    def schedule(self) -> Callable[[Any], Any]:
        """Learning rate by step."""
        return make_schedule(self.config, learning_rate(self.config, self.objective.rates), self.total)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain."""
        return make_optimizer(self.config, self.schedule)

    @cached_property
    def mode(self) -> Mode | None:
        """What the reference policy is; None where the objective has none. Raises `UserError`."""
        if "ref" not in self.objective.needs:
            return None
        asked: ReferenceConfig = getattr(self.config, "reference", REFERENCE)
        w, adapter = self.weights, self.weights.model.adapter
        kind = {"full": w.full, "imported": w.imported, "mixes": adapter is not None and adapter.mixes}
        return resolve_mode(asked, renewed=renewed(self.config), **kind)

    def reference(self) -> Reference:
        """The reference policy of precomputed log-probs: what the run starts from."""
        w, source = self.weights, self.weights.loaded.source
        start, _ = w.split(w.params)
        adapter, base = (None, start) if w.full else (start if w.imported else None, w.base)
        identity = f"{w.loaded.base_hash}+{adapter_hash(source.adapter)}:{self.config.dtype}"
        return Reference(w.model, adapter, base, self.mesh, identity)

    @cached_property
    def state_shardings(self) -> Any:
        """Where every leaf of the state lies."""
        w = self.weights
        return state_shardings(w.params, self.optimizer, w.shardings, self.mesh, **self._kept)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state."""
        w = self.weights
        args = (self.optimizer, w.shardings, self.mesh, self.config.seed)
        shapes = jax.eval_shape(lambda params: init_state(params, *args, **self._kept), w.params)
        like = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(like, shapes, self.state_shardings)

    def new_state(self) -> TrainState:
        """The state before the first step. Takes the weights' `params`: they are gone afterwards."""
        w = self.weights
        args = (self.optimizer, w.shardings, self.mesh, self.config.seed)
        return init_state(w.params, *args, **self._kept)

    @property
    def _kept(self) -> dict[str, bool]:
        """What the state holds besides what every state does."""
        return {"reference": held(self.mode), "past": "past" in self.objective.needs}

    def parts(self, state: TrainState) -> Parts:
        """A state as a checkpoint holds it. A frozen reference is not in it: the run began with it."""
        moving = state.reference if self.mode == "ema" else None
        rest = {"step": state.step, "key": state.key}
        return {
            "params": state.params,
            "opt": state.opt,
            "rest": rest,
            "reference": moving,
            "past": state.past,
        }

    def resumed(self, parts: Parts) -> TrainState:
        """The state that a checkpoint's `parts` make. Takes the weights' `params` too."""
        rest = parts["rest"]
        reference = self.weights.params if self.mode == "frozen" else parts["reference"]
        kept = (parts["params"], parts["opt"], rest["key"], reference, parts["past"])
        return TrainState(rest["step"], *kept)

    def forget_start(self) -> None:
        """Frees the weights' `params` on the devices, where a checkpoint takes their place."""
        _ = self.abstract_state
        if self.mode != "frozen":
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
                move=self._move,
            )
            programs = Programs(step, "the training step", self.say)
            if self._prepared(programs, state, batches) or policy == policies[-1]:
                break
            self.say(f"remat={policy} does not fit the device, trying the next leaner one")
        for batch in batches:
            programs.prepare(state, self.weights.base, batch)
        return programs

    @property
    def _move(self) -> Move | None:
        config: Any = self.config
        begins = self.begins if renewed(config) else None
        return mover(config.reference, self.mode, begins) if self.mode else None

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
            reference=self.mode not in (None, "precomputed"),
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
