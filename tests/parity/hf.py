"""Tiny random transformers models, and their weights as the trees of this project."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxalign.models.decoder import Model
from jaxalign.registry import FAMILIES

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def torch_model(model_type: str, seed: int = 0, **keys):
    """A random model with `keys` over SIZES; weights large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SIZES | keys))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    return model


def to_tree(hf) -> tuple[Model, dict]:
    """The same model here: its `Model` and base tree."""
    family = FAMILIES[hf.config.model_type]
    config = family.from_hf(hf.config.to_dict())
    state = {k: v.detach().numpy() for k, v in hf.state_dict().items()}
    base: dict = {}
    for rule in family.names(config):
        many = "{layer}" in rule.hf
        names = [rule.hf.format(layer=i) for i in range(config.num_layers)] if many else [rule.hf]
        arrays = [state[n].T if rule.transpose else state[n] for n in names]
        node = base
        for part in rule.path[:-1]:
            node = node.setdefault(part, {})
        node[rule.path[-1]] = jnp.asarray(np.stack(arrays) if many else arrays[0])
    return Model(config), base


def logits(model: Model, base: dict, tokens, segments=None, positions=None, adapter=None):
    """Dense float32 logits [N, T, V]."""
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(adapter, base, tokens, segments, jnp.asarray(positions, jnp.int32))
    z = jnp.dot(hidden, model.unembed(base).T, precision="highest")
    cap = model.config.final_softcap
    return np.asarray(cap * jnp.tanh(z / cap) if cap else z)
