"""Whole runs of a tiny model on compared and judged answers: what they give, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.registry import OBJECTIVES
from jaxalign.train.metrics import read_lines
from jaxalign.train.run import RunResult, train
from jaxalign.train.settings import config_for
from tests.train.tiny import write_model

KEYS = ["max_steps=3", "batch_size=8", "learning_rate=1e-2", "log_every=1", "eval_fraction=0.2", "dtype=f32"]
WORDS = ("sun", "moon", "rain", "snow", "wind")


def pair(i: int, **more: Any) -> dict[str, Any]:
    word = WORDS[i % 5]
    return {
        "prompt": f"Say {word} {i}.",
        "chosen": f"{word}{'!' * (i % 4 + 1)}",
        "rejected": f"no {word}{'?' * (i % 3)}",
        **more,
    }


def labelled(i: int) -> dict[str, Any]:
    return {"prompt": f"Say {WORDS[i % 5]} {i}.", "completion": f"{WORDS[i % 5]}{i}", "label": i % 3 > 0}


def scored(i: int) -> dict[str, Any]:
    count = 2 + i % 3
    answers = [f"{WORDS[i % 5]}{'!' * j}" for j in range(count)]
    return {
        "prompt": f"Say {WORDS[i % 5]} {i}.",
        "completions": answers,
        "scores": [j / 4 for j in range(count)],
    }


ROWS = {
    "sft": [{"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(24)],
    "pairs": [
        pair(i, margin=1 + i % 3, meta={"safe": {"chosen": True, "rejected": i % 2 == 0}}) for i in range(24)
    ],
    "binary": [labelled(i) for i in range(24)],
    "lists": [scored(i) for i in range(24)],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and rows of every kind; the compilation cache is shared."""
    root = tmp_path_factory.mktemp("preferences")
    write_model(root / "model")
    for kind, rows in ROWS.items():
        write(root / f"{kind}.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


def run(
    here: Path, out: Path, method: str, *keys: str, model: Path | None = None, rows: Any = None
) -> RunResult:
    config = load_config(config_for(method), overrides=[*KEYS, *keys])
    data = rows or here / f"{OBJECTIVES[method].data}.jsonl"
    return train(method, str(model or here / "model"), data, out, config)


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_close(a: Path, b: Path, atol: float = 1e-4) -> None:
    """Adapters and logged metrics of two runs. Adam divides small gradients by their size, rounding included:
    a hundredth of a step is let pass here, and gradients are compared elsewhere."""
    one, two = adapter(a), adapter(b)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=atol, err_msg=name)
    clock = ("time", "tokens_per_sec", "tokens_per_sec_per_device", "step_time_sec", "eta_sec", "mfu")
    noise = ("rewards/accuracies",)  # of margins that are 0 but for rounding
    for first, second in zip(*(read_lines(p / "metrics.jsonl") for p in (a, b)), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {*clock, *noise}:
            assert first[name] == pytest.approx(second[name], abs=1e-4, rel=1e-4), name


@pytest.fixture(scope="module")
def dpo(here: Path) -> RunResult:
    """DPO with everything left to itself: the reference is the base without its adapter."""
    return run(here, here / "dpo", "dpo")


def test_dpo_learns_the_pairs(here: Path, dpo: RunResult) -> None:
    rows = read_lines(dpo.folder / "metrics.jsonl")
    trained, evaluated = ([row for row in rows if name in row] for name in ("loss", "eval_loss"))
    assert trained[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.03
    assert trained[-1]["rewards/margins"] > 0.05
    assert evaluated[-1]["eval_loss"] < np.log(2) - 0.03
    assert evaluated[-1]["eval_rewards/accuracies"] > 0.5


@pytest.fixture(scope="module")
def kept(here: Path) -> RunResult:
    """DPO with the reference's log-probs in a file."""
    return run(here, here / "kept", "dpo", *kept_in(here))


def kept_in(here: Path) -> list[str]:
    return ["reference.mode=precomputed", f"reference.cache={here / 'kept.npz'}"]


def test_the_reference_is_the_same_precomputed(dpo: RunResult, kept: RunResult) -> None:
    assert_close(kept.folder, dpo.folder)


@pytest.mark.slow
def test_the_reference_is_the_same_frozen(here: Path, dpo: RunResult) -> None:
    assert_close(run(here, here / "frozen", "dpo", "reference.mode=frozen").folder, dpo.folder)


@pytest.mark.slow
def test_a_prompt_computed_once_changes_nothing(here: Path, dpo: RunResult) -> None:
    assert_close(run(here, here / "apart", "dpo", "share_prompt=false").folder, dpo.folder)


@pytest.mark.slow
def test_preferences_after_fine_tuning_start_from_the_tuned_model(here: Path) -> None:
    """`-m RUN`: the adapter trains on, and the reference is the run's model, not the bare base."""
    first = run(here, here / "sft", "sft")
    tuned = {mode: here / f"tuned-{mode}" for mode in ("auto", "precomputed")}
    for mode, out in tuned.items():
        run(here, out, "dpo", f"reference.mode={mode}", model=first.folder)
    assert read_lines(tuned["auto"] / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert_close(*tuned.values())
    bare = run(here, here / "bare", "dpo", "reference.mode=adapter_off", model=first.folder)
    assert abs(read_lines(bare.folder / "metrics.jsonl")[0]["rewards/chosen"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "ema", "precomputed"])
def test_a_run_goes_on_with_its_reference(here: Path, tmp_path: Path, mode: str) -> None:
    keys = [f"reference.mode={mode}", "reference.sync_every=2", "reference.mix=1", "checkpoint_every=1"]
    whole = run(here, tmp_path / "whole", "dpo", *keys, "max_steps=4")
    run(here, tmp_path / "parts", "dpo", *keys, "max_steps=2", "schedule=constant")
    part = run(here, tmp_path / "whole2", "dpo", *keys, "max_steps=4", "schedule=constant")
    again = run(here, tmp_path / "parts", "dpo", *keys, "max_steps=4", "schedule=constant")
    assert (again.resumed_from, again.step, whole.step) == (2, 4, 4)
    one, two = adapter(part.folder), adapter(again.folder)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.slow
def test_a_running_mean_goes_on_where_it_stood(here: Path, tmp_path: Path) -> None:
    keys = ["shift=running", "checkpoint_every=1", "schedule=constant", "warmup_ratio=0"]
    whole = run(here, tmp_path / "whole", "bco", *keys, "max_steps=4")
    run(here, tmp_path / "parts", "bco", *keys, "max_steps=2")
    again = run(here, tmp_path / "parts", "bco", *keys, "max_steps=4")
    one, two = adapter(whole.folder), adapter(again.folder)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    rows = [row for row in read_lines(whole.folder / "metrics.jsonl") if "running_mean" in row]
    assert len(rows) == 4
    assert rows[0]["running_mean"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["running_mean"] != pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_prompts_of_one_label_weigh_unwanted_rows(here: Path, tmp_path: Path) -> None:
    """Half of the unwanted answers are to prompts like those of wanted ones, half to others."""
    pytest.importorskip("sklearn", reason="the extra `statistics` is not installed")
    asks = lambda i: "Say sun." if i % 4 < 3 else "QQQQ ZZZZ?"  # noqa: E731
    rows = [{"prompt": f"{asks(i)} {i}", "completion": f"{i}!", "label": i % 4 < 2} for i in range(32)]
    data, keys = write(tmp_path / "rows.jsonl", rows), ["udm=true", "eval_fraction=0", "checkpoint_every=1"]
    out = tmp_path / "out"
    run(here, out, "bco", *keys, "max_steps=2", "schedule=constant", rows=data)
    with np.load(out / "weights.npz") as saved:
        weights = saved["logp"]
    wanted, near = ([i % 4 in kinds for i in range(32)] for kinds in ((0, 1), (2,)))
    far = [i % 4 == 3 for i in range(32)]
    np.testing.assert_array_equal(weights[wanted], 1.0)
    np.testing.assert_array_less(weights[far], 0.7)
    np.testing.assert_array_less(0.9, weights[near])
    again = run(here, out, "bco", *keys, "max_steps=4", "schedule=constant", rows=data)
    assert again.resumed_from == 2


@pytest.mark.slow
def test_a_moving_reference_moves(here: Path, tmp_path: Path) -> None:
    """After the move the policy is its reference again: a loss of ln 2. The first update has a rate of 0."""
    keys = ["reference.mode=ema", "reference.sync_every=3", "reference.mix=1", "max_steps=4"]
    rows = read_lines(run(here, tmp_path / "out", "dpo", *keys).folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [losses[0], losses[3]] == pytest.approx([np.log(2)] * 2, abs=1e-4)
    assert losses[2] < losses[0] - 1e-3


@pytest.mark.usefixtures("kept")
def test_log_probs_of_other_weights_or_rows_are_refused(here: Path, tmp_path: Path) -> None:
    keys = kept_in(here)
    run(here, tmp_path / "b", "ipo", *keys)  # the same log-probs serve another loss
    fewer = write(tmp_path / "fewer.jsonl", ROWS["pairs"][:20])
    with pytest.raises(UserError, match="of other rows than the run's") as caught:
        run(here, tmp_path / "c", "dpo", *keys, rows=fewer)
    assert "reference.cache" in str(caught.value)
    write_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="of other weights than the run's"):
        run(here, tmp_path / "d", "dpo", *keys, model=tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["quantise=nf4"], ["quantise=int8"], ["lora.dora=true"]], ids=" ".join)
def test_other_kinds_of_adapters_and_bases_learn(here: Path, tmp_path: Path, keys: list[str]) -> None:
    result = run(here, tmp_path / "out", "dpo", *keys)
    rows = [row for row in read_lines(result.folder / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02


@pytest.mark.slow
def test_a_reward_model_trains_on_from_its_head(here: Path, tmp_path: Path) -> None:
    keys = ["max_steps=6", "learning_rate=3e-2"]
    first = run(here, tmp_path / "first", "reward", *keys)
    ended = first.metrics["eval_rewards/margins"]
    again = run(here, tmp_path / "again", "reward", *keys, model=first.folder)
    begun = read_lines(again.folder / "metrics.jsonl")[0]["rewards/margins"]
    assert ended > 0.2
    assert begun > ended / 2
    assert "base_model.model.score.weight" in adapter(again.folder)


@pytest.mark.parametrize(
    ("method", "keys", "rows", "said"),
    [
        ("kto", ["grad_accumulation=2", "batch_size=16"], None, "looks at all rows of an update at once"),
        ("kto", ["reference.mode=precomputed"], None, "kto compares each prompt with answers of other rows"),
        ("kto", [], [labelled(i) | {"label": True} for i in range(20)], "all 20 rows have the label True"),
        ("odpo", [], [pair(i) for i in range(20)], "20 of 20 rows have no margin"),
        (
            "odpo",
            [],
            [pair(i, margin=float(i > 3)) for i in range(20)],
            "4 of 20 rows have a margin that is not",
        ),
        ("reward_rating", ["highest=0.5"], None, "rows have scores outside lowest=0 to highest=0.5"),
        ("lipo", [], [pair(i) for i in range(20)], "a pair does not make lists"),
        ("kto", [], [labelled(i) | {"label": "maybe"} for i in range(20)], "neither true nor false: 'maybe'"),
        ("dpo", [], ROWS["sft"], "unknown columns"),
        ("cost", [], [pair(i) for i in range(20)], "do not say whether each answer is safe"),
        ("dpo", ["loss_on=all"], None, "the answers that are compared are what is learned"),
        ("dpo", ["packing=true"], None, "packing puts several rows into one"),
        ("dpo", ["lora=null", "reference.mode=adapter_off"], None, "no adapter to switch off"),
        ("dpo", ["lora=null", "quantise=nf4"], None, "weights in nf4 cannot"),
        ("dpo", ["max_bad_rows=0"], [pair(i) for i in range(20)] + [pair(1, margin=-1)], "negative margin"),
        ("dpo", ["max_bad_rows=0"], [{**pair(1), "rejected": "sun"}, {**pair(2), "rejected": ""}], "empty"),
    ],
)
def test_refused(
    here: Path, tmp_path: Path, method: str, keys: list[str], rows: list[dict[str, Any]] | None, said: str
) -> None:
    data = write(tmp_path / "rows.jsonl", rows) if rows else None
    with pytest.raises(UserError, match=said):
        run(here, tmp_path / "out", method, *keys, rows=data)


def one_of_each() -> list[str]:
    """A method of every file of losses and every set of needs: a run knows of a loss no more than that. The
    formulas of all are in tests/conformance."""
    found: dict[Any, str] = {}
    for name in OBJECTIVES:
        loss = OBJECTIVES[name]()
        found.setdefault((type(loss).__module__, loss.data, loss.group, loss.needs), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", one_of_each())
def test_one_of_each_trains_from_the_command_line(here: Path, tmp_path: Path, method: str) -> None:
    # An evaluation is one more program to compile: one method of each kind of rows has it.
    evaluated = method in ("sft", "dpo", "kto", "lipo", "cost")
    keys = ["max_steps=2"] if evaluated else ["max_steps=2", "eval_fraction=0"]
    result = run(here, tmp_path / method, method, *keys)
    rows = read_lines(result.folder / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert not evaluated or np.isfinite(rows[-1]["eval_loss"])
    assert rows[0]["nonfinite"] == 0
    assert rows[0]["grad_norm"] > 0
