"""Losses over lists of ranked answers to one prompt.

Scores of the answers are aux "scores", float32 [B, G], higher is better, NaN behind the end of a list.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax
from pydantic import Field

from jaxalign.objectives.answers import Result, answers, scaled_ratio
from jaxalign.objectives.base import Metrics, Scores, TokenLoss
from jaxalign.types import Batch

_ABSENT = -1e30  # a score of an answer that is none: its share of any softmax is 0, and no infinity is about


class Listed(TokenLoss):
    """What these losses have in common."""

    group: ClassVar[int] = 0
    data: ClassVar[str] = "lists"
    rates: ClassVar[tuple[float, float]] = (5e-6, 5e-5)


class LiPO(Listed):
    """LiPO-lambda (arXiv:2402.01878): over pairs with score i above score j,
    L = sum |G_i - G_j| |1 / D_i - 1 / D_j| softplus(s_j - s_i), s = beta log p / p_ref, G = 2^score - 1,
    D = log(1 + rank by s). In G the scores lie in 0..1, as `labels` says. With two answers and a weight of 1
    it is DPO."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})

    beta: float = Field(default=0.05, gt=0)
    """strength of the pull towards the reference"""
    labels: Literal["wins", "minmax", "scores"] = "wins"
    """what scores become before they weigh pairs. wins: the share of the list's other answers that an answer
    beats, as in the paper, for scores of any scale; minmax: 0 for a list's worst score to 1 for its best;
    scores: as they are, from 0 to 1"""

    def fault(self, aux: dict[str, Any]) -> str | None:
        """Scores that no gain is meant for."""
        if self.labels != "scores" or ((aux["scores"] >= 0) & (aux["scores"] <= 1)).all():
            return None
        return "have scores outside 0 to 1, which labels=wins and labels=minmax take"

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present = each.length > 0
        labels = LABELS[self.labels](jnp.where(present, batch.aux["scores"], 0.0), present)
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


def _wins(scores: jax.Array, present: jax.Array) -> jax.Array:
    """The share of a list's other answers that each beats, ties half: what the ranker's mean probability to
    win (arXiv:2402.01878, section 3) is where it is sure."""
    gap = scores[..., :, None] - scores[..., None, :]
    others = present[..., None, :] & ~jnp.eye(scores.shape[-1], dtype=bool)
    beats = jnp.where(others, (1 + jnp.sign(gap)) / 2, 0.0).sum(axis=-1)
    return beats / jnp.maximum(others.sum(axis=-1), 1)


def _minmax(scores: jax.Array, present: jax.Array) -> jax.Array:
    """0 for the worst of a list, 1 for the best; 0 where all are equal."""
    low = jnp.where(present, scores, jnp.inf).min(axis=-1, keepdims=True)
    high = jnp.where(present, scores, -jnp.inf).max(axis=-1, keepdims=True)
    return jnp.where(high > low, (scores - low) / jnp.where(high > low, high - low, 1.0), 0.0)


# float32 [B, G] of scores [B, G] and of which answers are there, bool [B, G]; anything for those that are not
LABELS = {"wins": _wins, "minmax": _minmax, "scores": lambda scores, present: scores}


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


class ListMLE(Listed):
    """DPO over rankings (arXiv:2305.18290, appendix A.3): the likelihood of an order from best to worst,
    L = -sum_k (s_k - lse_{i >= k} s_i), s = beta log p / p_ref. With two answers it is DPO."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})
    rates: ClassVar[tuple[float, float]] = (5e-7, 5e-6)

    beta: float = Field(default=0.1, gt=0)
    """strength of the pull towards the reference"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present = each.length > 0
        return reduce_lists(self.loss(scaled_ratio(self, each), present), present)

    def loss(self, score: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B] of policy scores [B, G]."""
        score = jnp.where(present, score, _ABSENT)
        rest = jax.lax.cumlogsumexp(score, axis=score.ndim - 1, reverse=True)
        return jnp.where(present, rest - score, 0.0).sum(axis=-1)


class EXOList(Listed):
    """EXO for lists with scores r (arXiv:2402.00856): L = KL(q | p), q = softmax(beta log p / p_ref) over the
    answers of a list, p = softmax(r / b). With two answers it is EXO for pairs, p being (1 - e, e)."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})
    rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    beta: float = Field(default=0.1, gt=0)
    """strength of the pull towards the reference"""
    score_temperature: float = Field(default=0.1, gt=0)
    """b: by how much a score must be higher to be e times as good"""
    divergence: Literal["reverse", "forward"] = "reverse"
    """reverse is EXO; forward takes the cross entropy -sum p log q, DPO with scores"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present = each.length > 0
        return reduce_lists(self.loss(each.ratio, batch.aux["scores"], present), present)

    def loss(self, ratio: jax.Array, labels: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B] of log-ratios and scores [B, G]."""
        over = lambda x: log_softmax(jnp.where(present, x, _ABSENT), axis=-1)  # noqa: E731
        q, p = over(self.beta * ratio), over(labels / self.score_temperature)
        each = jnp.exp(q) * (q - p) if self.divergence == "reverse" else -jnp.exp(p) * q
        return jnp.where(present, each, 0.0).sum(axis=-1)


class D2O(Listed):
    """Distributional dispreference optimisation (arXiv:2403.03419): only the bad answer is a person's.
    L = -log s(beta mean_k D_k - a D_l): the last answer of a list, l, against the model's own, which are all
    before it. A list of one answer is left out."""

    needs: ClassVar[frozenset[str]] = frozenset({"ref"})

    beta: float = Field(default=0.1, gt=0)
    """what a unit of the own answers' log-ratio is worth"""
    alpha: float = Field(default=0.1, gt=0)
    """a: what a unit of the bad answer's log-ratio is worth"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the lists, and their number."""
        each = answers(scores)
        present = each.length > 0
        here = present & (present.sum(axis=-1, keepdims=True) > 1)
        own, bad = self.rewards(each.ratio, here)
        metrics = {
            "rewards/chosen": own,
            "rewards/rejected": bad,
            "rewards/margins": own - bad,
            "rewards/accuracies": (own > bad).astype(jnp.float32),
        }
        return reduce_lists(-log_sigmoid(own - bad), here, metrics)

    def rewards(self, ratio: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 [B] each, of log-ratios [B, G]: the mean of the model's own answers, and the bad one's."""
        place = jnp.arange(present.shape[-1])
        last = jnp.where(present, place, -1).max(axis=-1, keepdims=True)
        own, bad = present & (place < last), present & (place == last)
        total = lambda where: jnp.where(where, ratio, 0.0).sum(axis=-1)  # noqa: E731
        return self.beta * total(own) / jnp.maximum(own.sum(axis=-1), 1), self.alpha * total(bad)


def reduce_lists(loss: jax.Array, present: jax.Array, means: dict[str, jax.Array] | None = None) -> Result:
    """(sum of the loss [B] over lists with an answer, their number, metrics with the `means` over lists)."""
    some = present.any(axis=-1)
    count = some.sum().astype(jnp.float32)
    over = lambda x: (jnp.where(some, x, 0.0).sum(), count)  # noqa: E731
    metrics: Metrics = {name: over(x) for name, x in (means or {}).items()}
    metrics["answers"] = (present.sum().astype(jnp.float32), count)
    return over(loss)[0], count, jax.tree.map(jax.lax.stop_gradient, metrics)
