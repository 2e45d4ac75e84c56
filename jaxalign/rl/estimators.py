"""Estimators: from what a rollout holds to the advantages that its updates learn from.

An estimator is a `Config`; its fields are keys of the methods that use it. It gives token arrays [P, n, T],
aligned with the tokens of prompt and answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.rl import advantages as a


@dataclass(frozen=True)
class Judged:
    """The n answers to each of P prompts, float32 or float64 arrays.

    reward   [P, n], NaN where an answer could not be scored
    mask     bool [P, n, T], the tokens of the answers
    old      [P, n, T] log-probs under the policy that sampled; ref: under the reference, or None
    value    [P, n, T] of a critic, or None
    baseline [P] reward of the greedy answer, or None
    cost     [P, n] like `reward`; cost_value and cost_baseline like theirs: None where there are no costs
    """

    reward: np.ndarray
    mask: np.ndarray
    old: np.ndarray
    ref: np.ndarray | None = None
    value: np.ndarray | None = None
    baseline: np.ndarray | None = None
    cost: np.ndarray | None = None
    cost_value: np.ndarray | None = None
    cost_baseline: np.ndarray | None = None

    def kl(self, kind: str = "k1") -> np.ndarray:
        """[P, n, T] estimates of KL(p_old || p_ref) at every token; 0 without a reference."""
        if self.ref is None:
            return np.zeros(self.mask.shape)
        return a.KL[kind](np.where(self.mask, self.old - self.ref, 0.0))

    def shaped(self, coef: float, kind: str) -> np.ndarray:
        """[P, n]: rewards less coef x the KL of the whole answer."""
        return self.reward - coef * self.kl(kind).sum(axis=-1) if coef else self.reward

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[P, n] at every token of the answers."""
        return np.where(self.mask, values[..., None], 0.0)

    def token_rewards(self, coef: float, kind: str) -> np.ndarray:
        """[P, n, T]: -coef KL at every token, and the reward at the last one."""
        ref = self.old if self.ref is None else self.ref
        return a.token_rewards(self.old, ref, self.mask, self.reward, coef, kind)


class Estimator(Protocol):
    """What `Judged` and the weight of the KL become.

    greedy  whether each prompt is answered greedily as well
    gives   the names of its token arrays
    """

    greedy: ClassVar[bool]
    gives: ClassVar[tuple[str, ...]]

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """Token arrays by name."""
        ...

    def order(self, judged: Judged) -> np.ndarray | None:
        """int [P, G]: which answers are learned from, in which order; None where all are as they stand. A row
        of -1 is a prompt that teaches nothing."""
        ...


class EstimatorConfig(Config):
    """What estimators have in common."""

    greedy: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ("advantage",)

    def order(self, judged: Judged) -> np.ndarray | None:
        """All answers."""
        return None


class GroupRelative(EstimatorConfig):
    """Rewards less their prompt's mean, over their standard deviation (GRPO)."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """what advantages are divided by: the standard deviation of the prompt's rewards, of all rewards of the
    rollout, or nothing (Dr. GRPO)"""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """One for each answer."""
        shaped = judged.shaped(kl_coef, kl)
        return {"advantage": judged.spread(a.group_relative(shaped, self.scale_rewards))}


class LeaveOneOut(EstimatorConfig):
    """Rewards less the mean of the prompt's others (RLOO)."""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """One for each answer."""
        return {"advantage": judged.spread(a.leave_one_out(judged.shaped(kl_coef, kl)))}


class GloballyNormalised(EstimatorConfig):
    """What is still to come from each token on, normalised over the rollout (REINFORCE++)."""

    gamma: float = Field(1.0, gt=0, le=1)
    """discount of a token"""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """One for each token."""
        come = a.to_go(judged.token_rewards(kl_coef, kl), judged.mask, self.gamma)
        return {"advantage": a.whiten(come, judged.mask)}


