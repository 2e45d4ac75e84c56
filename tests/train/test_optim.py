"""Learning rates against the formulas of transformers and optax, and what each chain does to parameters."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.registry import OPTIMIZERS, SCHEDULES
from jaxalign.train.optim import (
    OptimConfig,
    decayed,
    learning_rates,
    make_optimizer,
    make_schedule,
    warmup_steps,
)

TOTAL, RATE = 97, 2e-4


def _rates(**keys: object) -> np.ndarray:
    config = load_config(OptimConfig, values=keys)
    return learning_rates(make_schedule(config, RATE, TOTAL), TOTAL)


def _warm(step: int, warm: int) -> float | None:
    return step / max(1, warm) if step < warm else None


def _hf_cosine(step: int, warm: int) -> float:
    """transformers.optimization._get_cosine_schedule_with_warmup_lr_lambda, num_cycles 0.5"""
    progress = (step - warm) / max(1, TOTAL - warm)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


def _hf_linear(step: int, warm: int) -> float:
    """transformers.optimization._get_linear_schedule_with_warmup_lr_lambda"""
    return max(0.0, (TOTAL - step) / max(1, TOTAL - warm))


def _hf_constant(step: int, warm: int) -> float:
    """transformers.optimization._get_constant_schedule_with_warmup_lr_lambda"""
    return 1.0


def _hf_wsd(step: int, warm: int) -> float:
    """transformers.optimization._get_wsd_scheduler_lambda, decay_type linear, a tenth of the steps"""
    decay = math.ceil(TOTAL * 0.1)
    if step < TOTAL - decay:
        return 1.0
    return 1.0 - (step - (TOTAL - decay)) / decay


FORMULAS = {"cosine": _hf_cosine, "linear": _hf_linear, "constant": _hf_constant, "wsd": _hf_wsd}


def test_every_schedule_is_checked_here() -> None:
    assert set(FORMULAS) == set(SCHEDULES)


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.25])
@pytest.mark.parametrize("name", list(FORMULAS))
def test_schedule_follows_transformers(name: str, ratio: float) -> None:
    warm = math.ceil(TOTAL * ratio)
    expected = [
        RATE * (w if (w := _warm(s, warm)) is not None else FORMULAS[name](s, warm)) for s in range(TOTAL)
    ]
    np.testing.assert_allclose(
        _rates(schedule=name, warmup_ratio=ratio), expected, rtol=2e-6, atol=1e-6 * RATE
    )


def test_cosine_is_optax_warmup_cosine() -> None:
    warm = warmup_steps(OptimConfig(), TOTAL)
    peer = optax.warmup_cosine_decay_schedule(0.0, RATE, warm, TOTAL, end_value=0.1 * RATE)
    ours = _rates(schedule="cosine", final_learning_rate=0.1)
    np.testing.assert_allclose(ours, [float(peer(s)) for s in range(TOTAL)], rtol=1e-5, atol=1e-6 * RATE)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_final_learning_rate_is_where_it_ends(name: str) -> None:
    schedule = make_schedule(OptimConfig(schedule=name, final_learning_rate=0.25), RATE, TOTAL)
    assert float(schedule(TOTAL)) == pytest.approx(0.25 * RATE)


PARAMS = {
    "attn": {"q": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}},
    "norm": {"scale": jnp.ones((2, 4))},
}


def test_decay_reaches_matrices_only() -> None:
    assert decayed(PARAMS) == {"attn": {"q": {"kernel": True, "bias": False}}, "norm": {"scale": False}}


def _after_one(config: OptimConfig, gradient: float) -> dict:
    optimizer = make_optimizer(config, make_schedule(config, 0.1, 10))
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_weight_decay_alone_shrinks_matrices(name: str) -> None:
    config = OptimConfig(optimizer=name, schedule="constant", warmup_ratio=0, weight_decay=0.5)
    moved = _after_one(config, 0.0)
    np.testing.assert_allclose(moved["attn"]["q"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(moved["norm"]["scale"], 1.0)
    np.testing.assert_allclose(moved["attn"]["q"]["bias"], 1.0)


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 0.1), ("lion", 0.1), ("adafactor", 0.1), ("sgd", 0.1 * 3.0)]
)
def test_first_step_of_each_rule(name: str, expected: float) -> None:
    """The update of a gradient 3 everywhere: adamw, lion and adafactor move by the rate, sgd by rate x 3."""
    config = OptimConfig(optimizer=name, schedule="constant", warmup_ratio=0, grad_clip=None)
    np.testing.assert_allclose(_after_one(config, 3.0)["norm"]["scale"], 1 - expected, rtol=1e-5)


def test_clipping_bounds_the_global_norm() -> None:
    config = OptimConfig(optimizer="sgd", schedule="constant", warmup_ratio=0, grad_clip=1.0)
    moved = _after_one(config, 3.0)
    change = jax.tree.map(lambda new, old: (old - new) / 0.1, moved, PARAMS)
    assert float(optax.tree.norm(change)) == pytest.approx(1.0, rel=1e-5)


def test_unknown_name_points_to_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        load_config(OptimConfig, overrides=["optimizer=adamx"])
