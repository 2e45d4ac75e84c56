"""Contender: jaxalign's DPO, put together as `jaxalign train dpo` puts it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import batches, jax_loop
from benchmarks.protocol import Channel
from jaxalign.data.batching import bucket_lengths
from jaxalign.train.assemble import Weights, data_shards
from jaxalign.train.feed import place
from jaxalign.train.score import score
from jaxalign.train.settings import TrainConfig, config_for
from jaxalign.types import Batch


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `jax_loop.run`."""
    jax_loop.run(job, channel, make)


def make(job: Mapping[str, Any], mesh: Any) -> jax_loop.Loop:
    """Weights and the loop; with `job["precomputed"]` the reference's log-probs of every step before it."""
    steps = batches.load(job["batches"])
    settings = config(job, steps)
    weights = jax_loop.load(job, mesh, settings)
    host = hosts(steps)
    if job.get("precomputed"):
        host = with_reference(host, len(steps.tokens), weights, mesh)
    return jax_loop.Loop("dpo", settings, weights, mesh, steps, host)


def config(job: Mapping[str, Any], steps: batches.Steps) -> TrainConfig:
    """AdamW, constant rate and clipping as every contender, the model without its adapter as reference."""
    _, rows, length = steps.tokens.shape
    return config_for("dpo")(
        dtype=job["precision"],
        learning_rate=job["learning_rate"],
        schedule="constant",
        warmup_ratio=0.0,
        grad_clip=job["clip"],
        batch_size=rows // 2,
        max_length=length,
        beta=job["beta"],
        reference={"mode": "precomputed" if job.get("precomputed") else "adapter_off"},
    )


def hosts(steps: batches.Steps) -> Callable[[int], Batch]:
    """The batch of a step, numpy leaves [A=1, B, G=2, T]: chosen before rejected, T as `BatchSource` has it,
    the smallest of a few lengths that takes the step's longest row."""
    widths = bucket_lengths(steps.tokens.shape[-1])

    def host(index: int) -> Batch:
        at = index % len(steps.tokens)
        longest = int((steps.segments[at] > 0).sum(axis=-1).max())
        width = next(w for w in widths if w >= longest)
        leaves = (steps.tokens, steps.mask, steps.segments, steps.positions)
        return Batch(*(fit(leaf[at], width).reshape(1, -1, 2, width) for leaf in leaves))

    return host


def fit(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows [R, T] with padding (zeros) on the right added or left out: [R, width]."""
    return np.pad(rows[:, :width], ((0, 0), (0, max(0, width - rows.shape[1]))))


def with_reference(
    host: Callable[[int], Batch], count: int, weights: Weights, mesh: Any
) -> Callable[[int], Batch]:
    """`host` with aux "ref" float32 [A=1, B, G, T], computed here for all `count` steps."""

    @jax.jit
    def reference(base: Any, batch: Batch) -> jax.Array:
        how = {"compact": mesh.size == 1, "spread": data_shards(mesh)}
        return score(weights.model, None, base, batch, **how).logp

    def forward(batch: Batch) -> np.ndarray:
        first = jax.tree.map(lambda x: x[0], batch)
        return np.asarray(reference(weights.base, place(first, mesh, 0)))[None]

    found = [forward(host(index)) for index in range(count)]
    return lambda index: replace(host(index), aux={"ref": found[index % count]})
