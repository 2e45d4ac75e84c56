"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxalign.config import Config
from jaxalign.objectives.base import Metrics, Scores
from jaxalign.types import Batch


class SFT(Config):
    """L = - sum_t m_t log p(y_t | y_<t) / sum_t m_t, over all tokens of a step (global token mean)."""

    kind: ClassVar[str] = "tokens"
    group: ClassVar[int] = 1
    data: ClassVar[str] = "sft"
    rates: ClassVar[tuple[float, float]] = (2e-5, 2e-4)
    defaults: ClassVar[dict[str, Any]] = {}
    softness: ClassVar[float] = 1.0
    bounds: ClassVar[dict[str, float]] = {}

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """share of the target spread evenly over the vocabulary (arXiv:1512.00567, section 7)"""
    z_loss: float = Field(default=0.0, ge=0)
    """weight of logsumexp(z)^2, which keeps logits from drifting (arXiv:2204.02311, section 5), say 1e-4"""
    dft: bool = False
    """dynamic fine-tuning (arXiv:2508.05629, eq. 9): each token's loss is scaled by its own probability"""

    @property
    def needs(self) -> frozenset[str]:
        """The mean logit, where labels are smoothed."""
        return frozenset({"mean_logit"} if self.label_smoothing else ())

    def __call__(self, scores: Scores, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sum of the loss over targets, their number, and TRL's metrics."""
        weight = scores.mask.sum().astype(jnp.float32)
        nll = -scores.logp
        if self.dft:
            nll = jax.lax.stop_gradient(jnp.exp(scores.logp)) * nll
        if self.label_smoothing:
            uniform = scores.logsumexp - scores.mean_logit
            nll = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        if self.z_loss:
            nll = nll + self.z_loss * jnp.square(scores.logsumexp)
        loss = jnp.where(scores.mask, nll, 0.0).sum()
        metrics = {
            "mean_token_accuracy": (scores.correct.sum(), weight),
            "entropy": (scores.entropy.sum(), weight),
        }
        return loss, weight, metrics
