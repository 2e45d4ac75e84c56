"""Losses over answers that an earlier policy sampled: policy gradients, clipped, and the critic's loss.

aux, float32 [B, G, T], aligned with `Batch.tokens`: `old`, log-probs under the policy that sampled, and
`advantage`; for a critic `value_old` and `returns`, and `policy_weight` [B], 0 while only the critic learns.
In the docstrings r is the ratio p / p_old, A the advantage, and e the clipping range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxalign.objectives.answers import Result, clamped_exp
from jaxalign.objectives.base import Metrics, Scores, TokenLoss
from jaxalign.types import Batch

MOST = 10.0  # mean ratio of policies above which an update is not made, where there is a bound


class PolicyLoss(TokenLoss):
    """What losses over rollouts have in common."""

    group: ClassVar[int] = 0
    data: ClassVar[str] = "rollouts"
    rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    temperature: float = Field(1.0, gt=0)
    """spread of the draws, and of the policy that learns from them: logits are divided by it"""
    kl_coef: float = Field(0.0, ge=0)
    """weight of the KL divergence from the reference that is taken off the rewards; 0 takes nothing"""
    beta: float = Field(0.0, ge=0)
    """weight of the KL divergence from the reference within the loss; 0 leaves it out"""
    max_approxkl: float | None = Field(None, gt=0)
    """an update is skipped where the policy is further than this from the one that sampled, in nats a token
    (policy/approxkl), or the ratio of the two above 10 on average; null makes all"""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The reference, where its distance weighs anything."""
        return frozenset({"ref"}) if self.kl_coef or self.beta else frozenset()

    @property
    def bounds(self) -> dict[str, float]:  # type: ignore[override]
        """As in `Objective`."""
        return {"policy/approxkl": self.max_approxkl, "val/ratio": MOST} if self.max_approxkl else {}

    @property
    def softness(self) -> float:
        """As in `Objective`."""
        return self.temperature


class ClippedPolicy(PolicyLoss):
    """max(-A r, -A clip(r, 1 - e, 1 + e)) (PPO, arXiv:1707.06347, eq. 7), with the ratio of a token or of an
    answer, plus beta times the k3 estimate of KL(p || p_ref) where beta > 0 (GRPO, arXiv:2402.03300, eq. 3).
    """

    epsilon: float = Field(0.2, gt=0)
    """how far the ratio may fall or rise before it has no more gradient"""
    epsilon_high: float | None = Field(None, gt=0)
    """how far it may rise, where that is another number (DAPO takes 0.28); null takes epsilon"""
    importance: Literal["token", "sequence", "sum"] = "token"
    """the ratio: of each token; of the answer, its geometric mean over the tokens (GSPO); or of the whole
    answer, their product (RLOO)"""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """the mean: over the tokens of each answer and then over answers (grpo), over all tokens of the update
    (dapo), or over answers as if each had max_tokens tokens (dr_grpo)"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over tokens and what divides it."""
        aux = batch.aux
        ratio = log_ratio(scores, aux, self.importance)
        loss = clipped(ratio, aux["advantage"], self.epsilon, self.epsilon_high) + penalty(self, scores)
        metrics = watch(scores, ratio, aux["advantage"], self.epsilon, self.epsilon_high)
        total, weight = REDUCE[self.loss_type](jnp.where(scores.mask, loss, 0.0), scores.mask, aux)
        return total, weight, metrics


class Reinforce(PolicyLoss):
    """-A log p, on average over all tokens: the plain policy gradient (ReMax, arXiv:2310.10505, eq. 6)."""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over tokens, and their number."""
        advantage = batch.aux["advantage"]
        loss = jnp.where(scores.mask, -advantage * scores.logp + penalty(self, scores), 0.0)
        total, weight = REDUCE["dapo"](loss, scores.mask, batch.aux)
        ratio = log_ratio(scores, batch.aux, "token")
        return total, weight, watch(scores, ratio, advantage, jnp.inf, None)


class PairwisePolicy(PolicyLoss):
    """Pairwise PPO (P3O, arXiv:2310.00212): two answers to a prompt, and half the gap of their rewards on
    each. `separate` clips the ratio of each answer, `joint` that of both, (l1 - l2) - (l1 - l2)_old."""

    group: ClassVar[int] = 2

    epsilon: float = Field(0.2, gt=0)
    """how far the ratio may move before it has no more gradient"""
    form: Literal["separate", "joint"] = "joint"
    """what is clipped"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over pairs, and their number. The advantage of a token is that of its answer."""
        tokens = log_ratio(scores, batch.aux, "token")
        ratio = tokens.sum(axis=-1)
        gap = _per_answer(batch.aux["advantage"], scores.mask)
        first, second, gap = ratio[:, 0], ratio[:, 1], gap[:, 0] - gap[:, 1]
        kl = jnp.where(scores.mask, penalty(self, scores), 0.0).sum(axis=(1, 2))
        loss = self.loss(first, second, gap) + kl
        present = scores.mask.any(axis=-1).all(axis=-1)
        watched = watch(scores, tokens, batch.aux["advantage"], self.epsilon, None)
        return jnp.where(present, loss, 0.0).sum(), present.sum().astype(jnp.float32), watched

    def loss(self, first: jax.Array, second: jax.Array, gap: jax.Array) -> jax.Array:
        """float32 [B] of the answers' log-ratios and the gap of their rewards."""
        if self.form == "joint":
            return 0.5 * clipped(first - second, gap, self.epsilon)
        return 0.5 * (clipped(first, gap, self.epsilon) + clipped(second, -gap, self.epsilon))


