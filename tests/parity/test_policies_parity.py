"""How far a run is from its base, on given answers, is what transformers and peft say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jaxalign.data.records import Message, Prompt
from jaxalign.evals.policies import Distance, Passes, Sampled, open_policies
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.export import export_peft
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from tests.tiny import noisy
from tests.train.tiny import write_model

# peft still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def write_run(model: Path, run: Path) -> None:
    """A run's folder whose adapter is far from nothing."""
    source = resolve(str(model))
    loaded = load_model(source, make_mesh(), adapter=LoraConfig(rank=4))
    adapter = noisy(loaded.model.init(jax.random.key(1))[0], 2, 0.3)
    run.mkdir()
    export_peft(loaded.model, adapter, source, run / "adapter", base_hash=loaded.base_hash)


def log_probs(model: torch.nn.Module, head: list[int], answer: list[int], temperature: float) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([head + answer])).logits[0].double() / temperature
    rows = torch.log_softmax(logits, -1)[len(head) - 1 : -1]
    return float(rows[torch.arange(len(answer)), torch.tensor(answer)].sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_ratios_are_those_of_peft(tmp_path: Path, temperature: float) -> None:
    write_model(tmp_path / "model", sharpness=10.0)
    write_run(tmp_path / "model", tmp_path / "run")
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{i}", (Message("user", "Say " + "so " * i),), None, {}) for i in range(5)]
    answers = [[rng.integers(0, 250, rng.integers(1, 9)).tolist() for _ in range(3)] for _ in prompts]
    first, run = open_policies(str(tmp_path / "model"), [str(tmp_path / "run")], prompts)
    sampled = Sampled(run, prompts, [[{"ids": ids} for ids in row] for row in answers])
    passes = Passes(rows=3, temperature=temperature, dtype="f32", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    said: list[str] = []
    found = Distance(first, passes, said.append)(sampled, tmp_path / "kl.npz")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    start = [
        [log_probs(plain, first.encode(p), a, temperature) for a in row]
        for p, row in zip(prompts, answers, strict=True)
    ]
    tuned = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    end = [
        [log_probs(tuned, first.encode(p), a, temperature) for a in row]
        for p, row in zip(prompts, answers, strict=True)
    ]
    want = np.array(end) - np.array(start)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(found, want, atol=2e-4)
    again = Distance(first, passes, said.append)(sampled, tmp_path / "kl.npz")
    assert np.array_equal(again, found)
    assert ["computed" in line for line in said] == [True, False]
    base = Sampled(first, prompts, sampled.completions)
    assert not Distance(first, passes, said.append)(base, tmp_path / "own.npz").any()
