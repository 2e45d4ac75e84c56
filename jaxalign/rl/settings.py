"""The keys of a method that samples its own answers while it learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxalign.rl.lagrange import CostsConfig
from jaxalign.rl.limits import LimitsConfig
from jaxalign.rl.rewards import RewardsConfig
from jaxalign.train.reference import REFERENCE, ReferenceConfig
from jaxalign.train.settings import TrainConfig


class OnlineConfig(RewardsConfig, CostsConfig, TrainConfig):
    """Everything about a run that learns from rewards of its own answers."""

    batch_size: int | None = Field(None, ge=1)
    """prompts of one update, each with its n answers; null takes 8, or more where there are more devices"""
    n: int = Field(8, ge=1)
    """answers to every prompt"""
    temperature: float = Field(1.0, gt=0)
    """spread of the draws"""
    kl_coef: float = Field(0.0, ge=0)
    """weight of the KL divergence from the reference that is taken off the rewards; 0 takes nothing"""
    max_tokens: int = Field(128, ge=1)
    """longest answer, in tokens"""
    minibatches: int = Field(1, ge=1)
    """updates of one pass over a rollout, which has batch_size x minibatches prompts"""
    rollout_epochs: int = Field(1, ge=1)
    """passes over a rollout"""
    rollout_batch_size: int = Field(64, ge=1)
    """answers under way at the same time"""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """estimate of the KL divergence that is taken off the rewards: k1 is log p - log p_ref, k2 half its
    square, k3 exp(-k1) - 1 + k1"""
    kl_target: float | None = Field(None, gt=0)
    """nats of an answer's KL towards which kl_coef is moved after every rollout; null leaves it fixed"""
    kl_horizon: int = Field(10_000, ge=1)
    """answers over which it moves"""
    limits: LimitsConfig = LimitsConfig()
    """where the run ends early, with the policy of the rollout before; null never does"""
    share_prompt: bool = True
    """compute the prompt that answers share once, where that saves work; the loss stays the same"""

    reference: ReferenceConfig = REFERENCE
    """the policy that the KL divergence is from; its log-probs cannot be precomputed"""

    epochs: float = Field(1.0, gt=0)
    """passes over the prompts, where max_steps is null"""
    log_every: int = Field(1, ge=1)
    """steps between two lines of metrics; a line is the mean over the steps since the last one"""
    checkpoint_every: int = Field(20, ge=1)
    """steps between two checkpoints; the last step always gets one"""
