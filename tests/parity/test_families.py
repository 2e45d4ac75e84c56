"""Logits of every family agree with transformers on random tiny models."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.parity.hf import logits, to_tree, torch_model

pytestmark = pytest.mark.parity
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
CASES = {
    "llama": ("llama", {}),
    "llama-head-size": ("llama", {"head_dim": 20}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 500.0}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama-yarn-exact": ("llama", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-short-window": ("mistral", {"sliding_window": 5}),
    "mistral-long-window": ("mistral", {"sliding_window": 60}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma2-long-window": ("gemma2", {"head_dim": 12, "sliding_window": 50, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "head_dim": 12,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    model_type, keys = CASES[request.param]
    hf = torch_model(model_type, **keys)
    return hf, *to_tree(hf)


def torch_logits(hf, tokens, **inputs):
    """The reference's logits. Its dynamic rotary scaling stays that of the longest row seen since a short
    one: so a short one first, or a test would depend on the tests before it."""
    with torch.no_grad():
        hf(torch.zeros((1, 2), dtype=torch.long))
        return hf(torch.tensor(np.asarray(tokens), dtype=torch.long), **inputs).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, 97, shape)


def test_full_rows(pair):
    hf, model, base = pair
    tokens = random_tokens(2, 23)
    np.testing.assert_allclose(logits(model, base, tokens), torch_logits(hf, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    """Padding on either side changes nothing at the real tokens."""
    hf, model, base = pair
    tokens = random_tokens(3, 21, seed=1)
    real = np.ones_like(tokens)
    for row, pad in enumerate((9, 4, 0)):
        real[row, slice(0, pad) if side == "left" else slice(21 - pad, 21)] = 0
    positions = np.maximum(np.cumsum(real, 1) - 1, 0)
    # Row by row: transformers' dynamic rotary scaling is that of the longest row.
    inputs = {"attention_mask": torch.tensor(real), "position_ids": torch.tensor(positions)}
    rows = [torch_logits(hf, tokens[[i]], **{k: v[[i]] for k, v in inputs.items()}) for i in range(3)]
    theirs = np.concatenate(rows)
    ours = logits(model, base, tokens, segments=real, positions=positions)
    np.testing.assert_allclose(ours[real == 1], theirs[real == 1], atol=1e-4, rtol=1e-4)


def test_packed_segments(pair):
    """Two examples in one row give the logits of each alone, and cannot see each other."""
    hf, model, base = pair
    first, second = random_tokens(1, 9, seed=2), random_tokens(1, 12, seed=3)
    segments = [[1] * 9 + [2] * 12 + [0] * 3]
    positions = [[*range(9), *range(12), 0, 0, 0]]
    row = np.concatenate([first, second, np.zeros((1, 3), int)], 1)
    packed = logits(model, base, row, segments, positions)
    np.testing.assert_allclose(packed[:, :9], torch_logits(hf, first), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(packed[:, 9:21], torch_logits(hf, second), atol=1e-4, rtol=1e-4)
    row[0, 2] += 1
    changed = logits(model, base, row, segments, positions)
    assert np.array_equal(changed[:, 9:21], packed[:, 9:21])
    assert not np.array_equal(changed[:, 2:9], packed[:, 2:9])


def test_cached_decode(pair):
    """Prefill, then token by token through the cache: the logits of the full forward pass."""
    hf, model, base = pair
    tokens = random_tokens(2, 16 if hf.config.max_position_embeddings == 16 else 22, seed=4)
    steps, size = tokens.shape[1], 24
    hidden, cache = [], model.empty_cache(2, size)

    @jax.jit
    def forward(piece, positions, cache):
        return model.hidden(None, base, piece, jnp.ones_like(piece), positions, cache=cache)

    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, steps))]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        h, cache = forward(jnp.asarray(tokens[:, start:stop]), positions, cache)
        hidden.append(h)
    z = jnp.dot(jnp.concatenate(hidden, 1), model.unembed(base).T, precision="highest")
    cap = model.config.final_softcap
    z = cap * jnp.tanh(z / cap) if cap else z
    np.testing.assert_allclose(z, torch_logits(hf, tokens), atol=1e-4, rtol=1e-4)
