"""Losses over pairs that are made of others: a term beside DPO, weights on pairs or tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from pydantic import Field

from jaxalign.objectives.answers import Pair, Result, reduce_pairs
from jaxalign.objectives.base import Scores
from jaxalign.objectives.pairwise import REFERENCE, Paired
from jaxalign.types import Batch


class RPO(Paired):
    """DPO with a term of supervised fine-tuning (arXiv:2405.16436, arXiv:2404.19733):
    L = -log s(z) + a NLL_w, the second term a mean over the tokens of the step."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"tokens_per_group"}

    beta: float = Field(default=0.01, gt=0)
    """strength of the pull towards the reference"""
    alpha: float = Field(default=0.005, ge=0)
    """a: weight of the negative log-likelihood of the chosen answers; iterative RPO takes 1"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.beta * pair.delta) + self.alpha * pair.nll


class WPO(Paired):
    """Weighted preference optimisation (arXiv:2406.11827): DPO, each pair weighted with how likely the policy
    is to say both, w = product over both of exp(mean_t (log p_t - log sum_v p_v^2)), without gradient."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"collision"}

    beta: float = Field(default=0.01, gt=0)
    """strength of the pull towards the reference"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The weighted losses' sum over the pairs, and the pairs' number."""
        pair = Pair.of(scores, batch)
        lengths = jnp.maximum(scores.mask.sum(axis=-1), 1)
        likely = jnp.where(scores.mask, scores.logp - scores.collision, 0.0).sum(axis=-1) / lengths
        weight = jax.lax.stop_gradient(jnp.exp(likely.sum(axis=-1)))
        return reduce_pairs(self.loss(pair, weight), self.reward, pair, scores)

    def loss(self, pair: Pair, weight: Any) -> jax.Array:
        """float32 [B]."""
        return -weight * log_sigmoid(self.beta * pair.delta)


class LDDPO(Paired):
    """Length-desensitised DPO (arXiv:2409.06411): tokens beyond the shorter answer's length count `alpha`."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """what a log-probability beyond the common length counts; 1 is DPO"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """DPO's mean over the re-weighted sums."""
        pair = Pair.of(scores, batch, self.weight(scores.mask))
        return reduce_pairs(self.loss(pair), self.reward, pair, scores)

    def weight(self, mask: jax.Array) -> jax.Array:
        """float32 [B, 2, T] of each target: 1 up to the shorter answer's length, alpha beyond it."""
        shorter = mask.sum(axis=-1).min(axis=-1)[:, None, None]
        return jnp.where(jnp.cumsum(mask, axis=-1) <= shorter, 1.0, self.alpha)

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.beta * pair.delta)
