"""Losses over (chosen, rejected) pairs that need no reference model.

In the docstrings p_w and p_l are the policy's probabilities of the chosen and of the rejected answer, a_w and
a_l their log-probabilities per token, and s the logistic function.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from pydantic import Field

from jaxalign.objectives.answers import Answers, Pair, log1mexp, over_pairs
from jaxalign.objectives.base import TokenLoss


class Unreferenced(TokenLoss):
    """What these losses have in common."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"
    rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    beta: float = Field(default=0.1, gt=0)
    """what a unit of log-probability is worth"""

    __call__ = over_pairs

    def reward(self, answer: Answers) -> jax.Array:
        """beta log p."""
        return self.beta * answer.logp


class SLiCHF(Unreferenced):
    """Sequence likelihood calibration (arXiv:2305.10425): L = max(0, m - log p_w + log p_l) - l log p_w, the
    second term a sum over tokens."""

    beta: float = Field(default=1.0, gt=0)
    """m: the margin by which the chosen answer shall be more likely, in nats"""
    regularization: float = Field(default=0.1, ge=0)
    """l: weight of the negative log-likelihood of the chosen answer"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        hinge = jax.nn.relu(self.beta - pair.chosen.logp + pair.rejected.logp)
        return hinge - self.regularization * pair.chosen.logp


class CPO(Unreferenced):
    """Contrastive preference optimisation (arXiv:2401.08417): L = -log s(beta (log p_w - log p_l)) + a NLL_w,
    the second term a mean over the tokens of the step, as TRL has it."""

    needs: ClassVar[frozenset[str]] = frozenset({"tokens_per_group"})

    alpha: float = Field(default=1.0, ge=0)
    """a: weight of the negative log-likelihood of the chosen answers"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of pairs whose order is taken to be wrong"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        z, e = self.beta * (pair.chosen.logp - pair.rejected.logp), self.label_smoothing
        return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z) + self.alpha * pair.nll


class SimPO(Unreferenced):
    """Simple preference optimisation (arXiv:2405.14734): L = -log s(beta (a_w - a_l) - g)."""

    beta: float = Field(default=2.0, ge=1)
    """what a unit of log-probability per token is worth; 2 to 10 were published, below 1 it hardly learns"""
    gamma: float = Field(default=1.0, ge=0)
    """g: the margin in units of reward; 0.3 to 0.5 times beta is usual"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.reward(pair.chosen) - self.reward(pair.rejected) - self.gamma)

    def reward(self, answer: Answers) -> jax.Array:
        """beta log p per token."""
        return self.beta * answer.average


class AlphaPO(Unreferenced):
    """AlphaPO (arXiv:2501.03884): SimPO with the reward beta (1 - p^-alpha) / alpha, p being the probability
    of a token on average (geometric mean). SimPO is the limit at alpha = 0."""

    beta: float = Field(default=2.0, ge=1)
    """scale of the reward"""
    gamma: float = Field(default=1.0, ge=0)
    """the margin in units of reward"""
    alpha: float = 0.25
    """bend of the reward"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.reward(pair.chosen) - self.reward(pair.rejected) - self.gamma)

    def reward(self, answer: Answers) -> jax.Array:
        """float32 of the answer's shape."""
        if not self.alpha:
            return self.beta * answer.average
        exponent = jnp.minimum(-self.alpha * answer.average, 80.0)  # float32 ends at e^88
        return self.beta * -jnp.expm1(exponent) / self.alpha


class ORPO(Unreferenced):
    """Odds ratio preference optimisation (arXiv:2403.07691): L = NLL_w - l log s(log odds_w - log odds_l),
    odds = p / (1 - p) of the probability per token. NLL_w is a mean over the tokens of the step."""

    needs: ClassVar[frozenset[str]] = frozenset({"tokens_per_group"})
    rates: ClassVar[tuple[float, float]] = (8e-6, 8e-5)

    beta: float = Field(default=0.1, ge=0)
    """l: weight of the odds ratio's term"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return pair.nll - self.beta * log_sigmoid(_log_odds(pair.chosen) - _log_odds(pair.rejected))

    def reward(self, answer: Answers) -> jax.Array:
        """beta log p per token."""
        return self.beta * answer.average


def _log_odds(answer: Answers) -> jax.Array:
    """log(p / (1 - p)); p is kept below 1, where it would be infinite."""
    average = jnp.minimum(answer.average, -1e-7)
    return average - log1mexp(average)
