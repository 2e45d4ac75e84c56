"""What looks wrong in a run's metrics, said once each: the sign, its likely cause and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Values = Mapping[str, float]
Guard = Callable[[int, Values, Values], str | None]

PATIENCE = 30  # updates before a reward that does not move is remarked on
STILL = 1e-3  # margin of the implicit rewards that counts as none
NOISY = ("length_correlation",)  # looked at on average over the last updates
LESS = 0.1  # by how much their rewards must have fallen as well
COLLAPSE = 0.1  # share of the first rollout's entropy below which answers count as all the same
ENDLESS = 0.4  # by how much the share of cut off answers may rise
DRIFT = 3.0  # factor by which the mean length of answers may change
FALL = 0.1  # share of its first value by which the log-prob of chosen answers may fall


def stuck(step: int, first: Values, now: Values) -> str | None:
    """The policy is still its reference: every loss over z = 0 stays where it began, DPO's at ln 2. Only in
    the first stage: the others may begin with the policy as their reference."""
    margin = now.get("rewards/margins")
    if margin is None or step < PATIENCE or abs(margin) >= STILL or now.get("stage", 1) > 1:
        return None
    if abs(now.get("rewards/chosen", 0.0)) >= STILL:
        return None
    return (
        f"the policy has not moved from its reference after {step} updates (margin {margin:.2g}, loss "
        f"{now['loss']:.4f}): a new adapter starts with B = 0 and learns slowly at first; raise "
        "learning_rate, shorten the warm-up, or check that chosen and rejected differ"
    )


def displaced(step: int, first: Values, now: Values) -> str | None:
    """Both answers get less likely, the rejected one faster (likelihood displacement, arXiv:2410.08847)."""
    names = ("logps/chosen", "rewards/chosen", "rewards/margins")
    if any(name not in values for name in names for values in (first, now)):
        return None
    before, after = first["logps/chosen"], now["logps/chosen"]
    # Other rows may be less likely from the start: the reward, which compares with the reference, falls too.
    fell = after < before - FALL * abs(before) and now["rewards/chosen"] < first["rewards/chosen"] - LESS
    if not (fell and now["rewards/margins"] > first["rewards/margins"] + STILL):
        return None
    return (
        f"chosen answers get less likely while margins rise (logps/chosen {before:.1f} -> {after:.1f} at "
        f"step {step}): add their likelihood to the loss (rpo, dpop, cpo), lower learning_rate or raise beta"
    )


def lengths(step: int, first: Values, now: Values) -> str | None:
    """Rewards that rank answers as their lengths do. A few rows of training say little: that value is one of
    `Watch.smoothed`."""
    correlation = now.get("eval_length_correlation")
    if correlation is None and step >= PATIENCE:
        correlation = now.get("length_correlation")
    if correlation is None or abs(correlation) <= 0.5:
        return None
    return (
        f"rewards follow the length of the answer (correlation {correlation:+.2f} at step {step}): a policy "
        "trained on them will write longer or shorter, not better; balance the lengths of the pairs"
    )


def collapsed(step: int, first: Values, now: Values) -> str | None:
    """A policy that learns from its own answers and draws ever the same one."""
    name = "objective/token_entropy"
    if name not in now or now[name] >= COLLAPSE * first[name]:
        return None
    return (
        f"answers are hardly drawn any more: the entropy of a token fell from {first[name]:.3f} to "
        f"{now[name]:.3f} nats at step {step}; lower learning_rate, raise kl_coef, or set limits.entropy"
    )


def endless(step: int, first: Values, now: Values) -> str | None:
    """Answers that run into their limit more and more."""
    name = "completions/clipped_ratio"
    if name not in now or now[name] <= first[name] + ENDLESS:
        return None
    return (
        f"max_tokens cuts off {now[name]:.0%} of the answers at step {step}, {first[name]:.0%} at the start: "
        "raise missing_eos_penalty or max_tokens, or set limits.cut_off"
    )


def drifted(step: int, first: Values, now: Values) -> str | None:
    """Answers that become much longer or shorter."""
    name = "completions/mean_length"
    if name not in now or first[name] / DRIFT <= now[name] <= first[name] * DRIFT:
        return None
    return (
        f"answers have {now[name]:.0f} tokens on average at step {step}, {first[name]:.0f} at the start: "
        "look whether the reward asks for that, or follows length (limits.drift ends such a run)"
    )


GUARDS: tuple[Guard, ...] = (stuck, displaced, lengths, collapsed, endless, drifted)


@dataclass
class Watch:
    """A sink that shows every logged line to `GUARDS`; each of them is heard once.

    `first` holds the first value of every metric of the run, or of its stage: what later ones are compared
    with. Another stage has other rows. `smoothed` holds means of noisy metrics over the last `PATIENCE`
    updates or so.
    """

    say: Callable[[str], None]
    first: dict[str, float] = field(default_factory=dict)
    heard: set[Guard] = field(default_factory=set)
    smoothed: dict[str, float] = field(default_factory=dict)
    last: int = 0

    def write(self, step: int, values: Values) -> None:
        """Takes the metrics of one log line."""
        if "stage" in values and values["stage"] != self.first.get("stage"):
            self.first = {}
        self.first = {**values, **self.first}
        values = {**values, **self._smooth(step, values)}
        for guard in GUARDS:
            remark = None if guard in self.heard else guard(step, self.first, values)
            if remark:
                self.heard.add(guard)
                self.say(f"warning: {remark}")

    def _smooth(self, step: int, values: Values) -> Values:
        """The noisy metrics of a line at their means."""
        found = {name: values[name] for name in NOISY if name in values}
        keep = math.exp(-(step - self.last) / PATIENCE)
        for name, value in found.items():
            self.smoothed[name] = value + keep * (self.smoothed.get(name, value) - value)
        self.last = step if found else self.last
        return {name: self.smoothed[name] for name in found}

    def close(self) -> None:
        """Nothing is open."""
