"""Prefix and prompt tuning from the command line: train, resume, train on, generate, export, judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jaxalign import cli
from jaxalign.train.metrics import read_lines
from tests.train.test_preference_run import ROWS, write
from tests.train.tiny import write_model

pytestmark = pytest.mark.slow

# Every step sees all rows, so that its losses compare.
COMMON = ["max_steps=3", "batch_size=24", "log_every=1", "dtype=f32", "learning_rate=1", "warmup_ratio=0"]
KINDS = ("prefix", "prompt")


def verb(*words: str | Path, status: int = 0) -> str:
    """What the command says, on both streams."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == status, f"{words}: {done.output} {done.exception!r}"
    return done.output


def fit(here: Path, method: str, model: Path, out: Path, *keys: str, status: int = 0) -> str:
    rows = here / ("sft.jsonl" if method == "sft" else "pairs.jsonl")
    return verb("train", method, "-m", model, "-d", rows, "-o", out, *COMMON, *keys, status=status)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_lines(out / "metrics.jsonl") if "loss" in row]


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and rows, and a run of `sft` for each kind."""
    root = tmp_path_factory.mktemp("verbs")
    write_model(root / "model")
    for kind in ("sft", "pairs"):
        write(root / f"{kind}.jsonl", ROWS[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        for kind in KINDS:
            fit(root, "sft", root / "model", root / kind, f"{kind}.length=4")
        yield root


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_goes_on_where_it_stopped(here: Path, tmp_path: Path, kind: str) -> None:
    """In two parts the same adapter, bit for bit; the same command again has nothing to do."""
    assert losses(here / kind)[-1] < losses(here / kind)[0] - 0.02
    keys = [f"{kind}.length=4", "schedule=constant", "checkpoint_every=1"]
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        fit(here, "sft", here / "model", tmp_path / out, *keys, f"max_steps={steps}")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert list(whole) == list(parts) == ["prompt_embeddings"]
    assert whole["prompt_embeddings"].tobytes() == parts["prompt_embeddings"].tobytes()
    assert "of another" not in fit(here, "sft", here / "model", tmp_path / "parts", *keys, "max_steps=4")
    changed = fit(here, "sft", here / "model", tmp_path / "parts", *keys, f"{kind}.length=5", status=2)
    assert f"{kind}.length: 4 -> 5" in changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more", ["lora=null", "quantise=nf4", "quantise=int8", "packing=true", "neftune_alpha=5"]
)
def test_what_goes_with_it(here: Path, tmp_path: Path, kind: str, more: str) -> None:
    fit(here, "sft", here / "model", tmp_path / "out", f"{kind}.length=4", more, "max_length=128")
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0] - 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_with_the_adapter_off_as_the_reference(here: Path, tmp_path: Path, kind: str) -> None:
    """The base without virtual tokens is where the log-probs of a file come from too; and a prompt that is
    computed once for both answers sees the virtual tokens as each answer's own would."""
    found: list[Any] = []
    for i, more in enumerate(["share_prompt=true", "share_prompt=false", "reference.mode=precomputed"]):
        fit(here, "dpo", here / "model", tmp_path / str(i), f"{kind}.length=4", more, "beta=0.5")
        found.append(losses(tmp_path / str(i)))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] == pytest.approx(found[2], abs=1e-4)
    assert found[0][-1] < found[0][0] - 0.02
    written = (tmp_path / "0" / "config.yaml").read_text()
    assert "mode: auto" in written


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_after_fine_tuning(here: Path, tmp_path: Path, kind: str) -> None:
    """`-m RUN` trains its adapter on, and the reference is the run's model: a loss of ln 2."""
    fit(here, "dpo", here / kind, tmp_path / "out")
    assert losses(tmp_path / "out")[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses(tmp_path / "out")[-1] < np.log(2) - 0.001
    fit(here, "dpo", here / kind, tmp_path / "ema", "reference.mode=ema", "reference.sync_every=2")
    before, after = adapter(here / kind), adapter(tmp_path / "out")
    assert np.abs(before["prompt_embeddings"] - after["prompt_embeddings"]).max() > 1e-3
    refused = fit(here, "dpo", here / kind, tmp_path / "no", "lora=null", status=2)
    assert f"the {kind} that the model comes with cannot be folded into them" in refused
    assert "leave lora=null out" in refused


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_model_to_the_other_verbs(here: Path, tmp_path: Path, kind: str) -> None:
    """Answers are sampled with it; it cannot be merged, and is exported in PEFT form bit for bit."""
    prompts = write(
        tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say 1."}, {"id": "b", "prompt": "Go"}]
    )
    logp: dict[str, list[float]] = {}
    for model in ("model", kind):
        out = tmp_path / f"{model}.jsonl"
        verb("generate", "-m", here / model, "-d", prompts, "-o", out, "max_tokens=4", "temperature=0")
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        logp[model] = [row["completions"][0]["logp"] for row in rows]
    assert [len(v) for v in logp.values()] == [2, 2]
    assert np.abs(np.array(logp["model"]) - logp[kind]).min() > 0.01
    refused = verb("export", "-m", here / kind, "-o", tmp_path / "hf", "--format", "hf", status=2)
    assert f"a trained {kind} cannot be folded into the weights" in refused
    verb("export", "-m", here / kind, "-o", tmp_path / "peft", "--format", "peft")
    again = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    np.testing.assert_allclose(
        again["prompt_embeddings"], adapter(here / kind)["prompt_embeddings"], atol=1e-6
    )
    assert "length: 4" in verb("inspect", "model", "-m", here / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model(here: Path, tmp_path: Path, kind: str) -> None:
    fit(here, "reward", here / "model", tmp_path / "out", f"{kind}.length=4", "max_steps=6")
    shown = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["rewards/margins"]
    assert shown > 0.1
    rows = here / "pairs.jsonl"
    verb("evaluate", "reward", "-m", tmp_path / "out", "-d", rows, "-o", tmp_path / "report", "dtype=f32")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["accuracy"]["rate"] > 0.5
    verb("export", "-m", tmp_path / "out", "-o", tmp_path / "peft", "--format", "peft")
    again, before = (load_file(tmp_path / p / "adapter_model.safetensors") for p in ("peft", "out/adapter"))
    np.testing.assert_array_equal(again["base_model.score.weight"], before["base_model.score.weight"])
