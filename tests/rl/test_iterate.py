"""Rounds on a tiny model: rewards rise, a killed run goes on, bad input is refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxalign
from jaxalign.errors import UserError
from jaxalign.rl import iterate as rounds
from jaxalign.train.metrics import read_lines
from tests.train.tiny import write_model

KEYS: dict[str, Any] = {
    "rounds": 2,
    "n": 8,
    "max_tokens": 2,
    "max_steps": 24,
    "batch_size": 8,
    "learning_rate": 3e-2,
    "warmup_ratio": 0.0,
    "eval_fraction": 0.25,
    "dtype": "f32",
    "least_win_rate": 0.0,
    "lora": {"rank": 4},
}


# Fine-tuning on the best answers finds the bandit's optimum. DPO ranks its fifteen pairs, which says nothing
# of the many answers that are in none of them: that it raises rewards too is for a real model to show.
LEARNED = {
    "raft": lambda rows: rows[-1]["eval/reward"] > rows[0]["eval/reward_before"] + 0.2,
    "iterative_dpo": lambda rows: all(row["train/rewards/accuracies"] > 0.7 for row in rows),
}


def small(completions: list[str], **_: Any) -> list[float]:
    """A bandit: 1 for an answer that begins with a small letter."""
    return [float(text[:1].isascii() and text[:1].islower()) for text in completions]


def even(completions: list[str], **_: Any) -> list[float]:
    """About every third answer has it."""
    return [float(sum(text[:1].encode()) % 2 == 0) for text in completions]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("rounds")
    write_model(root / "model", sharpness=20.0)
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(32)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


def go(here: Path, out: Path, method: str = "iterative_dpo", **keys: Any) -> Any:
    given = {**KEYS, "rewards": {"small": small}, **keys}
    return jaxalign.train(method, str(here / "model"), here / "prompts.jsonl", out, **given)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iterative_dpo", "raft"])
def test_rounds_learn_and_go_on_where_they_stopped(here, tmp_path, method):
    whole = go(here, tmp_path / "whole", method)
    rows = read_lines(tmp_path / "whole" / "rounds.jsonl")
    assert [row["round"] for row in rows] == [1, 2]
    assert LEARNED[method](rows)
    assert rows[1]["eval/reward_before"] == rows[0]["eval/reward"]
    assert rows[0]["eval/prompts"] == 8
    assert whole.result == tmp_path / "whole" / "adapter"
    assert go(here, tmp_path / "whole", method).rows == rows  # nothing is done twice

    cut = tmp_path / "cut"
    go(here, cut, method, rounds=1)
    half = (cut / "round-1" / "samples.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(cut / "round-1" / "run")
    (cut / "round-1" / "samples.jsonl").write_text("".join(half[:5]))
    for name in ("run.json", "result.json", "rounds.jsonl"):
        (cut / name).unlink()
    go(here, cut, method)
    again = read_lines(cut / "rounds.jsonl")
    for row, other in zip(rows, again, strict=True):
        for name in ("reward/mean", "eval/reward", "train/loss"):
            assert np.isclose(row[name], other[name], atol=1e-5), name


@pytest.mark.slow
def test_conditions_are_learned(here, tmp_path):
    """The first round's answers are to plain prompts, the second's to those that ask for the highest."""
    keys = {"rewards": {"even": even}, "max_steps": 250, "batch_size": 16, "learning_rate": 1e-2}
    first, second = go(here, tmp_path / "out", "steerlm", **keys).rows
    assert second["reward/mean"] > first["reward/mean"] + 0.15
    learned = read_lines(tmp_path / "out" / "round-1" / "scored.jsonl")
    assert {row["messages"][0]["content"] for row in learned} == {"even: 0", "even: 4"}


@pytest.mark.slow
def test_rounds_end_when_the_new_policy_does_not_win(here, tmp_path):
    found = go(here, tmp_path / "out", learning_rate=1e-9, least_win_rate=0.9, rounds=3)
    assert len(found.rows) == 1


def test_answers_are_compared_prompt_by_prompt():
    found = rounds.compared({"a": 1.0, "b": 2.0, "c": 0.0}, {"b": 2.0, "a": 3.0, "d": 9.0})
    assert found == {
        "eval/reward_before": 1.5,
        "eval/reward": 2.5,
        "eval/win_rate": 0.75,
        "eval/prompts": 2,
    }


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rewards": {}}, "nothing says which answers are good"),
        ({"eval_fraction": 0.99}, "leaves none to learn from"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(here, tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        go(here, tmp_path / "out", **keys)
    assert not (tmp_path / "out" / "round-1").exists()


@pytest.mark.slow
def test_answers_of_one_reward_teach_nothing(here, tmp_path):
    with pytest.raises(UserError, match="no prompt has two answers of different reward"):
        go(here, tmp_path / "out", rewards={"flat": {"kind": "regex", "pattern": ""}})
