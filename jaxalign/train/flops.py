"""How much arithmetic a training step asks for, and how much the device could do: model FLOPs utilisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np

from jaxalign.types import Batch

# Dense bfloat16 peak of one JAX device in FLOP/s, by the start of its `device_kind`; the first match counts.
# Sources: the makers' data sheets, without sparsity. A TPU7x chip shows up as two devices.
PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not known: then no utilisation is shown."""
    if dtype != "bf16":
        return None
    return next((peak for name, peak in PEAKS if device_kind.startswith(name)), None)


@dataclass(frozen=True)
class Work:
    """What a batch holds, without padding.

    tokens    of all examples and answers
    attended  (query, key) pairs over all layers
    computed  tokens that the model sees: fewer where answers share their prompt
    """

    tokens: int = 0
    attended: int = 0
    computed: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def work_of(batch: Batch, layers: Mapping[int, int]) -> Work:
    """Counts a host batch. `layers` says how many layers have each attention window, 0 meaning none.

    Causal attention looks back over its own segment: position + 1 keys a token, or what the window holds.
    """
    rows = batch.shared or batch
    real = np.asarray(rows.segments) > 0
    keys = np.asarray(rows.positions)[real].astype(np.int64) + 1
    attended = sum(count * int(np.minimum(keys, window or keys).sum()) for window, count in layers.items())
    return Work(int((np.asarray(batch.segments) > 0).sum()), attended, int(real.sum()))


@dataclass(frozen=True)
class Cost:
    """FLOPs of one training step without rematerialisation: 4 N + 3 a a token for adapters, 6 N + 3 a full,
    with N the parameters in matrix products (head included, lookup not) and a the attention forward. A
    reference policy in the step adds 2 N + a.

    matmul     FLOPs a token
    attention  FLOPs a (query, key) pair of one layer
    """

    matmul: float
    attention: float

    def of(self, work: Work) -> float:
        """FLOPs of a step over `work`."""
        return self.matmul * work.computed + self.attention * work.attended


def training_cost(shapes: Any, *, heads: int, head_dim: int, full: bool, reference: bool = False) -> Cost:
    """The cost of a step. `shapes` is the base's tree: kernels count, a tied embedding once. `reference`: the
    step makes a forward pass of a reference policy too."""
    passes = (6 if full else 4) + 2 * reference
    # Scores and weighted sum: 2 products of 2 FLOPs a pair, head and dimension; backward costs twice that.
    return Cost(float(passes * matmul_parameters(shapes)), float((3 + reference) * 4 * heads * head_dim))


def matmul_parameters(shapes: Any) -> int:
    """N: the numbers in kernels. Where there is no head of its own, the embedding serves as the head."""
    kernels = math.prod(shapes["head" if "head" in shapes else "embed"]["embedding"].shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if jax.tree_util.keystr(path[-1:], simple=True) == "kernel":
            kernels += math.prod(leaf.shape)
    return kernels
