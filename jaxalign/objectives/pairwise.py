"""Losses over (chosen, rejected) pairs that compare the policy with a reference.

In the docstrings D_w and D_l are the log-ratios log p / p_ref of the chosen and of the rejected answer,
d = D_w - D_l, z = beta d, and s the logistic function.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from pydantic import Field

from jaxalign.objectives.answers import Answers, Pair, clamped_exp, over_pairs, scaled_ratio
from jaxalign.objectives.base import TokenLoss

REFERENCE = frozenset({"ref"})


class Paired(TokenLoss):
    """What these losses have in common."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = REFERENCE
    rates: ClassVar[tuple[float, float]] = (5e-7, 5e-6)

    beta: float = Field(default=0.1, gt=0)
    """strength of the pull towards the reference: higher stays closer"""

    __call__ = over_pairs
    reward = scaled_ratio


class DPO(Paired):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): L = -log s(z)."""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.beta * pair.delta)


class ConservativeDPO(Paired):
    """cDPO (E. Mitchell, A note on DPO with noisy preferences, 2023): a label is wrong with probability e.
    L = -(1 - e) log s(z) - e log s(-z)."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """share of pairs whose order is taken to be wrong"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        z, e = self.beta * pair.delta, self.label_smoothing
        return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


class RobustDPO(Paired):
    """Robust DPO (arXiv:2403.00409), unbiased where a share e of the labels is flipped.
    L = (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """share of pairs whose order is taken to be wrong; below one half"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]; may be negative."""
        z, e = self.beta * pair.delta, self.label_smoothing
        return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


class Hinge(Paired):
    """SLiC's hinge on DPO's margin (arXiv:2309.06657): L = max(0, 1 - z)."""

    beta: float = Field(default=0.05, gt=0)
    """what a unit of log-ratio is worth against the margin of 1"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return jax.nn.relu(1 - self.beta * pair.delta)


class IPO(Paired):
    """Identity preference optimisation (arXiv:2310.12036, eq. 17): L = (d - 1 / (2 tau))^2, a regression to a
    finite margin. The published results take the log-ratios per token."""

    beta: float = Field(default=0.1, gt=0)
    """tau: the margin aimed at is 1 / (2 tau). It means another thing for sums than for averages"""
    length_norm: bool = True
    """log-ratios per token; false takes their sums, as the equation stands"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        per_token = per_token_ratio(pair.chosen) - per_token_ratio(pair.rejected)
        return jnp.square((per_token if self.length_norm else pair.delta) - 1 / (2 * self.beta))


class EXO(Paired):
    """EXO for pairs (arXiv:2402.00856): reverse KL of (s(z), s(-z)) from (1 - e, e)."""

    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """e: probability of the rejected answer in the target; at 0 the loss is infinite"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        z, e = self.beta * pair.delta, self.label_smoothing
        better = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-e))
        return better + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(e))


class NCA(Paired):
    """Noise contrastive alignment for pairs (arXiv:2402.05369):
    L = -log s(beta D_w) - log s(-beta D_w) / 2 - log s(-beta D_l) / 2."""

    beta: float = Field(default=0.01, gt=0)
    """strength of the pull towards the reference"""
    rates: ClassVar[tuple[float, float]] = (5e-6, 5e-5)

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        w, l = self.beta * pair.chosen.ratio, self.beta * pair.rejected.ratio  # noqa: E741
        return -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l)


class BCOPair(Paired):
    """Binary classifier optimisation over pairs (arXiv:2404.04656 without shift):
    L = -log s(beta D_w) - log s(-beta D_l)."""

    beta: float = Field(default=0.01, gt=0)
    """strength of the pull towards the reference"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.beta * pair.chosen.ratio) - log_sigmoid(-self.beta * pair.rejected.ratio)


