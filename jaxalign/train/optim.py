"""Optimisers and learning-rate schedules: optax chains behind two registries.

A schedule is `name(config, total) -> factor`, and `factor(step)` multiplies the learning rate; the formulas
are those of transformers' `optimization.py`. An optimiser is `name(config, schedule, mask) -> optax chain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import AfterValidator, Field

from jaxalign.config import Config
from jaxalign.errors import nearest
from jaxalign.registry import OPTIMIZERS, SCHEDULES, Registry
from jaxalign.types import Params

Factor = Callable[[Any], Any]  # step (int32, counted from 0) -> multiple of the learning rate
Mask = Callable[[Params], Any]  # parameters -> tree of bool


def _registered(registry: Registry) -> Callable[[str], str]:
    """A pydantic check that a name is in `registry`."""

    def check(name: str) -> str:
        if name not in registry.entries:
            raise ValueError(
                f"unknown {registry.kind}{nearest(name, registry)}; known: {', '.join(registry)}"
            )
        return name

    return check


class OptimConfig(Config):
    """How the trained parameters move."""

    optimizer: Annotated[str, AfterValidator(_registered(OPTIMIZERS))] = "adamw"
    """update rule: adamw | adafactor | lion | sgd; adamw keeps two float32 numbers per parameter, lion and
    sgd one, adafactor almost none"""
    learning_rate: float | None = Field(None, gt=0)
    """peak learning rate; null takes what is usual for the method and for what trains: in sft 2e-5 for every
    weight, 2e-4 for lora, 1e-2 for prompt, 3e-2 for prefix"""
    schedule: Annotated[str, AfterValidator(_registered(SCHEDULES))] = "cosine"
    """course of the learning rate after warm-up: cosine | linear | constant | wsd; cosine and linear fall
    over the whole run, wsd (warm-up, stable, decay) only in the last `decay_ratio` of the steps"""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """share of the steps over which the learning rate climbs linearly from 0"""
    decay_ratio: float = Field(0.1, ge=0, le=1)
    """wsd: share of the steps over which the learning rate falls at the end"""
    final_learning_rate: float = Field(0.0, ge=0, le=1)
    """where cosine, linear and wsd end, as a share of the peak"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay per unit of learning rate; norms and biases are never decayed"""
    grad_clip: float | None = Field(1.0, gt=0)
    """largest global norm of the gradient; longer ones are scaled down; null is off"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """decay of the running mean of gradients (adamw, lion), or the momentum (sgd)"""
    beta2: float = Field(0.999, ge=0, lt=1)
    """decay of the running mean of squared gradients (adamw), or of the momentum (lion)"""
    adam_epsilon: float = Field(1e-8, gt=0)
    """adamw: added to the denominator"""


def warmup_steps(config: OptimConfig, total: int) -> int:
    """Steps of warm-up in a run of `total` steps, rounded up."""
    return math.ceil(total * config.warmup_ratio)


def cosine(config: OptimConfig, total: int) -> Factor:
    """Half a cosine from 1 down to `final_learning_rate` (arXiv:1608.03983, one cycle)."""
    progress = _progress(warmup_steps(config, total), total)
    return lambda step: _above(config.final_learning_rate, 0.5 * (1 + jnp.cos(jnp.pi * progress(step))))


def linear(config: OptimConfig, total: int) -> Factor:
    """A straight line from 1 down to `final_learning_rate`."""
    progress = _progress(warmup_steps(config, total), total)
    return lambda step: _above(config.final_learning_rate, 1 - progress(step))


def constant(config: OptimConfig, total: int) -> Factor:
    """1 after warm-up."""
    return lambda step: jnp.ones_like(step, jnp.float32)


def wsd(config: OptimConfig, total: int) -> Factor:
    """1, and in the last `decay_ratio` of the steps a line down (arXiv:2404.06395, section 4)."""
    progress = _progress(total - math.ceil(total * config.decay_ratio), total)
    return lambda step: _above(config.final_learning_rate, 1 - progress(step))


def _progress(first: int, last: int) -> Factor:
    """0 up to step `first`, 1 from step `last` on."""
    return lambda step: jnp.clip((step - first) / max(1, last - first), 0, 1)


def _above(floor: float, factor: Any) -> Any:
    return floor + (1 - floor) * factor


def make_schedule(config: OptimConfig, learning_rate: float, total: int) -> Factor:
    """`schedule(step)` is the learning rate of the step-th update of `total`, counted from 0."""
    factor, warm = SCHEDULES[config.schedule](config, total), warmup_steps(config, total)

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step)
        return learning_rate * jnp.where(step < warm, step / max(1, warm), factor(step))

    return schedule


def learning_rates(schedule: Factor, total: int) -> np.ndarray:
    """float32 [total]: the learning rate of every step, for the log."""
    return np.asarray(jax.jit(schedule)(jnp.arange(total)))


def decayed(params: Params) -> Any:
    """True at the leaves that weight decay reaches: matrices, not norm scales nor biases.

    Told by name, because layers are stacked: the scale of a norm is a matrix [L, D].
    """

    def leaf(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias")

    return jax.tree.map_with_path(leaf, params)


def adamw(config: OptimConfig, schedule: Factor, mask: Mask) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2)."""
    c = config
    return optax.adamw(schedule, c.beta1, c.beta2, c.adam_epsilon, weight_decay=c.weight_decay, mask=mask)


def adafactor(config: OptimConfig, schedule: Factor, mask: Mask) -> optax.GradientTransformation:
    """Factored second moments (arXiv:1804.04235, algorithm 4), with the given learning rate."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def lion(config: OptimConfig, schedule: Factor, mask: Mask) -> optax.GradientTransformation:
    """The sign of a momentum (arXiv:2302.06675, algorithm 2). Use a tenth of adamw's learning rate."""
    return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=mask)


def sgd(config: OptimConfig, schedule: Factor, mask: Mask) -> optax.GradientTransformation:
    """Gradient descent with momentum `beta1`."""
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(decay, optax.sgd(schedule, momentum=config.beta1 or None))


def make_optimizer(config: OptimConfig, schedule: Factor) -> optax.GradientTransformation:
    """The chain that `config` asks for: clip the gradient, then the update rule on the schedule."""
    rule = OPTIMIZERS[config.optimizer](config, schedule, decayed)
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    return optax.chain(clip, rule)
