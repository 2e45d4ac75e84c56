"""Runs of a tiny model that learn from rewards: optimum found, resumed runs agree, bad input refused."""

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
from jaxalign.train.metrics import read_lines
from tests.train.tiny import write_model

KEYS: dict[str, Any] = {
    "max_tokens": 2,
    "max_steps": 40,
    "learning_rate": 3e-2,
    "dtype": "f32",
    "lora": {"rank": 4},
    "warmup_ratio": 0.0,
    "max_length": 64,
    "eval_fraction": 0.25,
    "eval_every": 40,
}
METHODS = {
    "grpo": {},
    "rloo": {"kl_coef": 0.01},
    "remax": {"kl_coef": 0.01, "batch_size": 16},
    "reinforce_pp": {"batch_size": 16},
    "p3o": {"kl_coef": 0.01},
    "online_dpo": {"n": 4},
    "ppo": {"batch_size": 16, "n": 2, "rollout_epochs": 2, "kl_coef": 0.01},
}


def small(completions: list[str], **_: Any) -> list[float]:
    """A bandit: 1 for an answer that begins with a small letter."""
    return [float(text[:1].isascii() and text[:1].islower()) for text in completions]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("online")
    write_model(root / "model", sharpness=20.0)
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(40)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


def go(here: Path, out: Path, method: str, **keys: Any) -> Any:
    given = {**KEYS, "rewards": {"small": small}, **keys}
    return jaxalign.train(method, str(here / "model"), here / "prompts.jsonl", out, **given)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_bandit_is_solved(here, tmp_path, method):
    out = tmp_path / "run"
    go(here, out, method, **METHODS[method])
    rows = [row for row in read_lines(out / "metrics.jsonl") if "objective/scores" in row]
    before = np.mean([row["objective/scores"] for row in rows[:3]])
    after = np.mean([row["objective/scores"] for row in rows[-3:]])
    assert before < 0.4
    assert after > 0.75
    first = rows[0]
    assert abs(first.get("val/ratio", 1) - 1) < 1e-4
    assert abs(first.get("objective/kl", 0)) < 1e-3  # grpo looks at no reference
    assert first.get("policy/clipfrac", 0) == 0
    evaluated = [row["eval_reward"] for row in read_lines(out / "metrics.jsonl") if "eval_reward" in row]
    assert evaluated[-1] > 0.6


def killed(run: Path, out: Path, step: int, *, lines: int | None) -> None:
    """What a run of 8 updates has left that was killed after the checkpoint of `step`: within the second
    rollout, `lines` answers of which were written, or in the updates after it."""
    shutil.copytree(run, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "adapter")
    for later in range(step + 2, 9, 2):
        shutil.rmtree(out / "checkpoints" / str(later))
    if lines is not None:
        (out / "rollouts" / "00001.npz").unlink()
        file = out / "rollouts" / "00001.jsonl"
        whole = file.read_text().splitlines(keepends=True)
        file.write_text("".join(whole[:lines]) + whole[lines][:10])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_killed_run_goes_on_to_the_same_end(here, tmp_path, method):
    keys = {"max_steps": 8, "batch_size": 8, "n": 2, "rollout_epochs": 2, "minibatches": 2}
    keys |= {"checkpoint_every": 2, "keep_checkpoints": 9, "kl_coef": 0.01, "kl_target": 1.0}
    whole = go(here, tmp_path / "whole", method, **keys)
    for name, step, lines in (("in a rollout", 4, 3), ("in the updates", 6, None)):
        killed(tmp_path / "whole", tmp_path / name, step, lines=lines)
        again = go(here, tmp_path / name, method, **keys)
        assert again.resumed_from == step
        for metric in ("loss", "objective/scores", "objective/kl_coef", "policy/approxkl", "eval_reward"):
            assert np.isclose(whole.metrics[metric], again.metrics[metric], atol=1e-5), (name, metric)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rewards": {}}, "nothing says which answers are good"),
        ({"temperature": 0}, "greater than 0"),
        ({"max_tokens": 64}, "have more than 0 tokens"),
        ({"eval_fraction": 0.99}, "leaves none to learn from"),
        ({"max_kl": 5}, "kl_coef and beta are 0"),
        ({"reference": {"mode": "precomputed"}}, "have no log-probs yet"),
        ({"rewards": {"short": {"kind": "python", "function": "nowhere:f"}}}, "cannot be imported"),
    ],
)
def test_bad_input_is_refused_before_any_work(here, tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        go(here, tmp_path / "out", "grpo", **keys)
    assert not (tmp_path / "out" / "rollouts").exists()
