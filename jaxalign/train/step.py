"""The only gradient step: accumulate sums over micro-batches, divide once, update what trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxalign.models.decoder import Model
from jaxalign.objectives.base import Metrics, Objective, Scores
from jaxalign.objectives.logprobs import targets
from jaxalign.sharding import data_shards
from jaxalign.train.reference import Move
from jaxalign.train.score import rewards, score, values
from jaxalign.train.state import TrainState
from jaxalign.types import Batch, Params

VALUES = ("value", "cost_value")  # what the rows of a critic's head are

Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]
Eval = Callable[[TrainState, Params, Batch], Metrics]


def make_loss(model: Model, objective: Objective, mesh: Mesh, train_base: bool) -> Callable[..., Any]:
    """loss(params, reference, base, batch [B, G, T], key) -> (loss sum, (weight, metrics)).

    `params` is the adapter over the frozen `base`, or all weights (`train_base`), and then base is unused;
    for a reward model {"trunk": that, "head"}, for a policy with its critic {"trunk", "critic", "head"}.
    `reference` is that of `TrainState`.
    """

    def weights(params: Params | None, base: Params) -> tuple[Params | None, Params]:
        return (None, params) if train_base and params else (params, base)

    forward = partial(
        score,
        model,
        temperature=objective.softness,
        train_base=train_base,
        compact=mesh.size == 1,
        spread=data_shards(mesh),
    )

    def token_scores(params: Params, reference: Any, base: Params, batch: Batch, key: Any) -> Scores:
        scores = forward(*weights(params, base), batch, key=key, needs=objective.needs)
        if "ref" not in objective.needs:
            return scores
        kept = batch.aux.get("ref")
        ref = forward(*weights(reference, base), batch).logp if kept is None else kept
        return replace(scores, ref=jax.lax.stop_gradient(ref))

    def answer_scores(params: Params, reference: Any, base: Params, batch: Batch, key: Any) -> jax.Array:
        return rewards(model, *weights(params["trunk"], base), params["head"], batch, key)

    def both_scores(params: Params, reference: Any, base: Params, batch: Batch, key: Any) -> Scores:
        start = None if reference is None else reference["trunk"]
        scores = token_scores(params["trunk"], start, base, batch, key)
        found = values(model, params["critic"], base, params["head"], batch, key)
        return replace(scores, **{name: found[..., i] for i, name in enumerate(VALUES[: found.shape[-1]])})

    kinds = {"tokens": token_scores, "reward": answer_scores, "actor_critic": both_scores}
    scores = kinds[objective.kind]

    def loss(params: Params, reference: Params | None, base: Params, batch: Batch, key: Any) -> Any:
        total, weight, metrics = objective(scores(params, reference, base, batch, key), batch)
        return total, (weight, metrics)

    return loss


def make_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    train_base: bool = False,
    out_shardings: Any = None,
    move: Move | None = None,
) -> Step:
    """A jitted step over batches [A, B, G, T]: A micro-batches are scanned, and the result does not depend on
    how a step's rows are cut into micro-batches, devices or packed rows.

    The state is donated; `out_shardings` (`state_shardings`) keeps it where it was; `move` is that of
    `reference.mover`. A step whose loss or gradient is not finite (metric `nonfinite`), or that is beyond the
    objective's `bounds`, is skipped: it changes nothing but the counter (and a reference that was to move).
    """
    loss = make_loss(model, objective, mesh, train_base)

    @partial(jax.jit, donate_argnums=0, out_shardings=out_shardings and (out_shardings, None))
    def step(state: TrainState, base: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if "tokens_per_group" in objective.needs:
            batch = _with_tokens_per_group(batch)
        if move and state.reference is not None:
            # Before the update: an evaluation after it still compares with the reference that it had.
            state = replace(state, reference=move(state.reference, state.params, state.step))

        def micro(index: jax.Array, part: Batch) -> Any:
            part = _with_past(part, state.past, 1.0)
            grad = jax.value_and_grad(loss, has_aux=True)
            noise = jax.random.fold_in(key, index)
            (total, (weight, metrics)), grads = grad(state.params, state.reference, base, part, noise)
            return grads, {"loss": (total, weight), **metrics}, (part.segments != 0).sum()

        grads, metrics, tokens = _sum_over(micro, batch)
        past = None if state.past is None else jnp.stack(metrics["running_mean"])
        weight = jnp.maximum(metrics["loss"][1], 1e-8)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        means = divide(metrics)
        made = finite & jnp.asarray([means[name] <= most for name, most in objective.bounds.items()]).all()
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(made, new, old)  # noqa: E731
        params, opt, past = jax.tree.map(keep, (params, opt, past), (state.params, state.opt, state.past))
        report = means | {
            "grad_norm": norm,
            "num_tokens": tokens,
            "num_targets": metrics["loss"][1],
            "nonfinite": 1 - finite.astype(jnp.int32),
            "skipped": 1 - made.astype(jnp.int32),
        }
        return replace(state, step=state.step + 1, params=params, opt=opt, past=past), report

    return step


def _sum_over(micro: Callable[[jax.Array, Batch], Any], batch: Batch) -> Any:
    """The sum of micro(index, micro-batch) over the leading axis, without a copy for each."""
    count = batch.tokens.shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return micro(jnp.zeros((), jnp.int32), first)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, jnp.int32(0), first))

    def body(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro(*item)), None

    return jax.lax.scan(body, start, (jnp.arange(count), batch))[0]


def _with_tokens_per_group(batch: Batch) -> Batch:
    """The batch [..., G, T] with aux "tokens_per_group": targets of the first member, on average over the
    groups that have any."""
    counts = targets(batch)[..., 0, :].sum(axis=-1)
    mean = counts.sum() / jnp.maximum((counts > 0).sum(), 1)
    return replace(batch, aux=batch.aux | {"tokens_per_group": jnp.full(counts.shape, mean)})


def _with_past(batch: Batch, past: Any, joins: float) -> Batch:
    """The batch with aux "past", where the state keeps one: sum and count so far, and whether the rows of the
    batch join them (1.0) or not (0.0)."""
    return batch if past is None else replace(batch, aux=batch.aux | {"past": (*past, joins)})


def make_eval(model: Model, objective: Objective, mesh: Mesh, *, train_base: bool = False) -> Eval:
    """eval(state, base, batch [B, G, T]) -> {name: (sum, weight)}, without training noise."""
    loss = make_loss(model, objective, mesh, train_base)

    @jax.jit
    def evaluate(state: TrainState, base: Params, batch: Batch) -> Metrics:
        if "tokens_per_group" in objective.needs:
            batch = _with_tokens_per_group(batch)
        batch = _with_past(batch, state.past, 0.0)
        total, (weight, metrics) = loss(state.params, state.reference, base, batch, None)
        return {"loss": (total, weight), **metrics}

    return evaluate


def divide(metrics: Metrics) -> dict[str, jax.Array]:
    """{name: sum / weight}; 0 where nothing was weighed."""
    return {name: total / jnp.maximum(weight, 1e-8) for name, (total, weight) in metrics.items()}
