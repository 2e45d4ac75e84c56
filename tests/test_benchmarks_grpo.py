"""The logic of benchmarks/grpo.py: the same prompts a step, forced lengths, the split, and the check."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import batches, contest, grpo, jax_grpo, prepare, reward, stats, weights
from benchmarks.protocol import Contender
from jaxalign.rl.online import Rollouts
from jaxalign.rl.prompts import Prompts
from jaxalign.sharding import make_mesh

OPTIONS = SimpleNamespace(
    python="a", peer_python="b", variants=["grpo", "grpo-reference"], warmup=2, steps=1, rounds=5,
    prompts=4, answers=4, prompt_tokens=64, new_tokens=64,
)  # fmt: skip
TOKENS = 4 * 4 * 64


def told(**changes: Any) -> dict[str, Any]:
    """What a contender tells of a round of one step: 10 s, of which sampling took 6 and scoring 1."""
    usual = {
        "wall_s": 10.0, "cpu_s": 20.0, "rollout_s": 6.0, "score_s": 1.0, "tokens": TOKENS, "trained": TOKENS,
        "losses": [1e-8], "entropy": 2.5, "idle": 0.25, "peak_mib": 9.0, "load": 0.1, "loaded": False,
    }  # fmt: skip
    return usual | changes


def learned(**changes: Any) -> dict[str, Any]:
    return {"jaxalign": {"first": told()}, "TRL": {"first": told(**changes)}}


def session() -> Any:
    return SimpleNamespace(options=OPTIONS, say=lambda _: None)


def test_rows_are_compared_with_ours():
    found = grpo.contenders(OPTIONS, "bf16")
    assert [c.rival for c in found] == ["", "", "TRL", "TRL", "TRL", "TRL default"]
    assert {c.against for c in found} == {"jaxalign"}
    assert len(grpo.contenders(OPTIONS, "f32")) == 4


def test_prompts_are_cut_for_every_step():
    plain, reference = grpo.orders(OPTIONS)
    assert plain["how"] == reference["how"] == {"steps": 8, "rows": 4, "length": 64}
    assert {plain["name"], reference["name"]} == grpo.BETA.keys()
    assert plain["kind"] in prepare.ORDERS


def test_a_first_loss_of_nought_and_the_tokens_asked_for_are_the_same_work():
    assert grpo.check(session(), learned(), "f32") == {"jaxalign": 1e-8, "TRL": 1e-8}
    assert grpo.check(session(), learned(losses=[-1e-2]), "bf16")["TRL"] == 1e-2


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tokens": TOKENS - 1}, "TRL generated 1023 tokens and trained 1024, not 1024"),
        ({"trained": 0}, "trained 0"),
        ({"losses": [1e-3]}, r"begins with the loss 0.001000, not 0 within 0.0001"),
        ({"losses": [float("nan")]}, "loss nan"),
        ({"idle": 1.0}, "nothing moved"),
    ],
)
def test_other_work_is_refused(changes, fault):
    with pytest.raises(stats.DifferentWorkError, match=fault):
        grpo.check(session(), learned(**changes), "f32")


def test_the_split_is_of_a_step():
    names, steps = {"jaxalign": 1.0, "TRL": 3.0}, 2
    rounds = [
        {"contender": n, **told(wall_s=20 * k, rollout_s=12 * k, score_s=2 * k, tokens=2 * TOKENS)}
        for n, k in names.items()
    ]
    found = {
        "rounds": rounds,
        "learned": learned(),
        "starts": {n: {"ready_s": 3.0, "compile_s": None} for n in names},
        "cold_compile_s": {"jaxalign": 9.0},
    }
    who = [Contender("jaxalign", "", ""), Contender("TRL", "", "", "TRL"), Contender("gone", "", "", "TRL")]
    ours, trl = grpo.table(found, who, {"data": "grpo"}, steps)
    assert (ours["s/step"].median, trl["s/step"].median) == (10.0, 30.0)
    assert [trl[key] for key in ("rollout-s", "score-s", "update-s")] == [18.0, 3.0, 9.0]
    assert trl["ours/this"].median == 3.0
    assert ours["tok/s"].median == 2 * TOKENS / 20
    assert (ours["tokens/step"], ours["cold-compile-s"]) == (TOKENS, 9.0)
    assert {*ours} <= {*grpo.COLUMNS}
    (line,) = contest.headline(found, who, [ours, trl])
    assert line.startswith("ours over TRL: 3 (3-3)")


def test_rollouts_take_the_prompts_of_their_step():
    steps = batches.fixed(np.arange(1, 121), steps=4, rows=5, length=6)
    settings = SimpleNamespace(batch_size=5, minibatches=1, seed=7)
    machine: Any = SimpleNamespace(config=settings)
    nobody: Any = None
    prompts = Prompts(jax_grpo.asked(steps, settings.seed), [])
    rollouts = Rollouts(machine, prompts, nobody, nobody, nobody, 0)
    for index in range(4):
        assert [a.tokens for a in rollouts.asked(index)] == steps.tokens[index].tolist()
    assert len({a.prompt.id for a in prompts.learned}) == 20


def test_both_sides_read_a_random_model_as_numbers(tmp_path):
    assert jax_grpo.Numbers().decode([7, 41]) == "7 41"
    assert reward.characters(["7 41", ""], prompts=["", ""]) == [0.004, 0.0]
    peer = pytest.importorskip("benchmarks.trl_common", exc_type=ImportError)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    words = peer.tokenizer(tmp_path)
    assert words.batch_decode([[7, 41]], skip_special_tokens=True) == ["7 41"]


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("beta", grpo.BETA.values())
def test_our_step_makes_and_trains_every_token(tmp_path, beta, apart):
    weights.random_model(tmp_path / "m", "tiny")
    weights.adapter(tmp_path / "a", tmp_path / "m", rank=4, alpha=8.0)
    batches.save(tmp_path / "b.npz", batches.fixed(np.arange(3, 3 + 2 * 8 * 6), steps=2, rows=8, length=6))
    job = {
        "folder": str(tmp_path / "m"), "adapter": str(tmp_path / "a"), "batches": str(tmp_path / "b.npz"),
        "precision": "f32", "learning_rate": 1e-3, "clip": 1.0, "beta": beta, "apart": apart,
        # A vocabulary of 512: of 8 x 3 x 20 tokens one is the model's stop token more often than not.
        "answers": 3, "new_tokens": 20,
    }  # fmt: skip
    loop = jax_grpo.make(job, make_mesh(), Path(tmp_path))
    loop.compile()
    first = loop.round({"steps": 1})
    assert (first["tokens"], first["trained"]) == (8 * 3 * 20, 8 * 3 * 20)
    assert abs(first["losses"][0]) < 1e-5
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert first["idle"] < 1
    assert first["rollout_s"] > 0
    assert loop.round({"steps": 1})["tokens"] == 8 * 3 * 20
