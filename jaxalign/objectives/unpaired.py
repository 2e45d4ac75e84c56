"""Losses over single answers with a label, wanted or not.

In the docstrings D is the log-ratio log p / p_ref of an answer and s the logistic function.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from pydantic import Field

from jaxalign.objectives.answers import Answers, Result, answers, scaled_ratio
from jaxalign.objectives.base import Metrics, Scores, TokenLoss
from jaxalign.types import Batch


class Labelled(TokenLoss):
    """What these losses have in common. The label of a row is aux "label", bool [B]."""

    group: ClassVar[int] = 1
    data: ClassVar[str] = "binary"
    needs: ClassVar[frozenset[str]] = frozenset({"ref", "whole_batch"})
    rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    beta: float = Field(default=0.1, gt=0)
    """strength of the pull towards the reference: higher stays closer"""

    reward = scaled_ratio


class KTO(Labelled):
    """Kahneman-Tversky optimisation (arXiv:2402.01306): a wanted answer loses l_D (1 - s(beta (D - z))),
    an unwanted one l_U (1 - s(beta (z - D))).

    z = max(0, mean D of answers to other rows' prompts), without gradient: an estimate of the KL divergence.
    Member 0 of a group is the row's own answer, member 1 its prompt with another row's answer.
    """

    group: ClassVar[int] = 2

    desirable_weight: float = Field(default=1.0, gt=0)
    """l_D; wanted rows times l_D should be 1 to 4/3 of unwanted rows times l_U"""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """l_U"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the rows, and their number."""
        both = answers(scores)
        other = both.member(1)
        z = jnp.maximum(_mean(other.ratio, other.length > 0), 0.0)
        own, label = both.member(0), batch.aux["label"]
        loss = self.loss(own.ratio, label, jax.lax.stop_gradient(z))
        total, count, metrics = reduce_rows(loss, self.reward(own), own, label)
        return total, count, metrics | {"kl": (jax.lax.stop_gradient(z) * count, count)}

    def loss(self, ratio: jax.Array, label: jax.Array, z: Any) -> jax.Array:
        """float32 [B]."""
        wanted = self.desirable_weight * (1 - sigmoid(self.beta * (ratio - z)))
        return jnp.where(label, wanted, self.undesirable_weight * (1 - sigmoid(self.beta * (z - ratio))))


class APOZeroUnpaired(Labelled):
    """APO-zero over single answers (arXiv:2408.06266): KTO with z = 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the rows, and their number."""
        own, label = answers(scores).member(0), batch.aux["label"]
        return reduce_rows(self.loss(own.ratio, label), self.reward(own), own, label)

    def loss(self, ratio: jax.Array, label: jax.Array) -> jax.Array:
        """float32 [B]."""
        return 1 - sigmoid(self.beta * jnp.where(label, ratio, -ratio))


class BCO(Labelled):
    """Binary classifier optimisation (arXiv:2404.04656): -log s(beta D - d) where the answer is wanted, else
    -log s(d - beta D). The shift d is a mean of beta D, without gradient."""

    shift: Literal["classes", "pooled", "running"] = "classes"
    """d: the mean of both classes' means over the batch, as in the paper; pooled: the mean over all rows of
    the batch; running: over all rows of this update and those before it, as TRL has it"""
    udm: bool = False
    """underlying distribution matching (section 4.2 of the paper), where wanted and unwanted answers are to
    prompts of different kinds: an unwanted one counts by how likely its prompt is to have a wanted one"""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """As in `Objective`."""
        more = {"past": self.shift == "running", "weight": self.udm}
        return Labelled.needs | {name for name, asked in more.items() if asked}

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the rows, and their number."""
        own, label = answers(scores).member(0), batch.aux["label"]
        reward, present = self.reward(own), own.length > 0
        metrics: Metrics = {}
        if self.shift == "running":
            total, count, joins = batch.aux["past"]
            total += joins * jax.lax.stop_gradient(jnp.where(present, reward, 0.0).sum())
            count += joins * present.sum()
            metrics["running_mean"] = (total, count)
            shift = total / jnp.maximum(count, 1.0)
        else:
            shift = SHIFTS[self.shift](reward, label, present)
        loss = self.loss(own.ratio, label, shift)
        if self.udm:
            loss = loss * batch.aux["weight"]
        total, count, shared = reduce_rows(loss, reward, own, label)
        return total, count, shared | metrics

    def loss(self, ratio: jax.Array, label: jax.Array, shift: jax.Array) -> jax.Array:
        """float32 [B]."""
        above = self.beta * ratio - jax.lax.stop_gradient(shift)
        return -log_sigmoid(jnp.where(label, above, -above))


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """The mean where `where`; 0 if that is nowhere."""
    return jnp.where(where, x, 0.0).sum() / jnp.maximum(where.sum(), 1)


def _class_means(reward: jax.Array, label: jax.Array, present: jax.Array) -> jax.Array:
    return 0.5 * (_mean(reward, present & label) + _mean(reward, present & ~label))


SHIFTS = {"classes": _class_means, "pooled": lambda reward, label, present: _mean(reward, present)}


def reduce_rows(loss: jax.Array, reward: jax.Array, own: Answers, label: jax.Array) -> Result:
    """(sum of the loss [B] over rows that are not padding, their number, metrics of both classes)."""
    present = own.length > 0
    total, count = jnp.where(present, loss, 0.0).sum(), present.sum().astype(jnp.float32)
    metrics: Metrics = {}
    for name, rows in (("chosen", present & label), ("rejected", present & ~label)):
        weight = rows.sum().astype(jnp.float32)
        for kind, value in (("rewards", reward), ("logps", own.logp), ("len", own.length)):
            metrics[f"{kind}/{name}"] = (jnp.where(rows, value, 0.0).sum(), weight)
    return total, count, jax.tree.map(jax.lax.stop_gradient, metrics)
