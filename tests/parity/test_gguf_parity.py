"""A GGUF file gives the same logits here and in transformers, and as the model it was converted from."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
pytest.importorskip("accelerate", reason="transformers reads GGUF through accelerate, which is not installed")

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from tests.models.gguf_write import KIND, write_gguf
from tests.parity.hf import logits, torch_model

pytestmark = pytest.mark.parity
TOKENS = np.random.default_rng(0).integers(3, 96, (4, 11))
# Rows of K-quants are whole blocks of 256.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


# transformers takes the head size and the attention scale of a gemma from its defaults.
GEMMA = {"head_dim": 256, "sliding_window": 6, "tie_word_embeddings": True}
CASES = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 128}, {}),
    "gemma2": ("gemma2", GEMMA, {"attention.sliding_window": 6}),
    "gemma3": ("gemma3_text", GEMMA, {"attention.sliding_window": 6}),
}
# What transformers does not read from a GGUF file is compared with the model that the file was made from.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
ORIGINALS = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("mistral", {"sliding_window": 5}, {"attention.sliding_window": 5}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
    ),
    "yarn": (
        "llama",
        {"rope_parameters": YARN},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 1024}, {}),
    "gemma2-caps": (
        "gemma2",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "sliding_window": 4,
        },
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "attention.sliding_window": 4},
    ),
    "gemma3-27b": (
        "gemma3_text",
        {
            "num_hidden_layers": 62,
            "hidden_size": 32,
            "intermediate_size": 32,
            "head_dim": 16,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"attention.sliding_window": 4, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
}


def state_of(hf) -> dict[str, np.ndarray]:
    tied = hf.config.tie_word_embeddings
    return {k: v.numpy() for k, v in hf.state_dict().items() if not (tied and k == "lm_head.weight")}


def write(path, hf, **keys):
    config = hf.config.to_dict()
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return write_gguf(path, state_of(hf), config, **keys)


def ours(path, tokens=TOKENS) -> np.ndarray:
    loaded = load_model(resolve(str(path)), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    return logits(loaded.model, loaded.base, tokens)


def theirs(hf, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.as_tensor(tokens)).logits.numpy()


def from_gguf(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("kind", KINDS + K_KINDS)
def test_every_type_as_transformers_reads_it(tmp_path, kind):
    hf = torch_model("llama", **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    path = write(tmp_path / "m.gguf", hf, kind=KIND[kind], extra={"rope.freq_base": 500.0})
    want = theirs(from_gguf(path))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(ours(path), want, atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_as_transformers_reads_it(tmp_path, case):
    model_type, keys, extra = CASES[case]
    hf = torch_model(model_type, **(SIZES | keys))
    theta = 1e6 if model_type == "gemma3_text" else 10000.0
    path = write(tmp_path / "m.gguf", hf, kind=KIND.Q8_0, extra=extra | {"rope.freq_base": theta})
    want = theirs(from_gguf(path))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(ours(path), want, atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("case", ORIGINALS)
def test_settings_as_the_original_model_has_them(tmp_path, case):
    model_type, keys, extra = ORIGINALS[case]
    hf = torch_model(model_type, **(SIZES | keys))
    tables = {"rope_freqs.weight": llama3_factors(64)} if case == "llama3" else {}
    path = write(tmp_path / "m.gguf", hf, extra=extra, tables=tables)
    want = theirs(hf)
    np.testing.assert_allclose(ours(path), want, atol=1e-4 * max(1, np.abs(want).max()))
    if extra or tables:  # the settings are seen at all: without them the logits are other ones
        plain = write(tmp_path / "plain.gguf", hf)
        assert np.abs(ours(plain) - want).max() > 1e-3


def llama3_factors(head_dim: int) -> np.ndarray:
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py."""
    out = []
    for frequency in 1 / LLAMA3["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim):
        wave, context = 2 * np.pi / frequency, LLAMA3["original_max_position_embeddings"]
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        if wave < context / high:
            out.append(1.0)
        elif wave > context / low:
            out.append(LLAMA3["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
    return np.array(out)


@pytest.mark.real_model
def test_the_built_in_model_as_transformers_reads_it():
    from transformers import AutoTokenizer

    source = resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name)
    ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"]
    loaded = load_model(source, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    got = logits(loaded.model, loaded.base, ids)
    np.testing.assert_allclose(got, theirs(from_gguf(source.gguf), ids), atol=1e-3)
    assert tokenizer.decode(int(got[0, -1].argmax())) == " Paris"
    assert loaded.stop_tokens == (2,)
