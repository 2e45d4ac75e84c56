"""Costs with a limit: rewards are raised as far as costs stay below it (Safe RLHF, arXiv:2310.12773).

The multiplier L of the cost grows while costs are above their limit and shrinks below it. An answer counts
(reward - L cost) / (1 + L), and advantages, which are linear in rewards and values, follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.rl.estimators import Estimator, Judged
from jaxalign.rl.rewards import Blocks, Rewards, build_rewards

WINDOW = 128  # newest answers whose mean cost is held against the limit


class CostsConfig(Config):
    """The keys of costs."""

    costs: Blocks = Field(default_factory=dict)
    """what must not pass `cost_limit` on average, in blocks like those of `rewards`; a cost model is
    {harm: {kind: model, model: RUN}}. With ppo the costs have a critic of their own"""
    cost_limit: float = 0.0
    """the highest mean cost"""
    multiplier: float = Field(1.0, gt=0)
    """weight of the cost at the start, in rewards"""
    multiplier_rate: float = Field(0.1, ge=0)
    """how fast it moves: after a rollout its logarithm grows by this x (mean cost - cost_limit) x itself"""
    multiplier_most: float | None = Field(None, gt=0)
    """the most that it may be; null has no bound"""
    multiplier_delay: int = Field(0, ge=0)
    """first rollouts in which it does not move"""


@dataclass(frozen=True)
class Lagrange:
    """Costs and how their multiplier moves; `config` holds the keys of `CostsConfig`."""

    costs: Rewards
    config: Any

    def log_multiplier(self, number: int, before: float | None, costs: Sequence[np.ndarray]) -> float:
        """log L of rollout `number`, given that of the rollout before it. `costs`: those of all answers up to
        this rollout's, NaN where one could not be scored."""
        c = self.config
        now = math.log(c.multiplier) if before is None else before
        recent = np.concatenate([x.ravel() for x in costs])
        recent = recent[np.isfinite(recent)][-WINDOW:]
        if number >= c.multiplier_delay and recent.size:
            now += c.multiplier_rate * (float(recent.mean()) - c.cost_limit) * math.exp(now)
        return now if c.multiplier_most is None else min(now, math.log(c.multiplier_most))


def build_lagrange(config: Any) -> Lagrange | None:
    """The costs that the keys name, None for none. Raises `UserError` as `build_rewards`."""
    return Lagrange(build_rewards(config, "costs"), config) if config.costs else None


def mixed(reward: Any, cost: Any, multiplier: float) -> Any:
    """(reward - L cost) / (1 + L): of rewards, of advantages or of values."""
    return (reward - multiplier * cost) / (1 + multiplier)


def with_costs(
    estimator: Estimator, judged: Judged, kl_coef: float, kl: str, multiplier: float
) -> dict[str, np.ndarray]:
    """What `estimator` makes of rewards and costs together; returns for each critic. Half of the KL is taken
    off the rewards, and half put on the costs."""
    assert judged.cost is not None, "there are costs"
    whole = replace(judged, reward=mixed(judged.reward, judged.cost, multiplier))
    if judged.baseline is not None:
        whole = replace(whole, baseline=mixed(judged.baseline, judged.cost_baseline, multiplier))
    if judged.cost_value is None:
        return estimator(whole, kl_coef / 2, kl)
    found = estimator(
        replace(whole, value=mixed(judged.value, judged.cost_value, multiplier)), kl_coef / 2, kl
    )
    costly = replace(judged, reward=judged.cost, value=judged.cost_value)
    return found | {
        "returns": estimator(judged, kl_coef / 2, kl)["returns"],
        "cost_returns": estimator(costly, -kl_coef / 2, kl)["returns"],
    }
