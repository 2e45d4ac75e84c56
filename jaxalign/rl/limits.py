"""Limits of a run that samples: where it ends early, with the policy of the rollout before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from jaxalign.config import Config
from jaxalign.errors import UserError

Values = Mapping[str, float]


class LimitsConfig(Config):
    """Where the run ends early: a rollout beyond one of these is not learned from, and the result is the
    policy of the rollout before it."""

    kl: float | None = Field(default=None, gt=0)
    """nats of an answer's KL from the reference, at most"""
    entropy: float | None = Field(default=None, gt=0)
    """entropy of the draw of a token in nats, at least"""
    cut_off: float | None = Field(default=None, gt=0, lt=1)
    """share of answers that max_tokens cuts off, at most"""
    drift: float | None = Field(default=None, gt=1)
    """factor by which answers may become longer or shorter on average than those of the first rollout"""

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(getattr(self, name) is not None for name in CHECKS)

    def passed(self, first: Values, now: Values) -> str | None:
        """What a rollout's metrics are beyond, in words with a remedy; None where they are within. `first`:
        those of the first rollout."""
        for name, check in CHECKS.items():
            limit = getattr(self, name)
            found = None if limit is None else check(limit, first, now)
            if found:
                return f"{found} (limits.{name}={limit:g}): {REMEDIES[name]}"
        return None


def _kl(limit: float, first: Values, now: Values) -> str | None:
    kl = now["objective/kl"]
    return f"answers are {kl:.2f} nats from the reference" if kl > limit else None


def _entropy(limit: float, first: Values, now: Values) -> str | None:
    entropy = now["objective/token_entropy"]
    return f"the draw of a token has an entropy of {entropy:.3f} nats" if entropy < limit else None


def _cut_off(limit: float, first: Values, now: Values) -> str | None:
    share = now["completions/clipped_ratio"]
    return f"{share:.0%} of the answers are cut off by max_tokens" if share > limit else None


def _drift(limit: float, first: Values, now: Values) -> str | None:
    before, after = first["completions/mean_length"], now["completions/mean_length"]
    if before / limit <= after <= before * limit:
        return None
    return f"answers have {after:.1f} tokens on average, {before:.1f} at the start"


CHECKS: dict[str, Callable[[float, Values, Values], str | None]] = {
    "kl": _kl,
    "entropy": _entropy,
    "cut_off": _cut_off,
    "drift": _drift,
}
REMEDIES = {
    "kl": "lower learning_rate, raise kl_coef or set kl_target",
    "entropy": "lower learning_rate, raise kl_coef, or draw with a higher temperature",
    "cut_off": "raise max_tokens, or missing_eos_penalty",
    "drift": "look at what the reward says of long and short answers, or raise kl_coef",
}


def check_limits(config: Any, needs: frozenset[str]) -> None:
    """Raises `UserError` where a limit is of a KL that nothing measures."""
    named = {"limits.kl": config.limits.kl, "kl_target": config.kl_target}
    place = next((name for name, value in named.items() if value), None)
    if place and "ref" not in needs:
        raise UserError(
            "nothing measures the distance from the reference: kl_coef and beta are 0",
            place=place,
            remedy="set kl_coef (or beta) above 0, such as 0.01, or leave it out",
        )
