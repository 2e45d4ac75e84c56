"""Losses of reward and cost models: over one score r of each answer, float32 [B, G].

Which answers are there is `Batch.mask`: a member without targets is padding. In the docstrings s is the
logistic function, w the chosen answer and l the rejected one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from pydantic import Field, model_validator

from jaxalign.config import Config
from jaxalign.objectives.answers import Result
from jaxalign.objectives.base import Metrics
from jaxalign.types import Batch


class RewardLoss(Config):
    """What these losses have in common."""

    kind: ClassVar[str] = "reward"
    rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)
    defaults: ClassVar[dict[str, Any]] = {"epochs": 1.0}
    softness: ClassVar[float] = 1.0
    bounds: ClassVar[dict[str, float]] = {}

    def fault(self, aux: dict[str, Any]) -> str | None:
        """Any row will do."""
        return None


class BradleyTerry(RewardLoss):
    """Reward model over pairs (arXiv:2203.02155, eq. 1): L = -log s(r_w - r_l - m) + c (r_w + r_l)^2, with
    the margin m of arXiv:2307.09288, eq. 2, and the centering of arXiv:2312.09244."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"

    margin_weight: float = Field(default=0.0, ge=0)
    """what a unit of the rows' margin is worth: m is this times the margin; 0 does not look at it"""
    centering: float = Field(default=0.0, ge=0)
    """c: how strongly the rewards of a pair are drawn to a mean of 0; 0.01 is usual"""

    @property
    def needs(self) -> frozenset[str]:
        """The rows' margins, where they count."""
        return frozenset({"margin"} if self.margin_weight else ())

    def __call__(self, scores: jax.Array, batch: Batch) -> Result:
        """The sum over the pairs, and their number."""
        scores, present = _shown(scores, batch)
        margin = batch.aux["margin"] if self.margin_weight else 0.0
        loss = self.loss(scores, jnp.where(present.all(axis=-1), margin, 0.0))
        total, count, metrics = _reduce(loss, present, ranking("rewards", scores))
        return total, count, metrics | follows_length(scores, batch)

    def loss(self, scores: jax.Array, margin: Any) -> jax.Array:
        """float32 [B] of rewards [B, 2] and margins [B]."""
        gap = scores[:, 0] - scores[:, 1] - self.margin_weight * margin
        return -log_sigmoid(gap) + self.centering * jnp.square(scores.sum(axis=-1))


class KWise(RewardLoss):
    """Reward model over ranked lists (arXiv:2203.02155, eq. 1): the mean of -log s(r_i - r_j) over all pairs
    of a list with score i above score j, C(K, 2) of them where no two are equal. All lists weigh the same."""

    group: ClassVar[int] = 0
    data: ClassVar[str] = "lists"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: jax.Array, batch: Batch) -> Result:
        """The sum over the lists with two answers of different scores, and their number."""
        scores, present = _shown(scores, batch)
        better = self.better(batch.aux["scores"], present)
        gap = scores[:, :, None] - scores[:, None, :]
        pairs = better.sum().astype(jnp.float32)
        over = lambda x: (jnp.where(better, x, 0.0).sum(), pairs)  # noqa: E731
        some = better.any(axis=(-2, -1))
        total, count, _ = _reduce(self.loss(scores, better), some[:, None], {})
        answers = present.sum().astype(jnp.float32)
        metrics = {
            "rewards/margins": over(gap),
            "rewards/accuracies": over((gap > 0).astype(jnp.float32)),
            "rewards/mean": (scores.sum(), answers),
            **follows_length(scores, batch),
        }
        return total, count, jax.tree.map(jax.lax.stop_gradient, metrics)

    def better(self, labels: jax.Array, present: jax.Array) -> jax.Array:
        """bool [B, G, G]: answer i has a higher score than answer j."""
        known = present & jnp.isfinite(labels)
        labels = jnp.where(known, labels, 0.0)
        return (labels[:, :, None] > labels[:, None, :]) & known[:, :, None] & known[:, None, :]

    def loss(self, scores: jax.Array, better: jax.Array) -> jax.Array:
        """float32 [B]; 0 where no two answers differ."""
        each = jnp.where(better, -log_sigmoid(scores[:, :, None] - scores[:, None, :]), 0.0)
        return each.sum(axis=(-2, -1)) / jnp.maximum(better.sum(axis=(-2, -1)), 1)


