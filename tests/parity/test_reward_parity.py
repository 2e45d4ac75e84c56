"""A reward model that was trained here scores the same in transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from jaxalign.config import load_config
from jaxalign.models.load import Loaded, load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import make_mesh
from jaxalign.train.run import train
from jaxalign.train.score import rewards
from jaxalign.train.settings import config_for
from jaxalign.types import Batch
from tests.train.test_preference_run import KEYS, ROWS, write
from tests.train.tiny import write_model

# peft still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TOKENS = np.random.default_rng(0).integers(0, 250, (6, 12)).astype(np.int32)
LENGTHS = np.array([12, 7, 1, 9, 12, 3])


def ours(loaded: Loaded, width: int = 12) -> np.ndarray:
    """float32 [6]: scores of the rows of `TOKENS`, padded to `width`."""
    tokens = np.pad(TOKENS, ((0, 0), (0, width - 12)))[:, None]
    real = (np.arange(width) < LENGTHS[:, None])[:, None]
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    batch = Batch(np.where(real, tokens, 5), real, real.astype(np.int32), positions)
    score = jax.jit(lambda adapter, base, head, batch: rewards(loaded.model, adapter, base, head, batch))
    return np.asarray(score(loaded.adapter, loaded.base, loaded.head, batch))[:, 0]


def theirs(model: torch.nn.Module) -> np.ndarray:
    """The same by transformers, each row alone and without padding."""
    with torch.no_grad():
        rows = [torch.tensor(t[None, :n]) for t, n in zip(TOKENS, LENGTHS, strict=True)]
        return np.array([float(model.eval()(row).logits[0, 0]) for row in rows])


@pytest.mark.parametrize("key", ["lora.rank=16", "lora=null", "prefix.length=4", "prompt.length=4"])
def test_scores_are_those_of_transformers(tmp_path: Path, key: str) -> None:
    write_model(tmp_path / "model")
    config = load_config(config_for("reward"), overrides=[*KEYS, key])
    data = write(tmp_path / "pairs.jsonl", ROWS["pairs"])
    result = train("reward", str(tmp_path / "model"), data, tmp_path / "out", config).result
    mine = ours(load_model(resolve(str(tmp_path / "out")), make_mesh()))
    assert np.ptp(mine) > 0.01
    if config.adapter is None:
        other = AutoModelForSequenceClassification.from_pretrained(result, dtype=torch.float32)
    else:
        base = tmp_path / "model"
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        other = PeftModel.from_pretrained(plain, result)
    np.testing.assert_allclose(mine, theirs(other), atol=1e-5)
    padded = ours(load_model(resolve(str(tmp_path / "out")), make_mesh()), 40)
    np.testing.assert_allclose(padded, mine, atol=1e-5)
