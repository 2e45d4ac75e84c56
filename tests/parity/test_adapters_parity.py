"""Prefix and prompt tuning are PEFT's: what it writes we load, what we write it loads, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[parity]'")

import jax
import numpy as np
import torch

from jaxalign.config import load_config
from jaxalign.models.export import export_peft
from jaxalign.models.load import load_model
from jaxalign.models.prefix import PrefixConfig, PromptConfig
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.run import train
from jaxalign.train.settings import config_for
from tests.parity.test_export_parity import FAMILIES, TOKENS, close, from_pretrained, ours, saved, theirs
from tests.train.tiny import write_model, write_rows

# peft asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
KINDS = {
    "prefix": (peft.PrefixTuningConfig, PrefixConfig(length=5)),
    "prompt": (peft.PromptTuningConfig, PromptConfig(length=5)),
}
WIDE = {"gemma3_text": {"head_dim": 16, "sliding_window": 32}}  # beyond tokens and prefix together


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_we_load_and_back(tmp_path: Path, kind: str, family: str) -> None:
    hf = saved(tmp_path / "hf", family, **(FAMILIES | WIDE)[family])
    plain = theirs(hf)
    make, want = KINDS[kind]
    adapted = peft.get_peft_model(hf, make(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for value in adapted.prompt_encoder.parameters():
            value.copy_(torch.randn_like(value))
    # Virtual tokens of prompt tuning come out in front.
    logits = theirs(adapted)[:, -plain.shape[1] :]
    assert np.abs(logits - plain).max() > 0.1
    adapted.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "hf")})
    )
    loaded = load_model(resolve(str(tmp_path / "a")), make_mesh(MESH))
    assert loaded.model.adapter == want
    close(ours(loaded), logits)
    assert loaded.adapter is not None
    out = export_peft(loaded.model, loaded.adapter, loaded.source, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "hf"), out).eval()
    close(theirs(again)[:, -plain.shape[1] :], logits)


def test_a_projected_prefix_is_loaded_as_what_it_comes_to(tmp_path: Path) -> None:
    """peft's reparameterisation is gone once the adapter is saved."""
    hf = saved(tmp_path / "hf", "llama")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=7
    )
    adapted = peft.get_peft_model(hf, config).eval()
    with torch.no_grad():
        for value in adapted.prompt_encoder.parameters():
            value.copy_(torch.randn_like(value))
    adapted.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "hf")})
    )
    loaded = load_model(resolve(str(tmp_path / "a")), make_mesh(MeshConfig(), jax.devices()[:1]))
    close(ours(loaded), theirs(adapted))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_leaves_peft_loads(tmp_path: Path, kind: str) -> None:
    """The run's folder names its base and its kind; its logits are ours, and far from the base's."""
    write_model(tmp_path / "model")
    keys = [
        "max_steps=3",
        "batch_size=8",
        "learning_rate=1",
        "warmup_ratio=0",
        "dtype=f32",
        f"{kind}.length=5",
    ]
    config = load_config(config_for("sft"), overrides=keys)
    rows = write_rows(tmp_path / "rows.jsonl")
    out = train("sft", str(tmp_path / "model"), rows, tmp_path / "out", config).result
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    logits = theirs(adapted)
    close(ours(load_model(resolve(str(tmp_path / "out")), make_mesh(MESH))), logits[:, -TOKENS.shape[1] :])
    plain = theirs(from_pretrained(tmp_path / "model"))
    assert np.abs(logits[:, -TOKENS.shape[1] :] - plain).max() > 0.05
