"""Contender: jaxalign's DPO, put together as `jaxalign train dpo` puts it together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import batches, jax_common, jax_loop
from benchmarks.protocol import Channel
from jaxalign.data.rows import Item, arrange, in_blocks
from jaxalign.train.assemble import Weights
from jaxalign.train.precompute import Reference, with_log_probs
from jaxalign.train.settings import TrainConfig, config_for
from jaxalign.types import Batch, Example, Group


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `jax_loop.run`."""
    jax_loop.run(job, channel, make)


def make(job: Mapping[str, Any], mesh: Any) -> jax_loop.Loop:
    """Weights and the loop; with `job["precomputed"]` the reference's log-probs of every pair before it."""
    steps = batches.load(job["batches"])
    settings = config(job, steps)
    weights = jax_loop.load(job, mesh, settings)
    items: Sequence[Item] = groups(steps)
    if job.get("precomputed"):
        items = with_reference(items, weights, mesh, settings)
    host = hosts(items, len(steps.tokens), share=not job.get("apart"))
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


def groups(steps: batches.Steps) -> list[Group]:
    """The pairs of all steps in their order, chosen before rejected."""

    def member(index: int, row: int) -> Example:
        real = steps.segments[index, row] > 0
        return Example(f"{index}.{row}", steps.tokens[index, row][real], steps.mask[index, row][real])

    count, rows, _ = steps.tokens.shape
    every = [(index, row) for index in range(count) for row in range(0, rows, 2)]
    return [Group(f"{i}.{row}", (member(i, row), member(i, row + 1))) for i, row in every]


def hosts(items: Sequence[Item], count: int, *, share: bool) -> Callable[[int], Batch]:
    """The batch of each of `count` steps, as `BatchSource` lays its rows out on one device: leaves
    [A=1, B, G=2, T]. `share`: the prompt of a pair once, several pairs to a row."""
    longest = max(len(m.tokens) for item in items if isinstance(item, Group) for m in item.members)
    steps = np.arange(len(items)).reshape(count, 1, -1)
    rows = in_blocks(arrange(items, max_length=longest, group=2, share=share), steps.shape[-1], list(steps))
    return lambda index: rows.batch(steps[index % count])


def with_reference(
    items: Sequence[Item], weights: Weights, mesh: Any, settings: TrainConfig
) -> Sequence[Item]:
    """The pairs with the log-probs of the model without its adapter."""
    reference = Reference(weights.model, None, weights.base, mesh, "the base")
    how = {"rows": settings.batch_size, "max_length": settings.max_length, "pad_id": 0}
    with tempfile.TemporaryDirectory() as folder:
        return with_log_probs(items, reference, Path(folder) / "reference.npz", jax_common.say, **how)