class ActorCritic(PolicyLoss):
    """PPO's policy and value losses: the mean over tokens of max(-A r, -A clip(r, 1 - e, 1 + e)), plus half
    of c times that of max((V - G)^2, (clip(V, V_old - f, V_old + f) - G)^2) (arXiv:1707.06347, section 5);
    f is `value_epsilon`, c `value_coef`, G the returns. With `ptx_data` every answer has one more row beside
    it, and the row's mean NLL, on average over the rows, is added `ptx_coef` times (arXiv:2203.02155, eq. 2).
    """

    kind: ClassVar[str] = "actor_critic"
    epsilon: float = Field(0.2, gt=0)
    """how far the ratio may move before it has no more gradient"""
    value_epsilon: float = Field(0.2, gt=0)
    """how far a value may move from what it was at the rollout before it has no more gradient"""
    value_coef: float = Field(0.1, ge=0)
    """weight of the critic's loss"""
    ptx_data: Path | None = None
    """rows to fine-tune on beside the rewards, so that nothing is forgotten; null has none"""
    ptx_coef: float = Field(1.0, gt=0)
    """weight of their loss"""
    costs: dict[str, Any] = Field(default_factory=dict)
    """what must not pass `cost_limit` on average, in blocks like those of `rewards`; a cost model is
    {harm: {kind: model, model: RUN}}. With ppo the costs have a critic of their own"""

    @property
    def heads(self) -> int:
        """Rows of the critic's head: rewards, and costs."""
        return 2 if self.costs else 1

    @property
    def group(self) -> int:
        """The answer, and its row of `ptx_data`."""
        return 1 if self.ptx_data is None else 2

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """As in `Objective`."""
        return super().needs | (frozenset() if self.ptx_data is None else {"tokens_per_group"})

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over tokens, and their number."""
        if self.ptx_data is None:
            return self.rewarded(scores, batch)
        first = lambda x: x if x.ndim == 1 else x[:, :1]  # noqa: E731
        total, count, metrics = self.rewarded(*jax.tree.map(first, (scores, batch)))
        answer, row = scores.mask[:, 0].any(axis=-1), scores.mask[:, 1]
        mean = jnp.where(row, -scores.logp[:, 1], 0.0).sum(axis=-1) / jnp.maximum(row.sum(axis=-1), 1)
        # The loss is divided by the number of answers' tokens: so many for an answer on average.
        added = jnp.where(answer, mean, 0.0) * batch.aux["tokens_per_group"]
        rows = answer.sum().astype(jnp.float32)
        metrics["loss/ptx"] = jax.lax.stop_gradient((jnp.where(answer, mean, 0.0).sum(), rows))
        return total + self.ptx_coef * added.sum(), count, metrics

    def rewarded(self, scores: Scores, batch: Batch) -> Result:
        """The losses of policy and critic over answers [B, 1, T]."""
        aux, mask = batch.aux, scores.mask
        ratio = log_ratio(scores, aux, "token")
        policy = clipped(ratio, aux["advantage"], self.epsilon) + penalty(self, scores)
        policy = jnp.where(mask, policy * aux["policy_weight"][:, None, None], 0.0)
        value, moved = value_loss(scores.value, aux["value_old"], aux["returns"], self.value_epsilon)
        if self.costs:
            old, returns = aux["cost_value_old"], aux["cost_returns"]
            value = value + value_loss(scores.cost_value, old, returns, self.value_epsilon)[0]
        value = jnp.where(mask, value, 0.0)
        count = mask.sum().astype(jnp.float32)
        metrics = watch(scores, ratio, aux["advantage"], self.epsilon, None) | {
            "loss/policy": (policy.sum(), count),
            "loss/value": (value.sum(), count),
            "val/clipfrac": (jnp.where(mask, moved, 0.0).sum(), count),
            **_explained(scores, aux["returns"]),
        }
        total = (policy + self.value_coef * value).sum()
        return total, count, jax.tree.map(jax.lax.stop_gradient, metrics)


def log_ratio(scores: Scores, aux: dict[str, Any], importance: str) -> jax.Array:
    """log r [B, G, T]; for an answer's ratio the same for all its tokens. Without `old` the policy is still
    the one that sampled: the ratio is 1, and has a gradient."""
    old = aux.get("old", jax.lax.stop_gradient(scores.logp))
    token = jnp.where(scores.mask, scores.logp - old, 0.0)
    if importance == "token":
        return token
    total = token.sum(axis=-1, keepdims=True)
    if importance == "sequence":
        total = total / jnp.maximum(scores.mask.sum(axis=-1, keepdims=True), 1)
    return jnp.broadcast_to(total, token.shape)


def clipped(log_r: jax.Array, advantage: Any, low: float, high: float | None = None) -> jax.Array:
    """max(-A r, -A clip(r, 1 - low, 1 + high))."""
    ratio = clamped_exp(log_r)
    inside = jnp.clip(ratio, 1 - low, 1 + (low if high is None else high))
    return jnp.maximum(-advantage * ratio, -advantage * inside)


def value_loss(value: Any, old: Any, returns: Any, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(half the clipped squared error, 1.0 where clipping made it larger)."""
    near = jnp.clip(value, old - epsilon, old + epsilon)
    plain, held = (value - returns) ** 2, (near - returns) ** 2
    return 0.5 * jnp.maximum(plain, held), (held > plain).astype(jnp.float32)


