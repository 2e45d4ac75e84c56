"""The arithmetic behind MFU, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.train.flops import Work, matmul_parameters, peak_flops, training_cost, work_of
from jaxalign.types import Batch


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


D, F, L, H, HD, V = 8, 16, 3, 2, 4, 32
LAYER = 4 * D * D + 3 * D * F


def _tree(tied: bool) -> dict:
    layers = {
        "attn": {n: {"kernel": _shape(L, D, D)} for n in "qkvo"} | {"q_norm": {"scale": _shape(L, HD)}},
        "mlp": {n: {"kernel": _shape(L, D, F)} for n in ("gate", "up", "down")},
        "attn_norm": {"scale": _shape(L, D)},
    }
    tree = {"embed": {"embedding": _shape(V, D)}, "layers": layers, "final_norm": {"scale": _shape(D)}}
    return tree if tied else tree | {"head": {"embedding": _shape(V, D)}}


@pytest.mark.parametrize("tied", [True, False])
def test_head_counts_once_and_lookup_never(tied: bool) -> None:
    assert matmul_parameters(_tree(tied)) == L * LAYER + D * V


@pytest.mark.parametrize(("full", "passes"), [(False, 4), (True, 6)])
def test_cost_of_one_whole_row(full: bool, passes: int) -> None:
    """A row of T tokens: (4 or 6) N T + 3 a T with a = 2 T L H hd, and the exact triangle T (T + 1) / 2."""
    t = 64
    zeros = np.zeros((1, 1, 1, t), np.int32)
    batch = Batch(zeros, zeros.astype(bool), zeros + 1, np.arange(t, dtype=np.int32).reshape(1, 1, 1, t))
    cost = training_cost(_tree(True), heads=H, head_dim=HD, full=full)
    n = L * LAYER + D * V
    exact = passes * n * t + 3 * 4 * H * HD * L * t * (t + 1) / 2
    assert cost.of(work_of(batch, {0: L})) == exact
    assert exact == pytest.approx(passes * n * t + 3 * (2 * t * L * H * HD) * t, rel=0.01)


def test_padding_and_packing_cost_what_they_hold() -> None:
    """Two segments of 3 and 2 tokens, one pad: 5 tokens, 6 + 3 pairs a layer; a window of 2 holds 5 + 3."""
    segments = np.array([1, 1, 1, 2, 2, 0], np.int32).reshape(1, 1, 1, 6)
    positions = np.array([0, 1, 2, 0, 1, 0], np.int32).reshape(1, 1, 1, 6)
    batch = Batch(segments, segments > 0, segments, positions)
    assert work_of(batch, {0: 1}) == Work(5, 9, 5)
    assert work_of(batch, {0: 1, 2: 10}) == Work(5, 9 + 10 * 8, 5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce of tomorrow", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind, "bf16") == peak
    assert peak_flops(kind, "f32") is None
