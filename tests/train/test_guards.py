"""Remarks on metrics: each on the sign it is for, once, and not on a sound run."""

from __future__ import annotations

import pytest

from jaxalign.train.guards import PATIENCE, Watch

SOUND = [
    {"loss": 0.693, "rewards/margins": 0.0, "rewards/chosen": 0.0, "logps/chosen": -120.0},
    {"loss": 0.6, "rewards/margins": 0.2, "rewards/chosen": 0.1, "logps/chosen": -119.0},
    {"loss": 0.4, "rewards/margins": 0.9, "rewards/chosen": 0.3, "logps/chosen": -117.0},
]


def remarks(lines: list[dict[str, float]], every: int = PATIENCE) -> list[str]:
    said: list[str] = []
    watch = Watch(said.append)
    for i, values in enumerate(lines):
        watch.write(1 + i * every, values)
    return said


def test_a_sound_run_hears_nothing() -> None:
    assert remarks(SOUND) == []


def test_fine_tuning_has_none_of_these_metrics() -> None:
    assert remarks([{"loss": 2.0}, {"loss": 1.9}]) == []


@pytest.mark.parametrize(("margin", "heard"), [(0.0, True), (9e-4, True), (2e-3, False)])
def test_a_policy_that_does_not_move(margin: float, heard: bool) -> None:
    line = {"loss": 0.6931, "rewards/margins": margin, "rewards/chosen": 1e-4, "logps/chosen": -120.0}
    said = remarks([line, line, line])
    assert len(said) == heard
    assert not heard or ("has not moved" in said[0] and "raise learning_rate" in said[0])


def test_rewards_that_move_together_are_not_stuck() -> None:
    """Both answers may gain alike: the policy moves, though the margin does not."""
    line = {"loss": 0.6931, "rewards/margins": 0.0, "rewards/chosen": 0.3, "logps/chosen": -120.0}
    assert remarks([line, line]) == []


def test_patience_before_the_first_remark() -> None:
    line = {"loss": 0.6931, "rewards/margins": 0.0, "rewards/chosen": 0.0, "logps/chosen": -120.0}
    assert remarks([line] * (PATIENCE - 1), every=1) == []
    assert len(remarks([line] * PATIENCE, every=1)) == 1


@pytest.mark.parametrize(
    ("chosen", "margin", "heard"), [(-140.0, 0.9, True), (-125.0, 0.9, False), (-140.0, -0.1, False)]
)
def test_chosen_answers_that_get_less_likely(chosen: float, margin: float, heard: bool) -> None:
    later = {"loss": 0.4, "rewards/margins": margin, "rewards/chosen": -2.0, "logps/chosen": chosen}
    said = remarks([SOUND[0], later, later])
    assert len(said) == heard
    assert not heard or ("less likely while margins rise" in said[0] and "rpo" in said[0])


def test_a_step_of_longer_answers_is_no_fall() -> None:
    later = {"loss": 0.68, "rewards/margins": 0.01, "rewards/chosen": -1e-3, "logps/chosen": -140.0}
    assert remarks([SOUND[0], later], every=5) == []


@pytest.mark.parametrize(("correlation", "heard"), [(0.7, True), (-0.7, True), (0.4, False)])
def test_rewards_that_follow_length(correlation: float, heard: bool) -> None:
    said = remarks([{"loss": 0.5, "eval_length_correlation": correlation}] * 2)
    assert len(said) == heard
    assert not heard or "length of the answer" in said[0]


def test_stages_are_watched_one_by_one() -> None:
    """A stage may begin at a margin of 0, and with rows of other log-probs: neither is a sign of anything."""
    first = [line | {"stage": 1} for line in SOUND]
    begun = {"loss": 0.693, "rewards/margins": 0.0, "rewards/chosen": 0.0, "logps/chosen": -200.0, "stage": 2}
    later = begun | {"rewards/margins": 0.5, "rewards/chosen": 0.2, "logps/chosen": -198.0}
    assert remarks([*first, begun, later]) == []
    fallen = later | {"logps/chosen": -230.0, "rewards/chosen": -3.0}
    assert len(remarks([*first, begun, fallen])) == 1


def test_a_few_rows_whose_rewards_follow_length_say_little() -> None:
    """On average over the last updates, where training rows are all there is."""
    line = lambda value: {"loss": 0.5, "length_correlation": value}  # noqa: E731
    noise = [line(0.9 if i % 2 else -0.3) for i in range(3 * PATIENCE)]  # 0.3 on average
    assert remarks(noise, every=1) == []
    assert remarks([line(0.9)] * (PATIENCE - 1), every=1) == []
    (said,) = remarks([*noise, *[line(0.8)] * PATIENCE], every=1)
    assert "length of the answer" in said
    assert len(remarks([line(-0.7)] * 3)) == 1


ROLLOUT = {
    "loss": 0.0,
    "objective/token_entropy": 2.0,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 30.0,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"objective/token_entropy": 0.19}, "limits.entropy"),
        ({"completions/clipped_ratio": 0.55}, "limits.cut_off"),
        ({"completions/mean_length": 95.0}, "limits.drift"),
        ({"completions/mean_length": 9.0}, "limits.drift"),
    ],
)
def test_rollouts_that_go_astray(changed: dict[str, float], said: str) -> None:
    close = {
        name: value + 0.5 * (changed[name] - value) for name, value in ROLLOUT.items() if name in changed
    }
    assert remarks([ROLLOUT, {**ROLLOUT, **close}]) == []
    found = remarks([ROLLOUT, {**ROLLOUT, **changed}, {**ROLLOUT, **changed}])
    assert len(found) == 1
    assert said in found[0]
