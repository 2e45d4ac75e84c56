"""Cringe: unwanted tokens are contrasted with tokens that the model would have said instead.

The papers draw one such token s* for each unwanted token s, out of the k likeliest others with the model's
probabilities of these. Here the loss is the mean over that draw, the probabilities without gradient: the
same gradient on average, without the draw's noise and without a random key.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.nn import sigmoid, softmax, softplus
from pydantic import Field

from jaxalign.objectives.answers import Answers, Pair, Result, answers, reduce_pairs
from jaxalign.objectives.base import RIVALS, Scores, TokenLoss
from jaxalign.objectives.unpaired import reduce_rows
from jaxalign.types import Batch


class Contrasted(TokenLoss):
    """What these losses have in common."""

    needs: ClassVar[frozenset[str]] = frozenset({"rivals"})
    rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    alpha: float = Field(default=1.0, ge=0)
    """a: weight of the unwanted answers"""
    top_k: int = Field(default=5, ge=1, le=RIVALS)
    """k: how many of the likeliest other tokens an unwanted one is contrasted with"""
    detach: bool = False
    """the other tokens get no gradient: unwanted ones are pushed down and nothing is pulled up"""

    def contrast(self, scores: Scores) -> jax.Array:
        """float32 [B, G]: sum_t E[softplus(s_t - s*_t)] of every answer, as if it were unwanted."""
        rivals = scores.rivals[..., : self.top_k]
        rivals = jax.lax.stop_gradient(rivals) if self.detach else rivals
        drawn = softmax(jax.lax.stop_gradient(rivals), axis=-1)
        # A difference of log-probs of one distribution is that of their logits.
        each = (drawn * softplus(scores.logp[..., None] - rivals)).sum(axis=-1)
        return jnp.where(scores.mask, each, 0.0).sum(axis=-1)

    def reward(self, answer: Answers) -> jax.Array:
        """log p."""
        return answer.logp


class Cringe(Contrasted):
    """Cringe (arXiv:2211.05826): a wanted answer loses -log p, an unwanted one
    a sum_t softplus(s_t - s*_t), s the logits."""

    group: ClassVar[int] = 1
    data: ClassVar[str] = "binary"

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the rows, and their number."""
        own, label = answers(scores).member(0), batch.aux["label"]
        loss = jnp.where(label, -own.logp, self.alpha * self.contrast(scores)[:, 0])
        return reduce_rows(loss, self.reward(own), own, label)


class CringePair(Contrasted):
    """Pairwise Cringe (arXiv:2312.16682): L = g (-log p_w + a sum_t softplus(s_t - s*_t)), the sum over the
    rejected answer, g = logistic((b - M) / t), M = log p_w - log p_l: pairs that are far apart fade out."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"

    offset: float = 0.0
    """b: the margin at which a pair counts half, in nats"""
    temperature: float = Field(default=1.0, gt=0)
    """t: over how many nats the weight of a pair falls"""
    gate_grad: bool = False
    """whether the weight of a pair passes gradients on"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the pairs, and their number."""
        pair = Pair.of(scores, batch)
        return reduce_pairs(self.loss(pair, self.contrast(scores)[:, 1]), self.reward, pair, scores)

    def loss(self, pair: Pair, contrast: jax.Array) -> jax.Array:
        """float32 [B] of pairs and of the rejected answers' contrast."""
        gate = sigmoid((self.offset - (pair.chosen.logp - pair.rejected.logp)) / self.temperature)
        gate = gate if self.gate_grad else jax.lax.stop_gradient(gate)
        return gate * (-pair.chosen.logp + self.alpha * contrast)