def penalty(objective: PolicyLoss, scores: Scores) -> Any:
    """beta times the k3 estimate of KL(p || p_ref) at every token: exp(d) - d - 1, d = log p_ref - log p."""
    if not objective.beta:
        return 0.0
    gap = jnp.where(scores.mask, scores.ref - scores.logp, 0.0)
    return objective.beta * (clamped_exp(gap) - gap - 1)


def _per_answer(values: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, G] of values that are equal over the tokens of an answer."""
    return jnp.where(mask, values, 0.0).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)


def _over_sequences(loss: jax.Array, mask: jax.Array, aux: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    length = mask.sum(axis=-1)
    mean = loss.sum(axis=-1) / jnp.maximum(length, 1)
    return mean.sum(), (length > 0).sum().astype(jnp.float32)


def _over_tokens(loss: jax.Array, mask: jax.Array, aux: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    return loss.sum(), mask.sum().astype(jnp.float32)


def _over_slots(loss: jax.Array, mask: jax.Array, aux: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """As if every answer had as many tokens as it may have (aux "max_tokens" [B])."""
    present = mask.any(axis=-1)
    return loss.sum(), (present * aux["max_tokens"][:, None]).sum().astype(jnp.float32)


REDUCE = {"grpo": _over_sequences, "dapo": _over_tokens, "dr_grpo": _over_slots}


def watch(scores: Scores, log_r: jax.Array, advantage: Any, low: Any, high: Any) -> Metrics:
    """TRL's metrics of a clipped policy."""
    mask, ratio = scores.mask, clamped_exp(log_r)
    count = mask.sum().astype(jnp.float32)
    up = (advantage > 0) & (ratio > 1 + (low if high is None else high))
    down = (advantage < 0) & (ratio < 1 - low)
    over = lambda x: (jnp.where(mask, x, 0.0).sum(), count)  # noqa: E731
    metrics = {
        "policy/approxkl": over(0.5 * log_r**2),
        "policy/clipfrac": over((up | down).astype(jnp.float32)),
        "policy/entropy": over(scores.entropy),
        "val/ratio": over(ratio),
        "val/ratio_var": over((ratio - 1) ** 2),
    }
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def _explained(scores: Scores, returns: jax.Array) -> Metrics:
    """Sums from which the explained variance of the returns follows; divided once, over the whole step, they
    are the mean squared error and the moments of the returns."""
    count = scores.mask.sum().astype(jnp.float32)
    over = lambda x: (jnp.where(scores.mask, x, 0.0).sum(), count)  # noqa: E731
    return {
        "val/error": over((returns - scores.value) ** 2),
        "val/returns": over(returns),
        "val/value": over(scores.value),
    }
