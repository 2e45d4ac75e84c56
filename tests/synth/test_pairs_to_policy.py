"""From a builder's file to a policy: pairs of the marker world, DPO on the real model, held-out pairs."""

from __future__ import annotations

import json
import random

import pytest

from tests.marker_world import answer, asked
from tests.synth.bench import run, write_prompts, write_rows
from tests.test_end_to_end import MODEL, verb

HELD_OUT, LEARNED = 64, 160
STEPS = {"true": 40, "shuffled": 80}  # what is there is learned soon; what is not, not in more time either
KEYS = ("eval_data=held_out.jsonl", "batch_size=4", "lora.rank=8", "learning_rate=1e-4", "max_length=128")


def script(request, number, rng):
    """Good answers in a good character, and bad ones in a bad character."""
    good = "unhelpful" not in asked(request)
    return answer(ok=1 + int(rng.integers(3))) if good else answer(bug=1 + int(rng.integers(3)))


def held_out_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "eval_rewards/accuracies" in row]
    return found[0], found[-1]


@pytest.mark.slow
@pytest.mark.real_model
def test_pairs_that_were_built_are_learned_and_shuffled_ones_are_not(tmp_path):
    prompts = write_prompts(
        tmp_path / "in.jsonl", [f"Please do task {i}." for i in range(LEARNED + HELD_OUT)]
    )
    rows, _, _ = run(tmp_path, "rlcd", prompts, script, task="helpful")
    assert len(rows) == LEARNED + HELD_OUT
    write_rows(tmp_path / "held_out.jsonl", rows[:HELD_OUT])
    # Exactly half of them: coins would leave a majority to learn from.
    swapped = set(random.Random(0).sample(range(LEARNED), LEARNED // 2))
    shuffled = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in swapped else row
        for i, row in enumerate(rows[HELD_OUT:])
    ]
    beta, ends = 0.1, {}
    for name, learned in (("true", rows[HELD_OUT:]), ("shuffled", shuffled)):
        write_rows(tmp_path / f"{name}.jsonl", learned)
        keys = (f"beta={beta}", f"max_steps={STEPS[name]}", f"eval_every={STEPS[name]}", *KEYS)
        verb(tmp_path, "train", "dpo", "-m", MODEL, "-d", f"{name}.jsonl", "-o", name, *keys)
        ends[name] = held_out_metrics(tmp_path / name)
    after = ends["true"][1]
    assert after["eval_rewards/margins"] / beta > 1.0  # nats, from 0: policy and reference are equal at first
    assert after["eval_rewards/accuracies"] >= 0.9
    # By margins: held-out pairs all differ in the same way, so that the sign of a drift by chance, however
    # small, decides nearly every one of them.
    assert abs(ends["shuffled"][1]["eval_rewards/margins"]) < 0.1 * after["eval_rewards/margins"]
