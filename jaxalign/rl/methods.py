"""The methods that sample while they learn: a loss over rollouts, an estimator of advantages, defaults."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

from pydantic import create_model

from jaxalign.objectives import pairwise, policy
from jaxalign.rl import estimators
from jaxalign.rl.base import Method
from jaxalign.rl.settings import OnlineConfig
from jaxalign.rl.train import train_online


def _method(name: str, about: str, objective: Any, estimator: Any, **defaults: Any) -> Method:
    """A method whose keys are those of every run, of its loss and of its estimator."""
    known = OnlineConfig.model_fields | objective.model_fields | estimator.model_fields
    own = objective.model_fields | estimator.model_fields
    shared = OnlineConfig.model_fields
    fields: dict[str, Any] = {k: (info.annotation, info) for k, info in own.items() if k not in shared}
    for key, default in defaults.items():
        info = copy(known[key])  # with its bounds
        info.default = default
        fields[key] = (info.annotation, info)
    config = create_model(f"{name}_config", __base__=OnlineConfig, __doc__=about, **fields)
    return Method(config, partial(train_online, name, objective, estimator), loss=objective)


GRPO = _method(
    "grpo",
    "Group relative policy optimisation (arXiv:2402.03300). Dr. GRPO is loss_type=dr_grpo with "
    "scale_rewards=none, DAPO epsilon_high=0.28, GSPO importance=sequence with loss_type=grpo.",
    policy.ClippedPolicy,
    estimators.GroupRelative,
)
RLOO = _method(
    "rloo",
    "REINFORCE with a leave-one-out baseline and the ratio of whole answers (arXiv:2402.14740).",
    policy.ClippedPolicy,
    estimators.LeaveOneOut,
    n=4,
    importance="sum",
    loss_type="grpo",
    kl_coef=0.05,
)
REINFORCE_PP = _method(
    "reinforce_pp",
    "REINFORCE++ (arXiv:2501.03262): a clipped ratio of tokens, advantages normalised over the rollout.",
    policy.ClippedPolicy,
    estimators.GloballyNormalised,
    n=1,
    batch_size=32,
    kl_coef=0.01,
)
REMAX = _method(
    "remax",
    "ReMax (arXiv:2310.10505): the plain policy gradient, the greedy answer's reward as the baseline.",
    policy.Reinforce,
    estimators.OverGreedy,
    n=1,
    batch_size=32,
    kl_coef=0.1,
)
P3O = _method(
    "p3o",
    "Pairwise PPO (arXiv:2310.00212): two answers to a prompt, and the gap of their rewards.",
    policy.PairwisePolicy,
    estimators.PlainReward,
    n=2,
    batch_size=16,
    kl_coef=0.05,
)
ONLINE_DPO = _method(
    "online_dpo",
    "DPO on pairs of the policy's own fresh answers (OAIF, arXiv:2402.04792).",
    pairwise.DPO,
    estimators.BestAgainstWorst,
    n=2,
    batch_size=16,
    temperature=0.9,
)
ONLINE_IPO = _method(
    "online_ipo",
    "IPO on pairs of the policy's own fresh answers (arXiv:2403.08635).",
    pairwise.IPO,
    estimators.BestAgainstWorst,
    n=2,
    batch_size=16,
    temperature=0.9,
)
ONLINE_SLIC = _method(
    "online_slic",
    "SLiC's hinge on pairs of the policy's own fresh answers (OAIF, arXiv:2402.04792).",
    pairwise.Hinge,
    estimators.BestAgainstWorst,
    n=2,
    batch_size=16,
    temperature=0.9,
)
PPO = _method(
    "ppo",
    "PPO with a critic (arXiv:1707.06347), policy, critic and reference on one base (arXiv:2307.04964).",
    policy.ActorCritic,
    estimators.WithCritic,
    n=1,
    batch_size=32,
    rollout_epochs=4,
    kl_coef=0.05,
)
