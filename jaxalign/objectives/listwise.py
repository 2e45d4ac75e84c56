"""Losses over lists of ranked answers to one prompt.

Scores of the answers are aux "scores", float32 [B, G], higher is better, NaN behind the end of a list.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxalign.config import Config
from jaxalign.objectives.answers import Result, answers, scaled_ratio
from jaxalign.objectives.base import Scores
from jaxalign.types import Batch


class Listed(Config):
    """What these losses have in common."""

    group: ClassVar[int] = 0
    data: ClassVar[str] = "lists"
    needs: ClassVar[frozenset[str]] = frozenset()
    rates: ClassVar[tuple[float, float]] = (5e-6, 5e-5)
    defaults: ClassVar[dict[str, Any]] = {"epochs": 1.0}


class LiPO(Listed):
    """LiPO-lambda (arXiv:2402.01878): over pairs with score i above score j,
    L = sum |G_i - G_j| |1 / D_i - 1 / D_j| softplus(s_j - s_i), s = beta log p / p_ref, G = 2^score - 1,
    D = log(1 + rank by s). Scores lie in 0..1. With two answers and a weight of 1 it is DPO."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})

    beta: float = Field(default=0.05, gt=0)
    """strength of the pull towards the reference"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present, labels = each.length > 0, batch.aux["scores"]
        return reduce_lists(self.loss(scaled_ratio(self, each), labels, present), present)

    def loss(self, score: jax.Array, labels: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B] of policy scores and labels [B, G]."""
        labels = jnp.where(present, labels, 0.0)
        hidden = jnp.where(present, jax.lax.stop_gradient(score), -jnp.inf)
        rank = 1 + jnp.argsort(jnp.argsort(-hidden, axis=-1, stable=True), axis=-1)
        gain, discount = 2.0**labels - 1, jnp.log1p(rank.astype(score.dtype))
        gap = lambda x: x[..., :, None] - x[..., None, :]  # noqa: E731
        weight = jnp.abs(gap(gain)) * jnp.abs(gap(1 / discount))
        counts = (gap(labels) > 0) & present[..., :, None] & present[..., None, :]
        return jnp.where(counts, weight * jax.nn.softplus(-gap(score)), 0.0).sum(axis=(-2, -1))


class PRO(Listed):
    """Preference ranking optimisation (arXiv:2306.17492), answers from best to worst, p_i the log-probability
    of a token on average: L = sum_k lse_{i >= k}(t_ki p_i) - t_kk p_k + w (n - 1)^2 NLL_best, with
    t_ki = score_k - score_i and t_kk the largest of them. NLL_best is a sum over tokens."""

    sft_weight: float = Field(default=0.05, ge=0)
    """w: weight of the negative log-likelihood of the best answer"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present = each.length > 0
        loss = self.ranking(each.average, batch.aux["scores"], present)
        others = jnp.square(jnp.maximum(present.sum(axis=-1) - 1, 0))
        return reduce_lists(loss - self.sft_weight * others * each.logp[:, 0], present)

    def ranking(self, average: jax.Array, labels: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B]: the loss without its last term."""
        labels = jnp.where(present, labels, 0.0)
        size = labels.shape[-1]
        later = jnp.triu(jnp.ones((size, size), bool), 1) & present[:, :, None] & present[:, None, :]
        below = jnp.where(later, labels[:, :, None] - labels[:, None, :], 0.0)  # [B, k, i]
        own = below.max(axis=-1)
        z = jnp.where(later, below * average[:, None, :], -jnp.inf)
        first = own * average
        total = jax.nn.logsumexp(jnp.concatenate([first[..., None], z], axis=-1), axis=-1)
        return jnp.where(later.any(axis=-1), total - first, 0.0).sum(axis=-1)


class RRHF(Listed):
    """Rank responses (arXiv:2304.05302): with p the length-normalised log-probability of an answer,
    L = w sum_{score_i < score_j} max(0, p_i - p_j) + NLL_best, NLL_best per token."""

    rates: ClassVar[tuple[float, float]] = (2e-5, 2e-4)

    rank_weight: float = Field(default=1.0, ge=0)
    """w: weight of the ranking term"""
    length_penalty: float = Field(default=1.0, ge=0)
    """power of the length by which a log-probability is divided"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each, labels = answers(scores), batch.aux["scores"]
        present = each.length > 0
        normed = each.logp / jnp.maximum(each.length, 1) ** self.length_penalty
        best = jnp.argmax(jnp.where(present, labels, -jnp.inf), axis=-1)[:, None]
        nll = -jnp.take_along_axis(each.average, best, axis=-1)[:, 0]
        return reduce_lists(self.rank_weight * self.ranking(normed, labels, present) + nll, present)

    def ranking(self, normed: jax.Array, labels: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B]: the hinge over all pairs."""
        labels = jnp.where(present, labels, 0.0)
        worse = (labels[:, :, None] < labels[:, None, :]) & present[:, :, None] & present[:, None, :]
        return jnp.where(worse, jax.nn.relu(normed[:, :, None] - normed[:, None, :]), 0.0).sum(axis=(-2, -1))


def reduce_lists(loss: jax.Array, present: jax.Array) -> Result:
    """(sum of the loss [B] over lists with an answer, their number, metrics)."""
    some = present.any(axis=-1)
    count = some.sum().astype(jnp.float32)
    sizes = present.sum().astype(jnp.float32)
    return jnp.where(some, loss, 0.0).sum(), count, {"answers": (sizes, count)}
