"""Weights out: what is written loads again bit for bit, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxalign.errors import UserError
from jaxalign.models import write as writing
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.export import export_hf, export_peft
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from tests.models.gguf_write import KIND, write_gguf
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder
from tests.rig import random_tree

MESHES = [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def source_folder(tmp_path, **keys):
    config, model, base = tiny(**keys)
    folder = write_folder(tmp_path / "source", config, state_dict(model, base))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def loaded_with_adapter(tmp_path, sizes=None, **keys):
    source = resolve(str(source_folder(tmp_path)))
    lora = LoraConfig(**({"rank": 4, "alpha": 8.0, "targets": ("q", "o", "up")} | keys))
    got = load_model(source, mesh(**(sizes or {})), adapter=lora)
    return got, jax.tree.map(jnp.asarray, random_tree(got.model.shapes()[0], 1))


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


class Saver:
    """Stands in for a tokenizer."""

    def save_pretrained(self, folder: str) -> None:
        with open(f"{folder}/tokenizer.json", "w") as stream:
            stream.write("saved")


# --- a whole model


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_goes_out_and_comes_back(tmp_path, sizes, tied):
    source = resolve(str(source_folder(tmp_path, tie_word_embeddings=tied)))
    got = load_model(source, mesh(**sizes))
    out = export_hf(got.model, got.base, source, tmp_path / "out", stop_tokens=(2, 7))
    again = load_model(resolve(str(out)), mesh())
    assert_same(again.base, got.base)
    names = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in names) != tied
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["dtype"] == "float32"
    assert config["hidden_size"] == 32
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert again.stop_tokens == (2, 7)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_shards_with_an_index_and_another_dtype(tmp_path):
    source = resolve(str(source_folder(tmp_path)))
    got = load_model(source, mesh(fsdp=4))
    limit = 20_000
    out = export_hf(got.model, got.base, source, tmp_path / "out", dtype=jnp.bfloat16, max_shard_bytes=limit)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    seen = {}
    for file in files:
        assert file.stat().st_size < limit + 4096
        with safe_open(file, "numpy") as stream:
            assert stream.metadata() == {"format": "pt"}
            seen |= dict.fromkeys(stream.keys(), file.name)
    assert seen == index["weight_map"]
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(got.base))
    again = load_model(resolve(str(out)), mesh(), param_dtype=jnp.bfloat16)
    assert_same(again.base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), got.base))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_CHUNK", 100)
    source = resolve(str(source_folder(tmp_path)))
    got = load_model(source, mesh(fsdp=2, tensor=2))
    out = export_hf(got.model, got.base, source, tmp_path / "out")
    want = load_file(source.folder / "model.safetensors")
    have = load_file(out / "model.safetensors")
    assert set(have) == set(want)
    for name, values in want.items():
        np.testing.assert_array_equal(have[name], values)


def test_a_gguf_goes_out_as_a_folder(tmp_path):
    config, model, base = tiny()
    path = write_gguf(tmp_path / "m.gguf", state_dict(model, base), config, KIND.F32)
    source = resolve(str(path))
    got = load_model(source, mesh())
    with pytest.raises(ValueError, match="pass tokenizer"):
        export_hf(got.model, got.base, source, tmp_path / "out")
    out = export_hf(got.model, got.base, source, tmp_path / "out", stop_tokens=(2,), tokenizer=Saver())
    again = load_model(resolve(str(out)), mesh())
    assert_same(again.base, base)
    assert again.model.config == got.model.config
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert (out / "tokenizer.json").read_text() == "saved"


def test_the_language_model_of_a_multimodal_one_stands_alone(tmp_path):
    text, model, base = tiny(
        model_type="gemma3_text", tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"
    )
    state = {f"model.language_{k}": v for k, v in state_dict(model, base).items()}
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
    }
    source = resolve(str(write_folder(tmp_path / "m", config, state)))
    got = load_model(source, mesh())
    out = export_hf(got.model, got.base, source, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert written["model_type"] == "gemma3_text"
    assert_same(load_model(resolve(str(out)), mesh()).base, base)


def test_settings_of_generation_are_kept(tmp_path):
    folder = source_folder(tmp_path)
    settings = {"temperature": 0.6, "eos_token_id": [2], "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    source = resolve(str(folder))
    got = load_model(source, mesh())
    out = export_hf(got.model, got.base, source, tmp_path / "out", stop_tokens=(9,))
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 9}


# --- an adapter


@pytest.mark.parametrize("sizes", MESHES)
def test_an_adapter_goes_out_and_comes_back(tmp_path, sizes):
    got, adapter = loaded_with_adapter(tmp_path, sizes, rslora=True, dropout=0.1)
    out = tmp_path / "run" / "adapter"
    export_peft(got.model, adapter, got.source, out, stop_tokens=(2, 5), base_hash=got.base_hash)
    again = load_model(resolve(str(tmp_path / "run")), mesh(fsdp=2))
    assert_same(again.adapter, adapter)
    assert_same(again.base, got.base)
    assert again.model.adapter == got.model.adapter
    assert again.stop_tokens == (2, 5)
    assert again.source.adapter == out


def test_an_adapter_in_pefts_form(tmp_path):
    got, adapter = loaded_with_adapter(tmp_path)
    out = export_peft(got.model, adapter, got.source, tmp_path / "a", base_hash="ab" * 32)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "source"),
        "revision": None,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["o_proj", "q_proj", "up_proj"],
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    assert isinstance(config["lora_alpha"], int)
    with safe_open(out / "adapter_model.safetensors", "numpy") as stream:
        assert stream.metadata() == {"format": "pt", "jaxalign.base_hash": "ab" * 32}
        keys = list(stream.keys())
        assert len(keys) == 3 * 3 * 2
        a = stream.get_tensor("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")
        b = stream.get_tensor("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    up = adapter["layers"]["mlp"]["up"]["adapter"]
    np.testing.assert_array_equal(a, up["a"][1].T)
    np.testing.assert_array_equal(b, up["b"][1].T)
    with pytest.raises(UserError, match="trained on another base"):
        load_model(resolve(str(out)), mesh())


@pytest.mark.parametrize(
    ("name", "base", "revision"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct", None),
        ("org/name", "org/name", None),
        ("org/name@abc", "org/name", "abc"),
    ],
)
def test_the_base_is_named_so_that_others_find_it(tmp_path, name, base, revision):
    got, adapter = loaded_with_adapter(tmp_path)
    out = export_peft(got.model, adapter, replace(got.source, name=name), tmp_path / "a")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)


def test_a_trained_adapter_names_its_first_base_still(tmp_path):
    got, adapter = loaded_with_adapter(tmp_path)
    export_peft(got.model, adapter, got.source, tmp_path / "one" / "adapter", base_hash=got.base_hash)
    second = load_model(resolve(str(tmp_path / "one")), mesh())
    out = export_peft(second.model, second.adapter, second.source, tmp_path / "two" / "adapter")
    assert_same(load_model(resolve(str(out.parent)), mesh()).adapter, adapter)


# --- nothing is lost


def test_an_earlier_export_is_replaced_whole(tmp_path):
    got, adapter = loaded_with_adapter(tmp_path)
    out = tmp_path / "a"
    export_peft(got.model, adapter, got.source, out, stop_tokens=(2,))
    twice = jax.tree.map(lambda x: 2 * x, adapter)
    export_peft(got.model, twice, got.source, out)
    assert_same(load_model(resolve(str(out)), mesh()).adapter, twice)
    assert not (out / "generation_config.json").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    got, adapter = loaded_with_adapter(tmp_path)
    out = tmp_path / "a"
    out.mkdir()
    (out / "thesis.md").write_text("years of work")
    for _ in range(2):
        with pytest.raises(UserError, match=r"would overwrite.*thesis\.md"):
            export_peft(got.model, adapter, got.source, out)
        (out / "config.json").write_text("{}")
    assert (out / "thesis.md").read_text() == "years of work"
    with pytest.raises(UserError, match="would overwrite the model"):
        export_hf(got.model, got.base, got.source, got.source.folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch, code):
    got, adapter = loaded_with_adapter(tmp_path)
    out = export_peft(got.model, adapter, got.source, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fsync(handle):
        raise OSError(code, "no")

    monkeypatch.setattr(writing.os, "fsync", fsync)
    with pytest.raises(UserError, match="disk is full" if code == errno.ENOSPC else "cannot be written"):
        export_peft(got.model, jax.tree.map(lambda x: 2 * x, adapter), got.source, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_disk_that_alters_bytes_is_noticed(tmp_path, monkeypatch):
    got, adapter = loaded_with_adapter(tmp_path)
    honest = writing._bytes

    def altered(item, values):
        raw = bytearray(honest(item, values))
        if item.name.endswith("layers.2.self_attn.o_proj.lora_B.weight"):
            raw[-1] ^= 1
        return bytes(raw)

    monkeypatch.setattr(writing, "_bytes", altered)
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.o_proj\.lora_B\.weight' was not written"):
        export_peft(got.model, adapter, got.source, tmp_path / "a")
    assert not (tmp_path / "a").exists()
