"""PEFT adapters are imported as they are, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.hashing import content_hash
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def load(folder: Path, **keys):
    return load_model(resolve(str(folder)), keys.pop("on", None) or mesh(), **keys)


def write_adapter(folder: Path, base_folder: Path, metadata=None, **keys) -> dict[str, np.ndarray]:
    """A PEFT adapter over q and down of every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    sizes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (64, 32)}
    state = {}
    for i in range(3):
        for module, (wide, out) in sizes.items():
            name = f"base_model.model.model.layers.{i}.{module}"
            state[f"{name}.lora_A.weight"] = rng.normal(size=(4, wide)).astype(np.float32)
            state[f"{name}.lora_B.weight"] = rng.normal(size=(out, 4)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base_folder),
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "bias": "none",
        "use_rslora": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"} | (metadata or {}))
    return state


@pytest.fixture
def base_folder(tmp_path):
    config, model, base = tiny()
    return write_folder(tmp_path / "base", config, state_dict(model, base))


def test_an_adapter_is_imported(tmp_path, base_folder):
    state = write_adapter(tmp_path / "run" / "adapter", base_folder)
    got = load(tmp_path / "run", on=mesh(fsdp=2, tensor=2))
    assert got.model.adapter == LoraConfig(rank=4, alpha=6, dropout=0.05, targets=("q", "down"), rslora=True)
    down = got.adapter["layers"]["mlp"]["down"]["adapter"]
    assert down["a"].shape == (3, 64, 4)
    assert down["a"].sharding.shard_shape(down["a"].shape) == (3, 32, 4)
    for i in range(3):
        name = f"base_model.model.model.layers.{i}.mlp.down_proj"
        np.testing.assert_array_equal(down["a"][i].T, state[f"{name}.lora_A.weight"])
        np.testing.assert_array_equal(down["b"][i].T, state[f"{name}.lora_B.weight"])
    assert set(got.adapter["layers"]["attn"]) == {"q"}
    assert got.source.adapter == tmp_path / "run" / "adapter"


def test_an_adapter_may_be_asked_for_as_it_is(tmp_path, base_folder):
    write_adapter(tmp_path / "a", base_folder)
    asked = LoraConfig(rank=4, alpha=6, targets=("down", "q"), rslora=True, dropout=0.3)
    assert load(tmp_path / "a", adapter=asked).model.adapter.dropout == 0.3
    with pytest.raises(UserError, match="rank 4, the run asks for 8"):
        load(tmp_path / "a", adapter=asked.model_copy(update={"rank": 8}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"use_qalora": True}, "use_qalora True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 5}, "lora_A.weight' has shape"),
        ({"r": None}, "cannot be understood"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path, base_folder, keys, words):
    write_adapter(tmp_path / "a", base_folder, **keys)
    with pytest.raises(UserError) as error:
        load(tmp_path / "a")
    assert words in str(error.value)


def test_an_adapter_of_another_base_is_refused(tmp_path, base_folder):
    right = content_hash([base_folder / "model.safetensors"])
    write_adapter(tmp_path / "a", base_folder, {"jaxalign.base_hash": right})
    assert load(tmp_path / "a").base_hash == right
    write_adapter(tmp_path / "a", base_folder, {"jaxalign.base_hash": "0" * 64})
    with pytest.raises(UserError, match="trained on another base"):
        load(tmp_path / "a")


def test_an_adapter_that_lacks_a_layer_is_refused(tmp_path, base_folder):
    state = write_adapter(tmp_path / "a", base_folder)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    state.pop(name)
    save_file(state, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"missing tensor 'model\.layers\.1\.mlp\.down_proj\.lora_B"):
        load(tmp_path / "a")
