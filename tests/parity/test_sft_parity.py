"""SFT of all weights: loss, gradients and AdamW steps are torch's."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

from typing import Any

import jax
import numpy as np
import optax
import torch

from jaxalign.train.optim import OptimConfig, make_optimizer
from tests.parity.hf import to_tree, torch_model
from tests.parity.training import our_steps, torch_backward

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
}


def as_tree(hf: Any, field: str) -> Any:
    """`grad` or `data` of the torch parameters, as a tree like ours."""
    arrays = {n: getattr(p, field).detach().clone() for n, p in hf.named_parameters(remove_duplicate=False)}

    class Copy:
        config = hf.config

        def state_dict(self) -> dict[str, Any]:
            return arrays

    return to_tree(Copy())[1]


def assert_close(got: Any, want: Any, of_largest: float = 0.0, atol: float = 3e-7) -> None:
    """Every array, to a share of its own largest number or to `atol`."""
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def compare(path: Any, a: Any, b: Any) -> None:
        where = jax.tree_util.keystr(path)
        allowed = max(of_largest * np.abs(b).max(), atol)
        np.testing.assert_allclose(a, b, rtol=0, atol=allowed, err_msg=where)

    jax.tree.map_with_path(compare, got, want)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    """The mean over all targets and its gradient in every weight, in one batch and in two micro-batches."""
    model_type, keys = CASES[case]
    hf = torch_model(model_type, num_hidden_layers=2, **keys)
    model, base = to_tree(hf)
    loss = torch_backward(hf)
    want = as_tree(hf, "grad")
    after, metrics = our_steps(model, base, {}, optax.sgd(1.0), micros=2)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    norm = sum(float((p.grad**2).sum()) for p in hf.parameters()) ** 0.5
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert_close(jax.tree.map(lambda a, b: np.asarray(b) - a, after, base), want, 1e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_steps(clip: float | None) -> None:
    """Three steps of AdamW from the same weights, without and with clipping of the global norm."""
    hf = torch_model("llama", num_hidden_layers=2)
    model, base = to_tree(hf)
    reference = torch.optim.AdamW(hf.parameters(), lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(3):
        torch_backward(hf)
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), clip)
            assert norm > 2 * clip
        reference.step()
    config = OptimConfig(schedule="constant", warmup_ratio=0.0, grad_clip=clip)
    got, _ = our_steps(model, base, {}, make_optimizer(config, lambda step: 2e-3), count=3)
    # Adam divides by the size of the gradient: where that is rounding alone, 1 % of one step.
    assert_close(got, as_tree(hf, "data"), atol=2e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), got, base)
    assert min(jax.tree.leaves(moved)) > 2e-3
