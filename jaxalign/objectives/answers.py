"""Scores of whole answers, and the body that every loss over (chosen, rejected) pairs shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxalign.objectives.base import Metrics, Scores
from jaxalign.types import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers:
    """Answers as a loss sees them, float32 arrays of one shape.

    logp    log p(answer | prompt), the sum over its targets
    ref     the same under the reference model, without gradient; 0 where there is none
    length  how many targets; 0 for an answer that is padding
    """

    logp: Any
    ref: Any
    length: Any

    @property
    def ratio(self) -> jax.Array:
        """log p / p_ref."""
        return self.logp - self.ref

    @property
    def average(self) -> jax.Array:
        """log p of a token, on average."""
        return self.logp / jnp.maximum(self.length, 1)

    def member(self, index: int) -> Answers:
        """[B, G] -> [B]: one answer of every group."""
        return jax.tree.map(lambda x: x[:, index], self)


def answers(scores: Scores, weight: jax.Array | None = None) -> Answers:
    """[B, G, T] -> [B, G]. `weight` [B, G, T] multiplies the log-probs of the tokens."""
    factor = scores.mask.astype(jnp.float32) if weight is None else jnp.where(scores.mask, weight, 0.0)
    total = lambda x: (x * factor).sum(axis=-1)  # noqa: E731
    length = scores.mask.sum(axis=-1).astype(jnp.float32)
    ref = jnp.zeros_like(length) if scores.ref is None else total(scores.ref)
    return Answers(total(scores.logp), jax.lax.stop_gradient(ref), length)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """Pairs of answers to one prompt, [B] each.

    margin  score of the chosen less that of the rejected, where the data has it
    tokens  targets of a chosen answer, on average over the step: what turns a sum of log-probs over the step
            into a mean over its tokens (`tokens_per_group`)
    """

    chosen: Answers
    rejected: Answers
    margin: Any = None
    tokens: Any = None

    @classmethod
    def of(cls, scores: Scores, batch: Batch, weight: jax.Array | None = None) -> Pair:
        """The pairs of a batch. An empty one becomes two likely answers of one token, so that no loss and no
        gradient of it is infinite before it is left out."""
        both = answers(scores, weight)
        empty = (both.length == 0).any(axis=1, keepdims=True)
        filler = Answers(-1.0, -1.0 if scores.ref is not None else 0.0, 1.0)
        both = jax.tree.map(lambda x, constant: jnp.where(empty, constant, x), both, filler)
        aux = batch.aux
        return cls(both.member(0), both.member(1), aux.get("margin"), aux.get("tokens_per_group"))

    @property
    def delta(self) -> jax.Array:
        """The log-ratio of the chosen less that of the rejected."""
        return self.chosen.ratio - self.rejected.ratio

    @property
    def nll(self) -> jax.Array:
        """Each pair's part of the negative log-likelihood of a chosen token, the mean over the step."""
        return -self.chosen.logp / self.tokens


class PairLoss(Protocol):
    """An objective over pairs: the loss of each, and the implicit reward that its metrics show."""

    needs: ClassVar[frozenset[str]]

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        ...

    def reward(self, answer: Answers) -> jax.Array:
        """float32 [B]."""
        ...


Result = tuple[jax.Array, jax.Array, Metrics]

# A margin up to here is a tie, and a tie is no hit: sums of float32 log-probs cannot tell it from 0, where a
# policy that is still its reference would show the accuracy of its rounding.
TIE = 1e-5


def over_pairs(objective: PairLoss, scores: Scores, batch: Batch) -> Result:
    """`Objective.__call__` of a `PairLoss`: the mean of `loss` over the pairs that are not padding."""
    pair = Pair.of(scores, batch)
    return reduce_pairs(objective.loss(pair), objective.reward, pair, scores)


def reduce_pairs(
    loss: jax.Array, reward: Callable[[Answers], jax.Array], pair: Pair, scores: Scores
) -> Result:
    """(sum of the loss [B], number of pairs, TRL's metrics)."""
    present = scores.mask.any(axis=-1).all(axis=-1)
    count = present.sum().astype(jnp.float32)
    over = lambda x: (jnp.where(present, x, 0.0).sum(), count)  # noqa: E731
    chosen, rejected = reward(pair.chosen), reward(pair.rejected)
    first = scores.mask[:, 0] & present[:, None]
    tokens = first.sum().astype(jnp.float32)
    metrics = {
        "rewards/chosen": over(chosen),
        "rewards/rejected": over(rejected),
        "rewards/margins": over(chosen - rejected),
        "rewards/accuracies": over((chosen - rejected > TIE).astype(jnp.float32)),
        "logps/chosen": over(pair.chosen.logp),
        "logps/rejected": over(pair.rejected.logp),
        "len/chosen": over(pair.chosen.length),
        "len/rejected": over(pair.rejected.length),
        "entropy": (jnp.where(first, scores.entropy[:, 0], 0.0).sum(), tokens),
        "mean_token_accuracy": (jnp.where(first, scores.correct[:, 0], 0.0).sum(), tokens),
    }
    metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
    return over(loss)[0], count, metrics


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, to full precision at both ends."""
    near = x > -jnp.log(2.0)
    # Twice guarded: the branch that is not taken must not send a NaN through the gradient.
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def clamped_exp(x: jax.Array, limit: float = 20.0) -> jax.Array:
    """exp of x clamped to +-limit."""
    return jnp.exp(jnp.clip(x, -limit, limit))


def scaled_ratio(objective: Any, answer: Answers) -> jax.Array:
    """beta log p / p_ref: the implicit reward of DPO (arXiv:2305.18290, eq. 5)."""
    return objective.beta * answer.ratio
