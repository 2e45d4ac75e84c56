"""A tiny random Llama with a byte tokenizer, as a folder on the disk, and rows for it to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.models.base import NameRule
from jaxalign.models.decoder import Model
from jaxalign.registry import FAMILIES

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """One token per byte, ChatML turns. Returns the number of ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    hf.chat_template = CHATML
    hf.save_pretrained(str(folder))
    return backend.get_vocab_size()


def write_model(folder: Path, seed: int = 0, sharpness: float = 1.0) -> Path:
    """A two-layer Llama of width 32 with random weights, as transformers would save it. Embeddings times
    `sharpness`: with more of it an adapter can make one token much likelier than another."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": -(-write_tokenizer(folder) // 8) * 8,
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    family = FAMILIES["llama"]
    decoder = family.from_hf(config)
    params = Model(decoder).init(jax.random.key(seed))[1]
    tensors: dict[str, np.ndarray] = {}
    for rule in family.names(decoder):
        tensors |= _tensors(rule, params)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name] * np.float32(sharpness)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(rule: NameRule, params: Any) -> dict[str, np.ndarray]:
    value = params
    for name in rule.path:
        value = value[name]
    array = np.asarray(value)
    layers = array if "{layer}" in rule.hf else array[None]
    turned = [np.ascontiguousarray(a.T if rule.transpose else a) for a in layers]
    return {rule.hf.format(layer=i): a for i, a in enumerate(turned)}


def write_rows(file: Path, count: int = 20) -> Path:
    """Chats of several lengths: bucketed rows, some steps longer than others."""
    rows = []
    for i in range(count):
        question, answer = f"what is {i} plus {i}?", f"{2 * i}" + " and so on" * (i % 5)
        rows.append({"id": f"r{i}", "messages": [_turn("user", question), _turn("assistant", answer)]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
