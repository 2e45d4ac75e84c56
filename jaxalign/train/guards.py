"""What looks wrong in a run's metrics, said once each: the sign, its likely cause and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Values = Mapping[str, float]
Guard = Callable[[int, Values, Values], str | None]

PATIENCE = 30  # updates before a reward that does not move is remarked on
STILL = 1e-3  # margin of the implicit rewards that counts as none
FALL = 0.1  # share of its first value by which the log-prob of chosen answers may fall


def stuck(step: int, first: Values, now: Values) -> str | None:
    """The policy is still its reference: every loss over z = 0 stays where it began, DPO's at ln 2."""
    margin = now.get("rewards/margins")
    if margin is None or step < PATIENCE or abs(margin) >= STILL:
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
    names = ("logps/chosen", "rewards/margins")
    if any(name not in values for name in names for values in (first, now)):
        return None
    before, after = first["logps/chosen"], now["logps/chosen"]
    fell = after < before - FALL * abs(before)
    if not (fell and now["rewards/margins"] > first["rewards/margins"] + STILL):
        return None
    return (
        f"chosen answers get less likely while margins rise (logps/chosen {before:.1f} -> {after:.1f} at "
        f"step {step}): add their likelihood to the loss (rpo, dpop, cpo), lower learning_rate or raise beta"
    )


def lengths(step: int, first: Values, now: Values) -> str | None:
    """Rewards that rank answers as their lengths do."""
    correlation = now.get("eval_length_correlation", now.get("length_correlation"))
    if correlation is None or abs(correlation) <= 0.5:
        return None
    return (
        f"rewards follow the length of the answer (correlation {correlation:+.2f} at step {step}): a policy "
        "trained on them will write longer or shorter, not better; balance the lengths of the pairs"
    )


GUARDS: tuple[Guard, ...] = (stuck, displaced, lengths)


@dataclass
class Watch:
    """A sink that shows every logged line to `GUARDS`; each of them is heard once.

    `first` holds the first value of every metric of the run: what later ones are compared with.
    """

    say: Callable[[str], None]
    first: dict[str, float] = field(default_factory=dict)
    heard: set[Guard] = field(default_factory=set)

    def write(self, step: int, values: Values) -> None:
        """Takes the metrics of one log line."""
        self.first = {**values, **self.first}
        for guard in GUARDS:
            remark = None if guard in self.heard else guard(step, self.first, values)
            if remark:
                self.heard.add(guard)
                self.say(f"warning: {remark}")

    def close(self) -> None:
        """Nothing is open."""
