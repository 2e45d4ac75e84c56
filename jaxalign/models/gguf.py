"""A GGUF file as a Hugging Face model: its metadata as a config.json, its tensors under transformers' names.

llama.cpp changes some tensors when it converts a model; reading undoes that: rows of q and k are interleaved
for its rotary layout (architecture `llama`), and gemma's norm scales are stored with 1 added. It also drops
some settings; what can be worked out again is: Llama 3's rope scaling from the table of frequency factors,
gemma's attention scale from the layer count, as llama.cpp itself does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.gguf_file import GGUFFile, open_gguf
from jaxalign.models.store import Index

Meta = Callable[..., Any]

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Tables that llama.cpp computes from the configuration; no checkpoint holds them.
_COMPUTED = ("rope_freqs.weight", "attn_rot_embd.weight")


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: its model class, tensor names, and what llama.cpp did to the tensors."""

    family: Callable[[GGUFFile, Meta], dict[str, Any]]
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


@dataclass(frozen=True)
class GGUFStore:
    """The tensors of a GGUF file under transformers' names, dequantised slice by slice."""

    file: GGUFFile
    to_gguf: Mapping[str, str]
    interleaved: Mapping[str, int]  # names whose rows llama.cpp interleaves -> head size
    norm_offset: float

    @property
    def names(self) -> Iterable[str]:
        """The name of every tensor."""
        return self.to_gguf.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; raises `KeyError` for an unknown name."""
        return self.file.tensors[self.to_gguf[name]].shape

    def place(self, name: str) -> str:
        """The file, for messages."""
        return str(self.file.path)

    def read(self, name: str, index: Index) -> np.ndarray:
        """One slice of a tensor, dequantised."""
        gguf_name, shape = self.to_gguf[name], self.shape(name)
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        rows: slice | np.ndarray = index[0]
        if name in self.interleaved:
            rows = _interleave(np.arange(shape[0])[rows], self.interleaved[name])
        if len(shape) == 1:
            values = self.file.rows(gguf_name, slice(0, 1), slice(0, shape[0]))[0][rows]
        else:
            values = self.file.rows(gguf_name, rows, index[1])
        if self.norm_offset and name.endswith("norm.weight"):
            values = values.astype(np.float32) - np.float32(self.norm_offset)
        return values


def _interleave(rows: np.ndarray, head: int) -> np.ndarray:
    """Where llama.cpp put row (h, half, i) of a q or k projection: at (h, i, half)."""
    inner = rows % head
    return rows - inner + inner % (head // 2) * 2 + inner // (head // 2)


def load_gguf(path: Path) -> tuple[dict[str, Any], GGUFStore]:
    """The config.json dict and the tensors of a GGUF file.

    Raises `UserError` for a damaged file and for an architecture or setting that is not supported.
    """
    file = open_gguf(path)
    name = file.metadata.get("general.architecture", "")
    split = file.metadata.get("split.count", 1) > 1
    if name not in ARCHITECTURES or split:
        what = "a model split into several GGUF files" if split else f"architecture {name!r}"
        raise UserError(
            f"{what} is not supported",
            place=str(path),
            remedy=f"supported: one file of {', '.join(ARCHITECTURES)} (merge parts with llama-gguf-split)",
        )
    arch = ARCHITECTURES[name]
    config = arch.family(file, _reader(file, name))
    names = dict(_names(file, arch))
    heads = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    interleaved = {n: config["head_dim"] for n in names if arch.interleaved and n.endswith(heads)}
    return config, GGUFStore(file, names, interleaved, arch.norm_offset)


def _names(file: GGUFFile, arch: Architecture) -> Iterable[tuple[str, str]]:
    """(transformers' name, GGUF name) pairs; a tensor nobody knows keeps its own name."""
    for name in file.tensors:
        stem, _, suffix = name.rpartition(".")
        parts = stem.split(".", 2)
        if stem in _ENDS:
            yield f"{_ENDS[stem]}.{suffix}", name
        elif len(parts) == 3 and parts[0] == "blk" and parts[2] in arch.layer:
            yield f"model.layers.{parts[1]}.{arch.layer[parts[2]]}.{suffix}", name
        elif not name.endswith(_COMPUTED):
            yield name, name


def _reader(file: GGUFFile, arch: str) -> Meta:
    """`meta(key, default)` of an architecture's own metadata; without a default a missing key is an error."""

    def meta(key: str, *default: Any) -> Any:
        value = file.metadata.get(f"{arch}.{key}", *default)
        if value is None and not default:
            raise UserError(
                f"the metadata has no {arch}.{key}",
                place=str(file.path),
                remedy="convert the model again with a current llama.cpp",
            )
        return value

    return meta


def _common(file: GGUFFile, meta: Meta, model_type: str, architecture: str, rope: Any) -> dict[str, Any]:
    """The part of config.json that every architecture shares. `rope` is its `rope_parameters`."""
    heads, width = meta("attention.head_count"), meta("embedding_length")
    varying = any(isinstance(meta(k, 0), tuple) for k in ("attention.head_count_kv", "feed_forward_length"))
    if meta("expert_count", 0) or varying:
        what = "layers of different sizes" if varying else "a mixture of experts"
        raise UserError(f"{what}: not supported", place=str(file.path), remedy="choose a dense model")
    embedding = file.tensors.get("token_embd.weight")
    token = lambda key: file.metadata.get(f"tokenizer.ggml.{key}_token_id")  # noqa: E731
    # An instruction model's turn may end with a token of its own beside the end of text.
    stops = [t for t in dict.fromkeys(map(token, ("eos", "eot", "eom"))) if t is not None]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0] if embedding else 0,  # the loader names the missing tensor
        "hidden_size": width,
        "intermediate_size": meta("feed_forward_length"),
        "num_hidden_layers": meta("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta("attention.head_count_kv", heads),
        "head_dim": meta("attention.key_length", meta("rope.dimension_count", width // heads)),
        "rms_norm_eps": meta("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta("context_length"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token("bos"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": token("padding"),
    }


def _rope(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    """The `rope_parameters` of the (global) attention layers."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": meta("rope.freq_base", 10000.0)}
    kind = meta("rope.scaling.type", "linear" if meta("rope.scale_linear", 0) else "none")
    factor = meta("rope.scaling.factor", meta("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn") or meta("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(
            f"rope scaling {kind!r} (attn_factor {meta('rope.scaling.attn_factor', 1.0)}) is not supported",
            place=str(file.path),
            remedy="supported: none, linear, yarn, and Llama 3's table of factors",
        )
    if "rope_freqs.weight" in file.tensors:
        return out | _llama3(file, out["rope_theta"], meta("context_length"))
    if kind == "linear":
        return out | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        optional = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
        betas = {key: meta(name, None) for key, name in optional.items()}
        original = meta("rope.scaling.original_context_length")
        out |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        out |= {key: value for key, value in betas.items() if value is not None}
    return out


def _llama3(file: GGUFFile, theta: float, context: int) -> dict[str, Any]:
    """Llama 3's rope scaling, found again from its table of factors, one per frequency.

    Raises `UserError` where no setting of it makes that table.
    """
    (size,) = file.tensors["rope_freqs.weight"].shape
    table = file.rows("rope_freqs.weight", slice(0, 1), slice(0, size))[0].astype(np.float64)
    factor = float(table.max())
    if factor == 1.0:
        return {}
    waves = 2 * math.pi * theta ** (np.arange(size) / size)
    for original in (8192, round(context / factor), *(2**n for n in range(6, 20))):
        smooth = np.clip((original / waves - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), table, rtol=1e-4):
            out = {
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            return {"rope_type": "llama3", "factor": factor} | out
    raise UserError(
        "the rope frequency factors are not those of a known scaling",
        place=f"{file.path}: rope_freqs.weight",
        remedy="use the model's safetensors, whose config.json names the scaling",
    )


def _llama(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp calls llama too."""
    window = meta("attention.sliding_window", None)
    kind = ("mistral", "MistralForCausalLM") if window else ("llama", "LlamaForCausalLM")
    out = _common(file, meta, *kind, _rope(file, meta)) | {"hidden_act": "silu"}
    if window:
        return out | {"sliding_window": window}
    return out | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _qwen2(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    out = _common(file, meta, "qwen2", "Qwen2ForCausalLM", _rope(file, meta))
    return out | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    out = _common(file, meta, "qwen3", "Qwen3ForCausalLM", _rope(file, meta))
    bias = "blk.0.attn_q.bias" in file.tensors
    return out | {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": bias}


def _gemma(out: dict[str, Any], meta: Meta, window: int, period: int, largest: int) -> dict[str, Any]:
    """What gemma 2 and 3 share: every `period`-th layer is global. `largest` counts the layers of the 27B
    model, the only one whose attention is not scaled by its head size."""
    layers, heads = out["num_hidden_layers"], out["num_attention_heads"]
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    return out | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": meta("attention.sliding_window", window),
        "layer_types": kinds,
        "query_pre_attn_scalar": out["hidden_size"] // heads if layers == largest else out["head_dim"],
        "attn_logit_softcapping": meta("attn_logit_softcapping", None),
        "final_logit_softcapping": meta("final_logit_softcapping", None),
    }


def _gemma2(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    out = _common(file, meta, "gemma2", "Gemma2ForCausalLM", _rope(file, meta))
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    got = _gemma(out, meta, 4096, 2, 46)
    return got | {key: value for key, value in caps.items() if got[key] is None}


def _gemma3(file: GGUFFile, meta: Meta) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": meta("rope.freq_base_swa", 10000.0)}
    rope = _rope(file, meta)
    if meta("rope.freq_base", None) is None:
        rope["rope_theta"] = 1e6
    out = _common(
        file,
        meta,
        "gemma3_text",
        "Gemma3ForCausalLM",
        {"full_attention": rope, "sliding_attention": local},
    )
    return _gemma(out, meta, 1024, meta("attention.sliding_window_pattern", 6), 62)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _LAYER, interleaved=True),
    "qwen2": Architecture(_qwen2, _LAYER),
    "qwen3": Architecture(_qwen3, _LAYER),
    "gemma2": Architecture(_gemma2, _GEMMA_LAYER, norm_offset=1.0),
    "gemma3": Architecture(_gemma3, _GEMMA_LAYER, norm_offset=1.0),
}
