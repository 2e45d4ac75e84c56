"""The loop on a toy model: what is logged, saved, skipped and stopped, and that a pause changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.feed import Direct
from jaxalign.train.flops import Work
from jaxalign.train.loop import Ended, Loop, Outcome, Parties, Plan, Progress, Speed
from jaxalign.train.metrics import JsonLines, read_lines
from jaxalign.train.programs import COMPILATIONS
from tests.train.toy import WIDTH, Toy, batch, parts

PLAN = Plan(total=12, log_every=4, checkpoint_every=5, steps_per_epoch=6)


def _run(folder: Path, toy: Toy, plan: Plan = PLAN, stop_at: int | None = None, **extra: Any) -> Outcome:
    """One process of a run: restores what is there, trains on; `stop_at` throws the switch after it."""
    checkpoints = Checkpoints(folder / "checkpoints", {"base_hash": "a"}, say=toy.messages.append)
    found = checkpoints.restore(toy.like())
    progress = Progress.load(found.progress) if found else Progress()
    if found:
        p = found.parts
        toy.state = {"params": p["params"], "opt": p["opt"], "step": p["rest"]["step"]}
    parties = Parties(step=toy.programs, make=toy.make, parts=parts, rows=toy.rows, **extra)
    log = JsonLines(folder / "metrics.jsonl", found.step if found else 0)
    loop = Loop(plan, parties, checkpoints, [log], progress=progress)
    loop.advance = lambda step: setattr(loop.notice, "raised", loop.notice.raised or step == stop_at)
    try:
        return loop.run(toy.state, found.step if found else 0)
    finally:
        log.close()


def _values(outcome: Outcome) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.state)]


def _same(a: Outcome, b: Outcome) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(_values(a), _values(b), strict=True))


def _log(folder: Path, drop: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    timing = ("time", "tokens_per_sec", "tokens_per_sec_per_device", "step_time_sec", "eta_sec", *drop)
    return [{k: v for k, v in row.items() if k not in timing} for row in read_lines(folder / "metrics.jsonl")]


def test_logs_first_every_nth_and_last(tmp_path: Path) -> None:
    outcome = _run(tmp_path, Toy(), replace(PLAN, total=10), rate=lambda step: step / 100)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 4, 8, 10]
    assert [r["learning_rate"] for r in rows] == [0.0, 0.03, 0.07, 0.09]
    assert [r["epoch"] for r in rows] == pytest.approx([1 / 6, 4 / 6, 8 / 6, 10 / 6])
    assert [r["num_tokens"] for r in rows] == [128, 512, 1024, 1280]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (outcome.step, outcome.preempted, int(outcome.state["step"])) == (10, False, 10)


def test_a_line_is_the_mean_over_its_steps(tmp_path: Path) -> None:
    for every, name in ((1, "one"), (4, "four")):
        (tmp_path / name).mkdir()
        _run(tmp_path / name, Toy(), replace(PLAN, total=8, log_every=every))
    single = {r["step"]: r["loss"] for r in _log(tmp_path / "one")}
    lines = {r["step"]: r["loss"] for r in _log(tmp_path / "four")}
    assert lines[1] == single[1]
    assert lines[4] == pytest.approx(np.mean([single[s] for s in (2, 3, 4)]))
    assert lines[8] == pytest.approx(np.mean([single[s] for s in (5, 6, 7, 8)]))


@pytest.mark.parametrize("stop_at", [1, 3, 5, 6, 10])
def test_stopped_and_resumed_is_the_same_run(tmp_path: Path, stop_at: int) -> None:
    """At any step: inside a log window, on a checkpoint, at the epoch's end, where an evaluation is due;
    parameters and log alike."""

    def evaluate(state: Any) -> dict[str, float]:
        return {"eval_loss": float(jnp.abs(state["params"]["w"]).sum())}

    plan = replace(PLAN, eval_every=2)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = _run(tmp_path / "whole", Toy(), plan, evaluate=evaluate)
    first = _run(tmp_path / "cut", Toy(), plan, stop_at, evaluate=evaluate)
    assert first.preempted
    assert stop_at <= first.step <= stop_at + 1
    again = _run(tmp_path / "cut", Toy(), plan, evaluate=evaluate)
    assert not again.preempted
    assert _same(whole, again)
    assert _log(tmp_path / "whole") == _log(tmp_path / "cut")
    assert again.progress.tokens == whole.progress.tokens


def test_lines_after_the_last_checkpoint_are_made_again_not_doubled(tmp_path: Path) -> None:
    _run(tmp_path, Toy(), replace(PLAN, total=5))
    whole = [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")]
    log = JsonLines(tmp_path / "metrics.jsonl", 99)
    log.write(8, {"loss": -1.0})  # a process that was killed after step 8 and before its checkpoint
    log.close()
    _run(tmp_path, Toy())
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert whole == [1, 4, 5]
    assert [r["step"] for r in rows] == [1, 4, 5, 8, 12]
    assert all(r["loss"] > 0 for r in rows)


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    whole = _run(tmp_path, Toy())
    calls: list[int] = []
    toy = Toy()
    again = _run(tmp_path, toy, evaluate=lambda state: calls.append(1) or {})
    assert again.step == 12
    assert calls == []
    assert toy.programs.table == {}
    assert _same(whole, again)


def test_a_nan_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    plan = replace(PLAN, max_nonfinite=2)
    outcome = _run(tmp_path, Toy(poison=(6,)), plan, rate=lambda step: step / 100)
    assert outcome.progress.skipped == 1
    assert np.isfinite(outcome.state["params"]["w"]).all()
    rows = {r["step"]: r for r in read_lines(tmp_path / "metrics.jsonl")}
    assert {step: row["nonfinite"] for step, row in rows.items()} == {1: 0, 4: 0, 8: 1, 12: 0}
    # The schedule stands still in that step.
    assert [row["learning_rate"] for row in rows.values()] == [0.0, 0.03, 0.06, 0.1]


def test_nan_steps_in_a_row_stop_and_name_step_and_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row.* step 9 .*row-8-0") as caught:
        _run(tmp_path, Toy(poison=(3, 6, 7, 8)), replace(PLAN, max_nonfinite=3))
    assert caught.value.status != 0
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"base_hash": "a"})
    assert checkpoints.steps() == [5]
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 4, 8]


def test_evaluates_on_time_and_at_the_end(tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(state: Any) -> dict[str, float]:
        seen.append(int(state["step"]))
        return {"eval_loss": 0.5 + seen[-1]}

    _run(tmp_path, Toy(), replace(PLAN, total=10, eval_every=4), evaluate=evaluate)
    assert seen == [4, 8, 10]
    rows = [r for r in read_lines(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    assert [(r["step"], r["eval_loss"]) for r in rows] == [(4, 4.5), (8, 8.5), (10, 10.5)]


@pytest.mark.parametrize("last", [0, 1, 7])
def test_an_early_end_goes_back_and_keeps_the_checkpoint(tmp_path: Path, last: int) -> None:
    """The result is what `back` makes of the state; the checkpoint holds what the updates came to."""
    toy = Toy()
    sound = toy.make

    def make(step: int) -> Any:
        if step == last:
            raise Ended("far enough", lambda state: {**state, "params": {"w": state["params"]["w"] * 0}})
        return sound(step)

    toy.make = make
    extra = {"feed": Direct, "evaluate": lambda state: {"eval_size": float(abs(state["params"]["w"]).sum())}}
    outcome = _run(tmp_path, toy, **extra)
    assert (outcome.step, outcome.preempted, outcome.stopped) == (last, False, "far enough")
    assert not np.asarray(outcome.state["params"]["w"]).any()
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["eval_size"] == 0
    found = Checkpoints(tmp_path / "checkpoints", {"base_hash": "a"}).restore(toy.like())
    assert found is not None
    assert found.step == last
    assert np.asarray(found.parts["params"]["w"]).any() == (last > 0)


def test_an_error_in_the_feed_surfaces_and_the_thread_ends(tmp_path: Path) -> None:
    toy = Toy()
    sound = toy.make

    def make(step: int) -> Any:
        if step == 4:
            raise UserError("row 4 is broken")
        return sound(step)

    toy.make = make
    with pytest.raises(UserError, match="row 4 is broken"):
        _run(tmp_path, toy)
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_utilisation_is_work_over_time_and_peak(tmp_path: Path) -> None:
    """FLOPs / (seconds x local devices x peak) with seconds taken from the same line."""
    toy = Toy()
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    speed = Speed(lambda work: 1000.0 * work.tokens + work.attended, peak=1e6)
    Loop(PLAN, Parties(toy.programs, toy.make, parts), checkpoints, [log], speed=speed).run(toy.state, 0)
    log.close()
    row = read_lines(tmp_path / "metrics.jsonl")[-1]
    work = Work(128, 2 * 8 * WIDTH * (WIDTH + 1) // 2, 128)
    assert row["mfu"] == pytest.approx(speed.flops(work) / row["step_time_sec"] / 8 / 1e6)
    assert row["tokens_per_sec"] == pytest.approx(128 / row["step_time_sec"])
    assert row["tokens_per_sec_per_device"] == pytest.approx(16 / row["step_time_sec"])


def test_prepared_shapes_compile_nothing_later(tmp_path: Path) -> None:
    lengths = (16, 24, 32)
    toy = Toy(lengths=lengths)
    for step in range(3):
        toy.programs.prepare(toy.state, toy.make(step)[0])
    _run(tmp_path / "warm", Toy(lengths=lengths), replace(PLAN, total=3))  # what orbax and eager code compile
    before = COMPILATIONS.count
    _run(tmp_path, toy)
    assert toy.programs.late == 0
    assert COMPILATIONS.count == before
    assert toy.messages == []


def test_a_new_shape_is_reported(tmp_path: Path) -> None:
    toy = Toy(lengths=(16, 24))
    toy.programs.prepare(toy.state, toy.make(0)[0])
    _run(tmp_path, toy)
    assert toy.programs.late == 1
    assert "recompiled step because of the new shape (1, 8, 1, 24)" in toy.messages[0]


def test_batches_do_not_depend_on_when_they_are_made() -> None:
    """The stand-in keeps the contract that resuming rests on."""
    assert np.array_equal(batch(3).tokens, batch(3).tokens)
    assert not np.array_equal(batch(3).tokens, batch(4).tokens)