class Rating(RewardLoss):
    """Regression to ratings: L = (s(r) - y)^2, y the answer's score between `lowest` and `highest` as a
    number from 0 to 1. Answers without a score are left out."""

    group: ClassVar[int] = 0
    data: ClassVar[str] = "lists"
    needs: ClassVar[frozenset[str]] = frozenset()

    lowest: float = 0.0
    """the worst score of the scale"""
    highest: float = 1.0
    """the best score of the scale"""

    def fault(self, aux: dict[str, Any]) -> str | None:
        """Ratings that the scale has not."""
        if ((aux["scores"] >= self.lowest) & (aux["scores"] <= self.highest)).all():
            return None
        return f"have scores outside lowest={self.lowest:g} to highest={self.highest:g}"

    @model_validator(mode="after")
    def _scale(self) -> Rating:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest:g}) must be below highest ({self.highest:g})")
        return self

    def __call__(self, scores: jax.Array, batch: Batch) -> Result:
        """The sum over the rated answers, and their number."""
        scores, present = _shown(scores, batch)
        labels = batch.aux["scores"]
        rated = present & jnp.isfinite(labels)
        labels = jnp.where(rated, labels, self.lowest)
        target = (labels - self.lowest) / (self.highest - self.lowest)
        count = rated.sum().astype(jnp.float32)
        over = lambda x: (jnp.where(rated, x, 0.0).sum(), count)  # noqa: E731
        metrics = {
            "rewards/mean": over(scores),
            "ratings/predicted": over(sigmoid(scores)),
            "ratings/given": over(target),
            "ratings/error": over(jnp.abs(sigmoid(scores) - target)),
            **follows_length(scores, batch),
        }
        return over(self.loss(scores, target))[0], count, jax.tree.map(jax.lax.stop_gradient, metrics)

    def loss(self, scores: jax.Array, target: jax.Array) -> jax.Array:
        """float32 of the scores' shape."""
        return jnp.square(sigmoid(scores) - target)


class Cost(RewardLoss):
    """Cost model (Safe RLHF, arXiv:2310.12773): with costs c, u the rejected (less safe) answer, w the
    chosen one and sign +1 for a safe answer, -1 for an unsafe one,
    L = -log s(c_u - c_w) - log s(-sign_w c_w) - log s(-sign_u c_u) + l (c_w^2 + c_u^2) / 2.
    Safe answers cost less than 0, unsafe ones more. aux "safe": bool [B, 2]."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"safe"})

    regularization: float = Field(default=1e-3, ge=0)
    """l: how strongly costs are drawn to 0"""

    def __call__(self, scores: jax.Array, batch: Batch) -> Result:
        """The sum over the pairs, and their number."""
        scores, present = _shown(scores, batch)
        sign = jnp.where(batch.aux["safe"], 1.0, -1.0)
        right = (sign * scores < 0).astype(jnp.float32).mean(axis=-1)
        metrics = ranking("costs", scores, lower=True) | {"costs/sign_accuracies": right}
        total, count, metrics = _reduce(self.loss(scores, sign), present, metrics)
        return total, count, metrics | follows_length(scores, batch)

    def loss(self, scores: jax.Array, sign: jax.Array) -> jax.Array:
        """float32 [B] of costs and signs [B, 2]."""
        ranked = -log_sigmoid(scores[:, 1] - scores[:, 0])
        signed = -log_sigmoid(-sign * scores).sum(axis=-1)
        return ranked + signed + self.regularization * jnp.square(scores).mean(axis=-1)


def ranking(name: str, scores: jax.Array, lower: bool = False) -> dict[str, jax.Array]:
    """Metrics [B] of scores [B, 2]. A tie is not a hit. `lower`: the chosen one shall score lower."""
    margin = (scores[:, 1] - scores[:, 0]) if lower else (scores[:, 0] - scores[:, 1])
    return {
        f"{name}/chosen": scores[:, 0],
        f"{name}/rejected": scores[:, 1],
        f"{name}/margins": margin,
        f"{name}/accuracies": (margin > 0).astype(jnp.float32),
    }


def follows_length(scores: jax.Array, batch: Batch) -> Metrics:
    """`length_correlation`: Goodman and Kruskal's gamma of score and length over pairs of answers to one
    prompt, the share in which the longer one scores higher less the share in which it scores lower.

    A correlation that is a sum over pairs: parts of a step add up, and evaluation by length does not bend it.
    """
    length = jnp.asarray(batch.mask).sum(axis=-1)
    present = length > 0
    gap = lambda x: jnp.sign(x[:, :, None] - x[:, None, :]).astype(jnp.float32)  # noqa: E731
    same = gap(scores) * gap(length)
    counts = present[:, :, None] & present[:, None, :] & (same != 0)
    over = (jnp.where(counts, same, 0.0).sum(), counts.sum().astype(jnp.float32))
    return {"length_correlation": jax.tree.map(jax.lax.stop_gradient, over)}


def _shown(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(scores [B, G], 0 for padding; which answers are there, bool [B, G])."""
    present = jnp.asarray(batch.mask).any(axis=-1)
    return jnp.where(present, scores, 0.0), present


def _reduce(loss: jax.Array, present: jax.Array, means: dict[str, jax.Array]) -> Result:
    """(sum of the loss [B] over groups [B, G] without padding, their number, metrics: means over these)."""
    whole = present.all(axis=-1)
    count = whole.sum().astype(jnp.float32)
    over = lambda x: (jnp.where(whole, x, 0.0).sum(), count)  # noqa: E731
    metrics: Metrics = {name: over(jax.lax.stop_gradient(x)) for name, x in means.items()}
    return over(loss)[0], count, metrics
