"""The reading of config.json and the tensor names that the Llama-like families have in common."""

from __future__ import annotations

import math
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.base import DecoderConfig, NameRule
from jaxalign.models.layers import ACTIVATIONS
from jaxalign.models.rope import Rope


def read_config(raw: dict[str, Any], **family: Any) -> DecoderConfig:
    """A `DecoderConfig` from the dict of config.json, in the form of any transformers release.

    transformers' own config class fills in defaults and turns old keys (`rope_theta`, `rope_scaling`) into
    new ones. `family` overrides fields of the result.
    """
    from transformers import AutoConfig

    try:
        hf = AutoConfig.for_model(**raw)
    except Exception as e:
        remedy = "compare it with the file that the model's publisher ships"
        raise UserError(f"transformers cannot read it: {e}", place="config.json", remedy=remedy) from e
    activation = getattr(hf, "hidden_act", None) or hf.hidden_activation
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"activation {activation!r}", place="config.json", remedy=f"known: {known}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    kinds, layer_kinds = _attention_kinds(hf, head_dim)
    fields: dict[str, Any] = {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim,
        "norm_eps": hf.rms_norm_eps,
        "activation": activation,
        "tied": bool(hf.tie_word_embeddings),
        "max_positions": hf.max_position_embeddings,
        "kinds": kinds,
        "layer_kinds": layer_kinds,
        "attention_scale": 1 / math.sqrt(head_dim),
        "qkv_bias": bool(getattr(hf, "attention_bias", False)),
        "out_bias": bool(getattr(hf, "attention_bias", False)),
        "mlp_bias": bool(getattr(hf, "mlp_bias", False)),
    }
    return DecoderConfig(**(fields | family))


def gemma_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What gemma 2 and 3 share: scaled embeddings, a query scale of their own, norms on both sides, caps."""
    return {
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": math.sqrt(raw["hidden_size"]),
        "post_norms": True,
        "norm_offset": 1.0,
        "tied": raw.get("tie_word_embeddings", True),
    }


def _attention_kinds(hf: Any, head_dim: int) -> tuple[tuple[tuple[Rope, int], ...], tuple[int, ...]]:
    """The distinct (rope, window) pairs of a transformers config, and which one each layer is."""
    window = getattr(hf, "sliding_window", None) or 0
    default = "sliding_attention" if window and hf.model_type == "mistral" else "full_attention"
    types = getattr(hf, "layer_types", None) or [default] * hf.num_hidden_layers
    distinct = list(dict.fromkeys(types))

    def kind(name: str) -> tuple[Rope, int]:
        parameters = hf.rope_parameters
        parameters = parameters.get(name, parameters)
        rope = Rope.from_hf(parameters, head_dim, hf.max_position_embeddings)
        return rope, window if name == "sliding_attention" else 0

    return tuple(kind(name) for name in distinct), tuple(distinct.index(name) for name in types)


_LAYER = "model.layers.{layer}."


def read_names(config: DecoderConfig) -> list[NameRule]:
    """Names of embedding, attention, feed-forward and head, with the two norms of a Llama layer."""
    rules = [
        NameRule(("embed", "embedding"), "model.embed_tokens.weight"),
        NameRule(("final_norm", "scale"), "model.norm.weight"),
        *linear_names("attn", "self_attn", ("q", "k", "v"), config.qkv_bias),
        *linear_names("attn", "self_attn", ("o",), config.out_bias),
        *linear_names("mlp", "mlp", ("gate", "up", "down"), config.mlp_bias),
        *norm_names({"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}),
    ]
    if config.qk_norm:
        rules += norm_names({"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"})
    if not config.tied:
        rules.append(NameRule(("head", "embedding"), "lm_head.weight"))
    return rules


def linear_names(part: str, hf_part: str, names: tuple[str, ...], bias: bool) -> list[NameRule]:
    """Kernels (and biases) of `part`, called `<hf_part>.<name>_proj` there."""
    rules = []
    for name in names:
        hf = f"{_LAYER}{hf_part}.{name}_proj"
        rules.append(NameRule(("layers", part, name, "kernel"), f"{hf}.weight", transpose=True))
        if bias:
            rules.append(NameRule(("layers", part, name, "bias"), f"{hf}.bias"))
    return rules


def norm_names(table: dict[str, str]) -> list[NameRule]:
    """Norm scales of a layer: our dotted path -> their name."""
    return [
        NameRule(("layers", *path.split("."), "scale"), f"{_LAYER}{hf}.weight") for path, hf in table.items()
    ]


def gemma_names(config: DecoderConfig) -> list[NameRule]:
    """Gemma's four norms a layer take the place of Llama's two."""
    norms = norm_names(
        {
            "attn_norm": "input_layernorm",
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    )
    replaced = {rule.path for rule in norms}
    return [rule for rule in read_names(config) if rule.path not in replaced] + norms
