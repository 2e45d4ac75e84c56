"""Folders of tiny random models in Hugging Face's form, written with the safetensors library."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.models.decoder import Model
from jaxalign.registry import FAMILIES
from jaxalign.sharding import MeshConfig, make_mesh
from tests.tiny import quick_jit

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def mesh(**sizes: int):
    """A mesh of these sizes over as many of the devices as it needs."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    count = int(np.prod(list(sizes.values())))
    return make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def tiny(**keys: Any) -> tuple[dict[str, Any], Model, dict]:
    """(config.json, model, base parameters) of a random model with `keys` over CONFIG."""
    config = CONFIG | keys
    model = Model(FAMILIES[config["model_type"]].from_hf(deepcopy(config)))

    def base() -> dict:
        leaves, tree = jax.tree.flatten(model.init(jax.random.key(7))[1])
        # Norms and biases start as constants; random ones show a mix-up.
        keys = jax.random.split(jax.random.key(8), len(leaves))
        leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    return config, model, quick_jit(base)()


def state_dict(model: Model, base: dict, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The parameters under transformers' names, [out, in]."""
    state = {}
    for rule in FAMILIES[model.config.model_type].names(model.config):
        array = base
        for name in rule.path:
            array = array[name]
        array = np.asarray(array)
        stacked = "{layer}" in rule.hf
        for i in range(model.config.num_layers) if stacked else [0]:
            value = array[i] if stacked else array
            state[rule.hf.format(layer=i)] = np.ascontiguousarray(
                value.T if rule.transpose else value
            ).astype(dtype)
    return state


def write_folder(folder: Path, config: dict[str, Any], state: dict[str, np.ndarray], files: int = 1) -> Path:
    """config.json and one or many safetensors files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(state.items())[i::files])
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
