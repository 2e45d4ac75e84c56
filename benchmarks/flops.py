"""Model FLOPs and bytes from a model's shape, so that MFU and bandwidth shares mean the same for everybody.

N counts the parameters of matrix products, the head included and the embedding look-up not. `a` is the causal
attention of one token's forward pass, halved for causality: 2 T L H hd. Recomputed activations are not useful
work: MFU counts the row without rematerialisation whatever a contender does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASHEET = {"NVIDIA H200": {"flops": 989e12, "bandwidth": 4.8e12}}  # dense bf16, HBM3e

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES: dict[str, dict[str, Any]] = {
    # The shapes of Llama-3.2-1B and Llama-3-8B; "tiny" is for trying the scripts out.
    "1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA
    | {
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs of a decoder: D, F, L, H, K, hd, V and whether embedding and head are one."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def matmul(self) -> int:
        """N: parameters in matrix products."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocabulary * self.width

    @property
    def stored(self) -> int:
        """Parameters held in memory, norms left out."""
        return self.matmul + (0 if self.tied else self.vocabulary * self.width)

    def attention(self, context: float) -> float:
        """a: causal attention FLOPs of one token's forward pass at a context of `context` tokens."""
        return 2 * context * self.layers * self.heads * self.head_dim

    def lora_train(self, context: float) -> float:
        """FLOPs a token of LoRA training needs: 4N + 3a (no gradients of frozen weights)."""
        return 4 * self.matmul + 3 * self.attention(context)

    def forward(self, context: float) -> float:
        """FLOPs a token of scoring needs, without gradients: 2N + a."""
        return 2 * self.matmul + self.attention(context)

    def decode_bytes(self, batch: int, context: float, item: int) -> float:
        """Bytes one decode step must read: the weights once, each sequence's live keys and values."""
        kv = 2 * self.layers * self.kv_heads * self.head_dim * context * batch
        return item * (self.matmul + kv)


def shape(config: Mapping[str, Any]) -> Shape:
    """The shape in a `config.json`."""
    heads = config["num_attention_heads"]
    return Shape(
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def read(folder: str | Path) -> Shape:
    """The shape of the model in `folder`."""
    return shape(json.loads((Path(folder) / "config.json").read_text()))


def datasheet(accelerator: str) -> dict[str, float]:
    """Peak figures of the vendor's datasheet for an `nvidia-smi` name; empty where none is known."""
    return next((v for k, v in DATASHEET.items() if accelerator.startswith(k)), {})
