"""From rewards of answers to advantages, in numpy on the host: P prompts, n answers to each, T tokens.

A reward that is NaN belongs to an answer that could not be scored: it is left out of every mean, and its own
advantage is 0. Token arrays are masked: `mask` is True on the answer's tokens, the one that ends it included.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Array = np.ndarray


def leave_one_out(reward: Array) -> Array:
    """[P, n]: each reward less the mean of the prompt's other ones (RLOO, arXiv:2402.14740, eq. 8)."""
    known = np.isfinite(reward)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, reward, 0.0).sum(axis=1, keepdims=True)
    others = (total - np.where(known, reward, 0.0)) / np.maximum(count - 1, 1)
    return np.where(known & (count > 1), np.where(known, reward, 0.0) - others, 0.0)


def group_relative(
    reward: Array, scale: Literal["group", "batch", "none"] = "group", epsilon: float = 1e-4
) -> Array:
    """[P, n]: rewards less their prompt's mean, over the unbiased standard deviation of the prompt's rewards
    (GRPO, arXiv:2402.03300, section 4.1.2), of all rewards, or of nothing (Dr. GRPO, arXiv:2503.20783)."""
    known = np.isfinite(reward)
    mean = _mean(reward, known, axis=1)
    centred = np.where(known, reward - mean, 0.0)
    if scale == "none":
        return centred
    over = centred if scale == "group" else np.where(known, reward - _mean(reward, known), 0.0)
    axis = 1 if scale == "group" else None
    count = np.maximum(known.sum(axis=axis, keepdims=True) - 1, 1)
    return centred / (np.sqrt((over**2).sum(axis=axis, keepdims=True) / count) + epsilon)


def globally_normalised(values: Array, mask: Array, epsilon: float = 1e-8) -> Array:
    """Values less their mean over `mask`, over their standard deviation (REINFORCE++, arXiv:2501.03262)."""
    return whiten(values, mask, epsilon=epsilon)


def token_rewards(logp: Array, ref: Array, mask: Array, score: Array, coef: float, kind: str = "k1") -> Array:
    """[..., T]: -coef KL_t at every token, and the answer's `score` [...] on top at its last one.

    k1 is log p - log p_ref, k2 half its square, k3 exp(-k1) - 1 + k1 (Schulman 2020).
    """
    rewards = -coef * KL[kind](np.where(mask, logp - ref, 0.0))
    last = mask & (np.cumsum(mask, axis=-1) == mask.sum(axis=-1, keepdims=True))
    return np.where(mask, rewards + last * np.nan_to_num(score)[..., None], 0.0)


KL = {
    "k1": lambda ratio: ratio,
    "k2": lambda ratio: ratio**2 / 2,
    "k3": lambda ratio: np.expm1(-ratio) + ratio,
}


def to_go(rewards: Array, mask: Array, gamma: float = 1.0) -> Array:
    """[..., T]: what is still to come from each token on, discounted by `gamma` a token."""
    out, after = np.zeros_like(rewards), np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        after = np.where(mask[..., t], rewards[..., t] + gamma * after, after)
        out[..., t] = after
    return np.where(mask, out, 0.0)


def generalised_advantages(
    rewards: Array, values: Array, mask: Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    """(advantages, returns) [..., T] (GAE, arXiv:1506.02438, eq. 16). Nothing comes after the last token:
    an answer that was cut off is over too. `values[..., t]` is of the state before token t."""
    advantages = np.zeros_like(rewards)
    after = next_value = np.zeros(rewards.shape[:-1])
    for t in reversed(range(rewards.shape[-1])):
        there = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        after = np.where(there, delta + gamma * lam * after, after)
        next_value = np.where(there, values[..., t], next_value)
        advantages[..., t] = np.where(there, after, 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)


def whiten(
    values: Array, mask: Array, *, shift: bool = True, unbiased: bool = False, epsilon: float = 1e-8
) -> Array:
    """Values over their standard deviation over `mask`, of mean 0 unless `shift` is off; 0 elsewhere."""
    count = max(int(mask.sum()), 1)
    mean = np.where(mask, values, 0.0).sum() / count
    variance = (np.where(mask, values - mean, 0.0) ** 2).sum() / max(count - unbiased, 1)
    out = (values - mean) / np.sqrt(variance + epsilon)
    return np.where(mask, out if shift else out + mean, 0.0)


def adapted(coef: float, kl: float, episodes: int, *, target: float, horizon: float) -> float:
    """The KL coefficient after a rollout of `episodes` answers whose mean KL was `kl` nats
    (arXiv:1909.08593, section 2.2)."""
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return coef * (1 + error * episodes / horizon)


def _mean(values: Array, known: Array, axis: int | None = None) -> Array:
    total = np.where(known, values, 0.0).sum(axis=axis, keepdims=True)
    return total / np.maximum(known.sum(axis=axis, keepdims=True), 1)
