"""Contender: jaxalign's training, put together as `jaxalign train sft` puts it together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import batches, jax_common, jax_loop
from benchmarks.protocol import Channel
from jaxalign.train.settings import TrainConfig, config_for


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `jax_loop.run`."""
    jax_loop.run(job, channel, make)


def make(job: Mapping[str, Any], mesh: Any) -> jax_loop.Loop:
    """Weights and the loop over the run's packed rows."""
    steps = batches.load(job["batches"])
    settings = config(job, steps)
    weights = jax_loop.load(job, mesh, settings)
    return jax_loop.Loop("sft", settings, weights, mesh, steps, lambda i: jax_common.host_batch(steps, i))


def config(job: Mapping[str, Any], steps: batches.Steps) -> TrainConfig:
    """AdamW, constant rate and clipping as every contender; the rest are the defaults."""
    _, rows, length = steps.tokens.shape
    return config_for("sft")(
        dtype=job["precision"],
        learning_rate=job["learning_rate"],
        schedule="constant",
        warmup_ratio=0.0,
        grad_clip=job["clip"],
        batch_size=rows,
        max_length=length,
    )
