"""GGUF files of tiny models, converted as llama.cpp's convert_hf_to_gguf.py does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

KIND = gguf.GGMLQuantizationType
# Bytes of a block, and where its float16 scales stand; `gguf` can unpack these types but not pack them.
_BLOCKS = {
    KIND.Q2_K: (84, (80, 82)),
    KIND.Q3_K: (110, (108,)),
    KIND.Q4_K: (144, (0, 2)),
    KIND.Q5_K: (176, (0, 2)),
    KIND.Q6_K: (210, (208,)),
}
_ARCH = {"mistral": "llama", "gemma3_text": "gemma3"}
_STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def random_blocks(kind: KIND, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Packed rows of a type that cannot be packed: random bytes with small, finite scales."""
    size, scales = _BLOCKS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // 256, size), dtype=np.uint8)
    for at in scales:
        values = rng.uniform(1e-4, 3e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def pack(values: np.ndarray, kind: KIND, seed: int = 0) -> np.ndarray:
    """`values` in a quantised type, or random blocks where `gguf` cannot pack it."""
    return random_blocks(kind, *values.shape, seed=seed) if kind in _BLOCKS else gguf.quantize(values, kind)


def gguf_name(name: str, gemma: bool) -> str:
    """Transformers' tensor name -> llama.cpp's."""
    stem, _, suffix = name.rpartition(".")
    parts = stem.split(".", 3)
    table = _STEMS | _GEMMA if gemma else _STEMS
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{table[parts[3]]}.{suffix}"
    return f"{table[stem]}.{suffix}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    path: Path,
    state: dict[str, np.ndarray],
    config: dict[str, Any],
    kind: KIND = KIND.F32,
    extra: dict[str, Any] | None = None,
    tables: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model: matrices in `kind`, vectors in F32. `extra` adds metadata, under `{arch}.`."""
    arch = _ARCH.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(str(path), arch)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for key, value in (extra or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}", value)
    for seed, (name, array) in enumerate(state.items()):
        values = array.astype(np.float32)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = interleave(values, heads if "q_proj" in name else kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        stored = gguf_name(name, arch.startswith("gemma"))
        if values.ndim == 1 or kind == KIND.F32:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, pack(values, kind, seed), raw_dtype=kind)
    for name, array in (tables or {}).items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
