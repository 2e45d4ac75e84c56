"""Pairs in stages: what each stage takes, what it is compared with, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxalign.config import describe, load_config
from jaxalign.data.batching import BatchSource
from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.objectives.pairwise import DPO
from jaxalign.train.metrics import read_lines
from jaxalign.train.reference import ReferenceConfig, mover, resolve_mode
from jaxalign.train.run import RunResult, train
from jaxalign.train.settings import config_for
from jaxalign.train.stages import StagesConfig
from tests.rig import Rig
from tests.tiny import micro, tiny_config, tiny_model
from tests.train.test_preference_run import ROWS, adapter, assert_close, pair, write
from tests.train.test_reference import pairs
from tests.train.tiny import write_model

KEYS = [
    "batch_size=8",
    "learning_rate=1e-2",
    "log_every=1",
    "dtype=f32",
    "schedule=constant",
    "warmup_ratio=0",
]
LN_2 = math.log(2)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and 24 pairs of margins 1, 2, 3; the compilation cache is shared."""
    root = tmp_path_factory.mktemp("stages")
    write_model(root / "model")
    write(root / "pairs.jsonl", ROWS["pairs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        yield root


def run(
    here: Path,
    out: Path,
    *keys: str,
    method: str = "dpo",
    rows: Path | None = None,
    model: Path | None = None,
) -> RunResult:
    config = load_config(config_for(method), overrides=[*KEYS, *keys])
    return train(method, str(model or here / "model"), rows or here / "pairs.jsonl", out, config)


def lines(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]


def report(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "data_report.json").read_text())["stages"]


@pytest.fixture(scope="module")
def sdpo(here: Path) -> RunResult:
    """Three stages of 8 rows, two passes over each: six updates, evaluated where each stage ends."""
    keys = ["epochs=2", "eval_every=2", f"eval_data={here / 'pairs.jsonl'}"]
    return run(here, here / "sdpo", "stages.by=rating_gap", *keys)


def test_a_stage_begins_at_its_reference(sdpo: RunResult) -> None:
    """sDPO (arXiv:2403.19270): a loss of ln 2 and margins of 0 in the first update of every stage alone."""
    rows = lines(sdpo.folder)
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["loss"] == pytest.approx(LN_2, abs=1e-6)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert first["grad_norm"] > 1e-3
        assert second["loss"] < LN_2 - 1e-3


def test_an_evaluation_at_the_end_of_a_stage_is_against_its_own_reference(sdpo: RunResult) -> None:
    found = [row["eval_loss"] for row in read_lines(sdpo.folder / "metrics.jsonl") if "eval_loss" in row]
    assert len(found) == 3
    assert all(loss < LN_2 - 1e-3 for loss in found)


def test_the_report_says_what_the_stages_are(sdpo: RunResult) -> None:
    """Margins 3, 2 and 1 are eight rows each."""
    assert report(sdpo.folder) == [
        {"rows": 8, "updates": [1, 2], "name": "rating_gap", "gap": [3.0, 3.0]},
        {"rows": 8, "updates": [3, 4], "name": "rating_gap", "gap": [2.0, 2.0]},
        {"rows": 8, "updates": [5, 6], "name": "rating_gap", "gap": [1.0, 1.0]},
    ]


def stop_at(here: Path, out: Path, step: int, *keys: str) -> None:
    """A run that a SIGTERM ends while the batch of `step` is made."""
    sound = BatchSource.batch

    def batch(self: BatchSource, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the handler runs in the main thread
        return sound(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchSource, "batch", batch)
        with pytest.raises(UserError, match="stopped by a signal"):
            run(here, out, *keys)


def test_stopped_in_the_second_stage_and_resumed(
    here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a gap that takes the model: it is read back and not measured again, and the end is the same."""
    keys = ["stages.by=ref_logp_gap", "epochs=4", "stages.count=2"]
    whole = run(here, tmp_path / "whole", *keys)
    said = capfd.readouterr().err
    assert said.count("stage 1 of 2: updates 1 to 6, 12 rows, ref_logp_gap") == 1
    assert said.count("stage 2 of 2: updates 7 to 12, 12 rows, ref_logp_gap") == 1
    stop_at(here, tmp_path / "parts", 9, *keys)
    capfd.readouterr()
    again = run(here, tmp_path / "parts", *keys)
    said = capfd.readouterr().err
    assert 6 <= again.resumed_from < 12
    assert said.count("stage 2 of 2") == 1
    assert "gaps of the stages read from" in said
    one, two = adapter(whole.folder), adapter(again.folder)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    begins = [row["loss"] for row in lines(again.folder) if row["step"] in (1, 7)]
    assert begins == pytest.approx([LN_2] * 2, abs=1e-6)


def test_gaps_under_the_reference(here: Path, tmp_path: Path) -> None:
    """What was measured before the first step is what the run's own metrics say of a stage: the mean over its
    rows of log-prob of chosen less rejected, while the policy is still the reference."""
    out = run(here, tmp_path / "out", "stages.by=ref_logp_gap", "learning_rate=1e-9").folder
    stages, rows = report(out), lines(out)
    assert [row["stage"] for row in rows] == [1, 2, 3]
    means = [row["logps/chosen"] - row["logps/rejected"] for row in rows]
    assert means == sorted(means, reverse=True)
    for stage, mean in zip(stages, means, strict=True):
        assert stage["gap"][1] < mean < stage["gap"][0]
    assert stages[0]["gap"][1] >= stages[1]["gap"][0] > stages[1]["gap"][1] >= stages[2]["gap"][0]


@pytest.mark.slow
def test_one_reference_for_all_stages(here: Path, tmp_path: Path) -> None:
    """Wherever it comes from; the first update of a later stage is not at ln 2."""
    keys = ["stages.by=rating_gap", "stages.new_reference=false"]
    off = run(here, tmp_path / "off", *keys)
    before = run(here, tmp_path / "before", *keys, "reference.mode=precomputed")
    assert_close(off.folder, before.folder)
    losses = [row["loss"] for row in lines(off.folder)]
    assert losses[0] == pytest.approx(LN_2, abs=1e-6)
    assert all(abs(loss - LN_2) > 1e-3 for loss in losses[1:])


@pytest.mark.slow
def test_stages_after_a_run_and_on_every_weight(here: Path, tmp_path: Path) -> None:
    """Implicit margins of what the first run learned; then a stage for each file, every weight trained."""
    first = run(here, tmp_path / "first")
    again = run(here, tmp_path / "again", "stages.by=implicit_margin", model=first.folder)
    assert [row["loss"] for row in lines(again.folder)] == pytest.approx([LN_2] * 3, abs=1e-6)
    assert report(again.folder)[0]["gap"][0] > report(again.folder)[2]["gap"][1] + 0.1
    (tmp_path / "files").mkdir()
    for name, part in (("a-easy", slice(0, 16)), ("b-hard", slice(16, 24))):
        write(tmp_path / "files" / f"{name}.jsonl", ROWS["pairs"][part])
    full = run(here, tmp_path / "full", "stages.by=source", "lora=null", rows=tmp_path / "files")
    assert [stage["rows"] for stage in report(full.folder)] == [16, 8]
    losses = [row["loss"] for row in lines(full.folder)]
    assert [losses[0], losses[2]] == pytest.approx([LN_2] * 2, abs=1e-6)
    assert losses[1] < LN_2 - 1e-3


@pytest.mark.slow
def test_losses_without_a_reference_have_stages_too(here: Path, tmp_path: Path) -> None:
    for method in ("simpo", "reward"):
        rows = lines(run(here, tmp_path / method, "stages.by=ref_logp_gap", method=method).folder)
        assert [row["stage"] for row in rows] == [1, 2, 3]


# ------------------------------------------------------------------------------- the reference that moves


@pytest.mark.parametrize(("full", "mesh"), [(False, (2, 2, 2)), (True, (1, 1, 1))], ids=["lora", "full"])
def test_the_reference_is_the_policy_that_the_last_stage_ended_with(
    full: bool, mesh: tuple[int, int, int]
) -> None:
    """To the bit; and the policy goes on from where it was, away from its start."""
    model = tiny_model(
        None if full else LoraConfig(rank=4, alpha=8.0), tiny_config(num_heads=8, num_kv_heads=8)
    )
    reference = ReferenceConfig(mode="ema")
    rig = Rig(model, mesh, full=full, optimizer=optax.sgd(1.0), objective=DPO(), reference=reference)
    rig = replace(rig, begins=(2, 4))
    step, state, base = rig.start()
    batch, before, far = rig.place(micro(pairs(), 1)), rig.before(), []
    ended = policy = before
    for number in range(6):
        state, metrics = step(state, base, batch)
        if number in (2, 4):
            ended = policy
        jax.tree.map(np.testing.assert_array_equal, state.reference, ended)
        at_start = float(metrics["loss"]) == pytest.approx(LN_2, abs=1e-6)
        assert at_start == (number in (0, 2, 4))
        policy = jax.tree.map(np.asarray, state.params)
        far.append(float(optax.tree.norm(jax.tree.map(np.subtract, policy, before))))
    assert far[1] < far[3] < far[5]


@pytest.mark.parametrize(("step", "moves"), [(0, False), (1, False), (2, True), (3, False), (512, False)])
def test_moves_at_the_begins_alone(step: int, moves: bool) -> None:
    """Whatever `sync_every` and `mix` say."""
    move = mover(ReferenceConfig(), "ema", (2, 5))
    assert move is not None
    got = jax.jit(move)({"w": np.asarray([0.0, 4.0])}, {"w": np.asarray([1.0, 2.0])}, step)
    assert got["w"].tolist() == ([1, 2] if moves else [0, 4])


def test_modes_of_the_reference() -> None:
    assert resolve_mode(ReferenceConfig(), full=False, imported=False, renewed=True) == "ema"
    for mode in ("adapter_off", "precomputed", "frozen", "ema"):
        with pytest.raises(UserError, match=f"which {mode} does not know") as caught:
            resolve_mode(ReferenceConfig(mode=mode, mix=1), full=False, imported=False, renewed=True)
        assert "reference.mode" in str(caught.value)
        assert "stages.new_reference=false" in str(caught.value)


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "keys", "count", "said"),
    [
        ("dpo", ["stages.by=rating_gap"], 20, "20 of 20 rows have no margin"),
        ("dpo", ["stages.count=30"], 20, "20 rows do not make 30 stages"),
        ("dpo", ["stages.count=3", "max_steps=2"], 20, "2 updates leave none to stage 2 of 3"),
        ("dpo", ["stages.by=source"], 20, r"the rows come from 1 file\(s\), and not from several"),
        ("dpo", ["stages.by=source", "stages.count=2"], 20, r"the rows come from 1 file\(s\), and not 2"),
        ("dpo", ["stages.count=2", "reference.mode=precomputed"], 20, "which precomputed does not know"),
        ("dpo", ["stages.by=implicit_margin"], 20, "the run starts from its base"),
        ("kto", ["stages.count=2"], 20, "stages are made of pairs, and the method learns from binary"),
        ("lipo", ["stages.count=2"], 20, "stages are made of pairs, and the method learns from lists"),
    ],
)
def test_refused(here: Path, tmp_path: Path, method: str, keys: list[str], count: int, said: str) -> None:
    rows = write(tmp_path / "rows.jsonl", [pair(i) for i in range(count)])
    with pytest.raises(UserError, match=said):
        run(here, tmp_path / "out", *keys, method=method, rows=rows)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_run_in_stages_cannot_be_made_longer(here: Path, sdpo: RunResult) -> None:
    with pytest.raises(UserError, match="planned for 6 steps, now there are 9") as caught:
        run(here, sdpo.folder, "stages.by=rating_gap", "epochs=3", f"eval_data={here / 'pairs.jsonl'}")
    assert "stages end where they end" in str(caught.value)


def test_fine_tuning_has_no_stages() -> None:
    with pytest.raises(UserError, match="stages"):
        load_config(config_for("sft"), overrides=["stages.count=2"])
    with pytest.raises(UserError, match=r"stages\.count"):
        load_config(config_for("dpo"), overrides=["stages.count=1"])


def test_help_names_the_keys() -> None:
    rows = {row.key: row for row in describe(config_for("dpo"))}
    assert "sDPO" in rows["stages"].help
    assert rows["stages.by"].type == "order | source | rating_gap | ref_logp_gap | implicit_margin"
    assert {"stages.count", "stages.new_reference"} < rows.keys()
    assert "best_vs_rest" in rows["pairs"].type
    assert StagesConfig() == StagesConfig(count=None, by="order", new_reference=True)