class SPPO(Paired):
    """Self-play preference optimisation with hard labels (arXiv:2405.00675):
    L = (D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2."""

    beta: float = Field(default=1e-3, gt=0)
    """the log-ratios aimed at are +-1 / (2 beta)"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        target = 0.5 / self.beta
        return jnp.square(pair.chosen.ratio - target) + jnp.square(pair.rejected.ratio + target)


class APOZero(Paired):
    """Anchored preference optimisation (arXiv:2408.06266), for chosen answers better than the model's:
    L = 1 - s(beta D_w) + s(beta D_l)."""

    rates: ClassVar[tuple[float, float]] = (2e-7, 2e-6)

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return 1 - sigmoid(self.beta * pair.chosen.ratio) + sigmoid(self.beta * pair.rejected.ratio)


class APODown(Paired):
    """Anchored preference optimisation (arXiv:2408.06266), for a model better than the chosen answers:
    L = s(beta D_w) + 1 - s(z)."""

    rates: ClassVar[tuple[float, float]] = (2e-7, 2e-6)

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return sigmoid(self.beta * pair.chosen.ratio) + 1 - sigmoid(self.beta * pair.delta)


class DiscoPOP(Paired):
    """DiscoPOP (arXiv:2406.08414): L = (1 - m) (-log s(z)) + m exp(-z), m = s(z / tau)."""

    beta: float = Field(default=0.05, gt=0)
    """strength of the pull towards the reference"""
    temperature: float = Field(default=0.05, gt=0)
    """tau of the blend"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        z = self.beta * pair.delta
        blend = sigmoid(z / self.temperature)
        return -(1 - blend) * log_sigmoid(z) + blend * clamped_exp(-z)


class SigmoidNorm(Paired):
    """DPO on log-ratios per token: L = -log s(beta (D_w / n_w - D_l / n_l))."""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -log_sigmoid(self.beta * (per_token_ratio(pair.chosen) - per_token_ratio(pair.rejected)))


class FDPO(Paired):
    """f-DPO (arXiv:2309.16240): L = -log s(beta (f'(e^D_w) - f'(e^D_l))) for an f-divergence."""

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    """which f: reverse_kl is DPO"""
    alpha: float = 0.5
    """order of the alpha divergence; at 1 it is reverse_kl"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        score = lambda ratio: SCORES[self.divergence](ratio, self.alpha)  # noqa: E731
        return -log_sigmoid(self.beta * (score(pair.chosen.ratio) - score(pair.rejected.ratio)))


def _alpha_score(ratio: jax.Array, alpha: float) -> jax.Array:
    return ratio if alpha == 1 else clamped_exp((alpha - 1) * ratio, 80.0) / (alpha - 1)


# f'(u) at u = e^ratio, up to constants that cancel in the difference.
SCORES = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -clamped_exp(-ratio, 80.0),
    "js": lambda ratio, alpha: log_sigmoid(ratio),
    "alpha": _alpha_score,
}


class DPOP(Paired):
    """DPO-Positive (arXiv:2402.13228), which keeps the chosen answer likely:
    L = -log s(beta (d - l max(0, -D_w)))."""

    beta: float = Field(default=0.3, gt=0)
    """strength of the pull towards the reference"""
    penalty: float = Field(default=50.0, ge=0)
    """l: weight of what the chosen answer has lost against the reference"""

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        lost = jax.nn.relu(-pair.chosen.ratio)
        return -log_sigmoid(self.beta * (pair.delta - self.penalty * lost))


class ODPO(Paired):
    """DPO with an offset (arXiv:2402.10571): L = -log s(z - a f(margin)), margin > 0 in the data."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"margin"}

    alpha: float = Field(default=1.0, ge=0)
    """a: what the scores' difference is worth against log-ratios; 0 is DPO"""
    scale: Literal["log", "identity"] = "log"
    """f: how the difference of the scores enters"""

    def fault(self, aux: dict[str, Any]) -> str | None:
        """A margin of 0: no order to learn, and no logarithm."""
        return None if aux["margin"] > 0 else "have a margin that is not above 0"

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        # A padded pair has no margin; 1 is neutral under the logarithm.
        margin = jnp.where(pair.margin > 0, pair.margin, 1.0)
        offset = jnp.log(margin) if self.scale == "log" else margin
        return -log_sigmoid(self.beta * pair.delta - self.alpha * offset)


class NPO(Paired):
    """Negative preference optimisation (arXiv:2404.05868), to forget the rejected answers:
    L = -(2 / beta) log s(-beta D_l). The chosen ones are not used."""

    rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return -2 / self.beta * log_sigmoid(-self.beta * pair.rejected.ratio)


def per_token_ratio(answer: Answers) -> jax.Array:
    """log p / p_ref of a token, on average."""
    return answer.ratio / jnp.maximum(answer.length, 1)
