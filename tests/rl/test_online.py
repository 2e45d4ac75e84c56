"""Runs of a tiny model that learn from rewards: optimum found, resumed runs agree, bad input refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxalign
from jaxalign.errors import UserError
from jaxalign.train.metrics import read_lines
from tests.train.tiny import write_model

KEYS: dict[str, Any] = {
    "max_tokens": 2,
    "max_steps": 40,
    "learning_rate": 3e-3,
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


@pytest.mark.slow
def test_a_run_beyond_its_limit_ends_with_the_policy_before(here, tmp_path):
    """Its result is the policy that made the last rollout within the limit, and the run is over; with another
    limit the same command goes on."""
    keys = {"kl_coef": 0.01, "max_steps": 30, "batch_size": 8, "n": 4, "checkpoint_every": 100}
    keys |= {"learning_rate": 1e-3, "schedule": "constant"}
    result = go(here, tmp_path / "out", "grpo", **keys, limits={"kl": 0.5})
    rows = [row for row in read_lines(tmp_path / "out" / "metrics.jsonl") if "objective/kl" in row]
    assert "more than" in result.stopped or "nats from the reference" in result.stopped
    assert 1 < result.step < 30
    assert rows[-1]["objective/kl"] <= 0.5
    assert len(list((tmp_path / "out" / "rollouts").glob("*.npz"))) == result.step + 1
    whole = go(here, tmp_path / "whole", "grpo", **(keys | {"max_steps": result.step - 1}))
    one, two = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (result, whole))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    again = go(here, tmp_path / "out", "grpo", **keys, limits={"kl": 0.5})
    assert (again.step, again.resumed_from, again.stopped) == (result.step, result.step, result.stopped)
    more = go(here, tmp_path / "out", "grpo", **keys, limits={"kl": 50})
    assert (more.resumed_from, more.step, more.stopped) == (result.step, 30, "")


@pytest.mark.slow
def test_a_critic_begins_as_a_reward_model(here, tmp_path):
    """At the first update values are its scores: of the last state of an answer, what it gives the answer."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": "aa", "rejected": "ZZ"} for i in range(16)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"lora": {"rank": 4}, "dtype": "f32", "learning_rate": 3e-2, "max_length": 64}
    scorer = jaxalign.train(
        "reward", str(here / "model"), pairs, tmp_path / "scorer", max_steps=6, batch_size=8, **shared
    )
    keys = {"max_steps": 1, "batch_size": 8, "kl_coef": 0.01}
    plain = go(here, tmp_path / "plain", "ppo", **keys)
    begun = go(here, tmp_path / "begun", "ppo", **keys, critic=str(scorer.folder))
    assert plain.metrics["val/value"] == pytest.approx(0.0, abs=1e-6)
    assert abs(begun.metrics["val/value"]) > 0.01
    with pytest.raises(UserError, match="no adapter with the head of a reward model"):
        go(here, tmp_path / "refused", "ppo", **keys, critic=str(plain.folder))
    with pytest.raises(UserError, match="its adapter is another"):
        go(here, tmp_path / "other", "ppo", **(keys | {"lora": {"rank": 8}}), critic=str(scorer.folder))


def early(completions: list[str], **_: Any) -> list[float]:
    """1 for an answer that begins with a to m."""
    return [float("a" <= text[:1] <= "m") for text in completions]


def letters(completions: list[str], **_: Any) -> list[float]:
    """1 for an answer that begins with a to m, 0.6 for n to z."""
    pairs = zip(small(completions), early(completions), strict=True)
    return [0.6 * letter + 0.4 * first for letter, first in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_costs_stay_below_their_limit(here, tmp_path, method):
    """The best answers cost too much: the next best ones are found. Without a multiplier it is the others."""
    keys = {"grpo": {"n": 4, "batch_size": 16}, "ppo": {**METHODS["ppo"], "n": 4}}[method]
    keys |= {"rewards": {"letters": letters}, "costs": {"early": early}, "cost_limit": 0.1}
    late = {}
    for name, more in (("free", {"multiplier": 1e-6, "multiplier_rate": 0.0}), ("held", {})):
        result = go(here, tmp_path / name, method, **keys, **more)
        rows = [row for row in read_lines(result.folder / "metrics.jsonl") if "objective/costs" in row]
        late[name] = np.mean([(row["objective/costs"], row["objective/scores"]) for row in rows[-5:]], axis=0)
        assert "eval_cost" in result.metrics
    assert late["free"][0] > 0.4
    assert late["held"][0] < 0.25
    assert late["held"][1] > 0.4


@pytest.mark.slow
def test_rows_beside_the_rewards_are_learned(here, tmp_path):
    """Their loss falls while the bandit is solved, and the other losses are as they were without them."""
    rows = tmp_path / "rows.jsonl"
    said = [{"prompt": f"Colour {i}?", "completion": "Blue."} for i in range(10)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    keys = {**METHODS["ppo"], "max_steps": 40}
    result = go(here, tmp_path / "out", "ppo", **keys, ptx_data=str(rows))
    lines = [row for row in read_lines(result.folder / "metrics.jsonl") if "loss/ptx" in row]
    assert lines[-1]["loss/ptx"] < 0.5 * lines[0]["loss/ptx"]
    assert np.mean([row["objective/scores"] for row in lines if "objective/scores" in row][-3:]) > 0.6
    plain = go(here, tmp_path / "plain", "ppo", **(keys | {"max_steps": 1}))
    first = next(row for row in read_lines(plain.folder / "metrics.jsonl") if "loss" in row)
    for name in ("loss/policy", "loss/value", "val/ratio", "policy/entropy"):
        assert first[name] == pytest.approx(lines[0][name], abs=1e-5), name


@pytest.mark.slow
def test_updates_far_from_the_sampling_policy_are_skipped(here, tmp_path):
    keys = {"max_steps": 4, "batch_size": 8, "n": 4, "rollout_epochs": 4, "learning_rate": 0.1}
    result = go(here, tmp_path / "out", "grpo", **keys, max_approxkl=1e-3)
    rows = [row for row in read_lines(result.folder / "metrics.jsonl") if "loss" in row]
    assert rows[0]["skipped"] == 0
    assert sum(row["skipped"] for row in rows) >= 2
    for row in rows:
        assert row["skipped"] == (row["policy/approxkl"] > 1e-3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rewards": {}}, "nothing says which answers are good"),
        ({"temperature": 0}, "greater than 0"),
        ({"max_tokens": 64}, "have more than 0 tokens"),
        ({"eval_fraction": 0.99}, "leaves none to learn from"),
        ({"limits": {"kl": 5}}, "kl_coef and beta are 0"),
        ({"reference": {"mode": "precomputed"}}, "have no log-probs yet"),
        ({"rewards": {"short": {"kind": "python", "function": "nowhere:f"}}}, "cannot be imported"),
    ],
)
def test_bad_input_is_refused_before_any_work(here, tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        go(here, tmp_path / "out", "grpo", **keys)
    assert not (tmp_path / "out" / "rollouts").exists()
