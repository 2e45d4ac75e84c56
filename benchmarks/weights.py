"""Weight files written with numpy alone: a random model of a given shape, and the shared LoRA adapter.

Everybody reads the same adapter, so not only the first loss (B = 0 makes that equal for any A) but the whole
loss curve can be compared. Where a loss compares with the model without its adapter, B is not 0: the first
loss would be a constant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flops import SHAPES, Shape, shape

PEFT = "base_model.model."
NORMS = ("input_layernorm", "post_attention_layernorm")
ITEM = {"F32": 4, "BF16": 2}


def tensors(s: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    found = {"model.embed_tokens.weight": (s.vocabulary, s.width), "model.norm.weight": (s.width,)}
    if not s.tied:
        found["lm_head.weight"] = (s.vocabulary, s.width)
    for i in range(s.layers):
        layer = f"model.layers.{i}."
        linears = linear_shapes(s.width, s.inner, q, kv)
        found |= {f"{layer}{name}.weight": size for name, size in linears.items()}
        found |= {f"{layer}{norm}.weight": (s.width,) for norm in NORMS}
    return found


def linear_shapes(width: int, inner: int, q: int, kv: int) -> dict[str, tuple[int, int]]:
    """The seven linears of a layer as HF stores them, [out, in]."""
    attention = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def write_safetensors(
    path: Path, sizes: Mapping[str, tuple[int, ...]], dtype: str, data: Iterator[bytes]
) -> None:
    """A safetensors file of tensors of one dtype; `data` yields their bytes in the order of `sizes`."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in sizes.items():
        end = at + ITEM[dtype] * int(np.prod(size))
        head[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in data:
            file.write(chunk)


def random_model(folder: Path, name: str, seed: int = 0) -> None:
    """Writes `config.json` and bfloat16 weights N(0, 0.02) of `SHAPES[name]`, norms one.

    Every tensor is cut out of one block of draws at its own offset: eight thousand million independent draws
    would take minutes and train no differently.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]
    sizes = tensors(shape(config))
    block = np.random.default_rng(seed).standard_normal(1 << 24, np.float32) * 0.02
    bits = (block.view(np.uint32) >> 16).astype(np.uint16)
    one = np.frombuffer(np.float32(1).tobytes()[2:], np.uint16)[0]
    rng = np.random.default_rng(seed + 1)

    def data() -> Iterator[bytes]:
        for size in sizes.values():
            left = int(np.prod(size))
            if len(size) == 1:
                yield np.full(size, one, np.uint16).tobytes()
                continue
            start = int(rng.integers(len(bits)))
            while left:
                part = bits[start : start + left]
                yield part.tobytes()
                left, start = left - len(part), 0

    write_safetensors(folder / "model.safetensors", sizes, "BF16", data())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}, indent=1))


def adapter(folder: Path, model: Path, rank: int, alpha: float, start: float = 0.0, seed: int = 0) -> None:
    """Writes a PEFT LoRA adapter on all seven linears of `model`: A Kaiming-uniform as in peft, B uniform on
    +-`start`."""
    folder.mkdir(parents=True, exist_ok=True)
    s = shape(json.loads((model / "config.json").read_text()))
    linears = linear_shapes(s.width, s.inner, s.heads * s.head_dim, s.kv_heads * s.head_dim)
    sizes: dict[str, tuple[int, ...]] = {}
    for i in range(s.layers):
        for name, (out, width) in linears.items():
            stem = f"{PEFT}model.layers.{i}.{name}."
            sizes |= {f"{stem}lora_A.weight": (rank, width), f"{stem}lora_B.weight": (out, rank)}
    rng = np.random.default_rng(seed)

    def data() -> Iterator[bytes]:
        for name, size in sizes.items():
            bound = 1 / np.sqrt(size[1]) if "lora_A" in name else start
            yield (rng.uniform(-1, 1, size) * bound).astype(np.float32).tobytes()

    write_safetensors(folder / "adapter_model.safetensors", sizes, "F32", data())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": [name.split(".")[1] for name in linears],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