class OverGreedy(EstimatorConfig):
    """The reward less that of the greedy answer, less each token's KL (ReMax, arXiv:2310.10505)."""

    greedy: ClassVar[bool] = True

    clip_advantage: float = Field(5.0, gt=0)
    """largest gap of rewards"""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """One for each token."""
        assert judged.baseline is not None, "an estimator with `greedy` gets the greedy rewards"
        gap = np.nan_to_num(judged.reward - judged.baseline[:, None])
        gap = np.clip(gap, -self.clip_advantage, self.clip_advantage)
        return {"advantage": judged.spread(gap) - kl_coef * np.where(judged.mask, judged.kl(kl), 0.0)}


class PlainReward(EstimatorConfig):
    """The reward itself, for losses that compare answers (P3O)."""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """One for each answer."""
        return {"advantage": judged.spread(np.nan_to_num(judged.shaped(kl_coef, kl)))}


class WithCritic(EstimatorConfig):
    """Generalised advantages over a critic's values (PPO)."""

    gives: ClassVar[tuple[str, ...]] = ("advantage", "returns")

    gamma: float = Field(1.0, gt=0, le=1)
    """discount of a token"""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """0 trusts the critic alone, 1 the rewards alone"""
    whiten_rewards: bool = False
    """divide the rewards of tokens by their standard deviation"""
    critic: str | None = None
    """run of `train reward` over the same base whose scores the values begin as; null begins at 0"""
    critic_warmup: int = Field(0, ge=0)
    """first rollouts from which only the critic learns"""

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """Whitened advantages; returns of unwhitened ones."""
        assert judged.value is not None, "this estimator needs a critic"
        rewards = judged.token_rewards(kl_coef, kl)
        if self.whiten_rewards:
            rewards = a.whiten(rewards, judged.mask, shift=False)
        found, returns = a.generalised_advantages(
            rewards, judged.value, judged.mask, self.gamma, self.gae_lambda
        )
        return {"advantage": a.whiten(found, judged.mask), "returns": returns}


class BestAgainstWorst(EstimatorConfig):
    """Pairs for a loss that compares: of a prompt's answers the best and the worst (OAIF, arXiv:2402.04792,
    takes two). Ties teach nothing."""

    gives: ClassVar[tuple[str, ...]] = ()

    def __call__(self, judged: Judged, kl_coef: float, kl: str) -> dict[str, np.ndarray]:
        """Nothing: the loss looks at the log-probs."""
        return {}

    def order(self, judged: Judged) -> np.ndarray | None:
        """(best, worst) of every prompt."""
        known = np.isfinite(judged.reward)
        best = np.where(known, judged.reward, -np.inf).argmax(axis=1)
        worst = np.where(known, judged.reward, np.inf).argmin(axis=1)
        gap = np.take_along_axis(judged.reward, best[:, None], 1) - np.take_along_axis(
            judged.reward, worst[:, None], 1
        )
        return np.where(gap > 0, np.stack([best, worst], axis=1), -1)


def watched(judged: Judged, kl_coef: float, kl: str) -> dict[str, Any]:
    """TRL's metrics of a rollout."""
    known = np.isfinite(judged.reward)
    penalty = -kl_coef * judged.kl(kl).sum(axis=-1)
    spread = np.where(known, judged.reward, np.nan)
    surprise = -np.where(judged.mask, judged.old, 0)  # of what was drawn: its mean estimates the entropy
    found = {
        "objective/scores": np.nanmean(judged.reward),
        "objective/scores_std": np.nanstd(judged.reward),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": np.nanmean(judged.reward + penalty),
        "objective/entropy": surprise.sum(axis=-1).mean(),
        "objective/token_entropy": surprise.sum() / max(judged.mask.sum(), 1),
    }
    if judged.ref is not None:
        found["objective/kl"] = judged.kl("k1").sum(axis=-1).mean()
        found["objective/kl_k3"] = judged.kl("k3").sum(axis=-1).mean()
    if judged.reward.shape[1] > 1:
        still = np.nanmax(spread, axis=1) - np.nanmin(spread, axis=1) <= 1e-8
        found["frac_reward_zero_std"] = still.mean()
    return {name: float(value) for name, value in found.items()}
