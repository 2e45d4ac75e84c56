"""Weights in: every slice in its place, on any mesh; bad files are named; memory is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.load import load_model, load_tree, open_checkpoint
from jaxalign.models.source import resolve
from jaxalign.registry import FAMILIES
from tests.models.hf_folder import CONFIG, mesh, state_dict, tiny, write_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def load(folder: Path, **keys):
    return load_model(resolve(str(folder)), keys.pop("on", None) or mesh(), **keys)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2}])
def test_every_value_in_its_place(tmp_path, files, sizes):
    config, model, base = tiny(attention_bias=True, mlp_bias=True)
    folder = write_folder(tmp_path / "m", config, state_dict(model, base), files)
    got = load(folder, on=mesh(**sizes))
    assert_same(got.base, base)
    for leaf, axes in zip(jax.tree.leaves(got.base), jax.tree.leaves(got.model.axes()[1]), strict=False):
        assert leaf.sharding.mesh.shape == mesh(**sizes).shape, axes
    kernel = got.base["layers"]["attn"]["q"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (3, 32 // sizes.get("fsdp", 1), 32 // sizes.get("tensor", 1))
    assert got.adapter is None
    assert got.model.adapter is None


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_every_family(tmp_path, family):
    extra = {"hidden_activation": "gelu_pytorch_tanh"} if family.startswith("gemma") else {}
    config, model, base = tiny(model_type=family, tie_word_embeddings=True, **extra)
    folder = write_folder(tmp_path / "m", config, state_dict(model, base))
    assert_same(load(folder).base, base)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes(tmp_path, stored, wanted):
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base, stored))
    got = load(folder, on=mesh(fsdp=2), param_dtype=wanted)
    want = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(stored).astype(wanted)), base)
    assert all(x.dtype == wanted for x in jax.tree.leaves(got.base))
    assert_same(got.base, want)


def test_tied_embeddings_may_come_with_a_head(tmp_path):
    config, model, base = tiny(tie_word_embeddings=True)
    state = state_dict(model, base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    got = load(write_folder(tmp_path / "m", config, state))
    assert "head" not in got.base
    assert_same(got.base, base)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_one(tmp_path, prefix):
    text, model, base = tiny(
        model_type="gemma3_text", tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"
    )
    state = {prefix + k.removeprefix("model."): v for k, v in state_dict(model, base).items()}
    state["vision_tower.patch.weight"] = np.ones((3, 3), np.float32)
    text.pop("eos_token_id")
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [5, 6]}
    got = load(write_folder(tmp_path / "m", config, state))
    assert got.model.config.model_type == "gemma3_text"
    assert_same(got.base, base)
    assert got.stop_tokens == (5, 6)


def test_stop_tokens_are_the_union(tmp_path):
    config, model, base = tiny(eos_token_id=[2, 9])
    folder = write_folder(tmp_path / "m", config, state_dict(model, base))
    assert load(folder).stop_tokens == (2, 9)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load(folder).stop_tokens == (7, 2, 9)


def test_compute_dtype_and_adapter_reach_the_model(tmp_path):
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base))
    lora = LoraConfig(rank=4)
    got = load(folder, adapter=lora, compute_dtype=jnp.bfloat16)
    assert got.model.adapter == lora
    assert got.model.numerics.compute == jnp.bfloat16
    assert got.adapter is None


# --- bad input


def broken(tmp_path, change):
    config, model, base = tiny()
    state = state_dict(model, base)
    change(config, state)
    return write_folder(tmp_path / "m", config, state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, s: s.pop("model.layers.1.mlp.up_proj.weight"), ["missing", "layers.1.mlp.up_proj"]),
        (lambda c, s: s.pop("lm_head.weight"), ["missing", "lm_head.weight"]),
        (lambda c, s: s.update(extra=np.ones(3, np.float32)), ["unexpected", "'extra'"]),
        (
            lambda c, s: s.update({"model.norm.weight": np.ones(31, np.float32)}),
            ["model.norm.weight", "[31]", "[32]"],
        ),
        (
            lambda c, s: s.update({"lm_head.weight": np.ones((96, 32), np.int8)}),
            ["lm_head.weight", "I8", "not supported"],
        ),
        (lambda c, s: c.update(vocab_size=95), ["embed_tokens", "[96, 32]", "[95, 32]"]),
        (lambda c, s: c.update(num_hidden_layers=4), ["missing", "layers.3.", "and 6 more"]),
        (lambda c, s: c.update(quantization_config={"quant_method": "gptq"}), ["quantised (gptq)"]),
        (lambda c, s: c.update(model_type="lama"), ["'lama'", "did you mean 'llama'"]),
    ],
)
def test_a_mistake_in_the_files_is_named(tmp_path, change, words):
    folder = broken(tmp_path, change)
    with pytest.raises(UserError) as error:
        load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("left", [0, 5, 100, 0.4, 0.99])
def test_a_truncated_file_is_named_with_its_tensor(tmp_path, left):
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base), files=2)
    file = sorted(folder.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    with pytest.raises(UserError, match="truncated") as error:
        load(folder)
    assert file.name in str(error.value)
    if isinstance(left, float):
        assert any(f"'{name}'" in str(error.value) for name in load_names(whole))


def load_names(whole: bytes) -> list[str]:
    length = int.from_bytes(whole[:8], "little")
    return list(json.loads(whole[8 : 8 + length]))


def test_a_missing_shard_and_a_damaged_header_are_named(tmp_path):
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base), files=3)
    files = sorted(folder.glob("*.safetensors"))
    files[2].unlink()
    with pytest.raises(UserError, match="missing file") as error:
        resolve(str(folder))
    assert files[2].name in str(error.value)
    folder = write_folder(tmp_path / "n", config, state_dict(model, base))
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8:12] = b"????"
    file.write_bytes(raw)
    with pytest.raises(UserError, match="damaged header"):
        load(folder)


def test_a_mesh_that_does_not_divide_is_named(tmp_path):
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base))
    with pytest.raises(UserError, match="does not divide"):
        load(folder, on=mesh(tensor=7))


# --- memory

_LOADER = """
import sys
import jax
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
load_model(resolve(sys.argv[1]), mesh)  # imports, tracing and thread pools: not part of a model's size
print("ready", flush=True)
sys.stdin.readline()
loaded = load_model(resolve(sys.argv[2]), mesh, param_dtype=sys.argv[3])
print(sum(x.nbytes for x in jax.tree.leaves(loaded.base)), flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading(tmp_path, dtype):
    """Anonymous memory (what a process allocates; mapped file pages can be dropped at any time) grows by
    less than 1.3x of what stays. A tiny model is loaded first, so that only weights count. With data = 2
    every shard is held by two devices, which share it."""
    keys = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
    config = CONFIG | keys | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model_config = FAMILIES["llama"].from_hf(deepcopy(config))
    rng = np.random.default_rng(0)
    state = {}
    for rule in FAMILIES["llama"].names(model_config):
        shape = _shape(rule, model_config)
        for i in range(12) if "{layer}" in rule.hf else [0]:
            state[rule.hf.format(layer=i)] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    folder = write_folder(tmp_path / "m", config, state, files=4)
    small, model, base = tiny()
    first = write_folder(tmp_path / "small", small, state_dict(model, base))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        [sys.executable, "-c", _LOADER, str(first), str(folder), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    with child:
        assert child.stdout.readline() == "ready\n"
        before = _anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        peak, held = _watch(child, before)
        child.stdin.write("\n")
    total = sum(x.size for x in state.values()) * np.dtype(dtype).itemsize
    assert held == total > 130e6
    assert peak - before < 1.3 * total, f"{(peak - before) / total:.2f}x"


def _shape(rule, config):
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    by_name = {
        "embedding": (v, d),
        "scale": (d,),
        "head": (v, d),
        "gate": (f, d),
        "up": (f, d),
        "down": (d, f),
    }
    return by_name.get(rule.path[-1]) or by_name.get(rule.path[-2], (d, d))


def _anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def _watch(child, before: int) -> tuple[int, int]:
    """The highest anonymous memory until the child says how much it holds, and what it says."""
    os.set_blocking(child.stdout.fileno(), False)
    peak, line = before, ""
    while not line:
        peak = max(peak, _anonymous(child.pid))
        line = child.stdout.readline()
        time.sleep(0.002)
    return max(peak, _anonymous(child.pid)), int(line)


def test_only_the_slices_of_this_hosts_devices_are_read(tmp_path):
    """One of two halves of a mesh asks for one half of every sharded tensor."""
    config, model, base = tiny()
    folder = write_folder(tmp_path / "m", config, state_dict(model, base))
    store = open_checkpoint(resolve(str(folder))).store
    read: dict[str, int] = {}

    class Counting:
        names = store.names
        shape, place = staticmethod(store.shape), staticmethod(store.place)

        @staticmethod
        def read(name, index):
            values = store.read(name, index)
            read[name] = read.get(name, 0) + values.size
            return values

    from jaxalign.sharding import tree_shardings

    shapes, axes = model.shapes()[1], model.axes()[1]
    rules = FAMILIES["llama"].names(model.config)
    got = load_tree(Counting(), rules, shapes, tree_shardings(mesh(data=2, fsdp=4), axes, shapes), np.float32)
    assert_same(got, base)
    sizes = {k: v.size for k, v in load_file(folder / "model.safetensors").items()}
    assert read == sizes  # every number once, though two devices hold each
