"""Contender without a rival: what jaxalign compiles, how long it takes, and what it never compiles again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import batches, jax_common, jax_sft
from benchmarks.measure import Clock, serve
from benchmarks.protocol import Channel
from jaxalign.data.batching import BatchSource
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import Numerics
from jaxalign.models.decoder import Model
from jaxalign.models.load import open_checkpoint
from jaxalign.sharding import constrainer, tree_shardings
from jaxalign.train.assemble import DTYPES, Machine, Weights, load_weights
from jaxalign.train.feed import abstract, place
from jaxalign.train.programs import COMPILATIONS
from jaxalign.train.settings import objective_for
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Example

Job = Mapping[str, Any]


def run(job: Job, channel: Channel) -> None:
    """Answers rounds `{"task": "depth", "layers": n}` and `{"task": "epoch", "packing": bool}`."""
    mesh = jax_common.prepare(job)
    steps = batches.load(job["batches"])
    channel.reply(**jax_common.report())
    tasks = {"depth": depth, "epoch": epoch}
    serve(channel, lambda message: tasks[message["task"]](job, steps, mesh, message))


def depth(job: Job, steps: batches.Steps, mesh: Any, message: Job) -> dict[str, Any]:
    """Traces and compiles the training step of a model as wide as the run's and `layers` deep; no weights."""
    jax.clear_caches()
    settings = jax_sft.config(job, steps)
    weights = hollow(job, mesh, message["layers"])
    machine = Machine(weights, objective_for("sft", settings), mesh, settings, 10**6, jax_common.say)
    batch = abstract(jax_common.host_batch(steps, 0), mesh)
    step = make_step(
        weights.model, machine.objective, machine.optimizer, mesh, out_shardings=machine.state_shardings
    )
    arguments = (machine.abstract_state, weights.base, batch)
    clock = Clock()
    lowered: Any = step.lower(*arguments)  # pyright: ignore[reportFunctionMemberAccess]
    trace = clock.lap()["wall_s"]
    program = lowered.compile()
    state = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(machine.abstract_state))
    return {
        "layers": message["layers"],
        "trace_s": trace,
        "compile_s": clock.lap()["wall_s"],
        "alias_bytes": program.memory_analysis().alias_size_in_bytes,
        "state_bytes": state,
    }


def hollow(job: Job, mesh: Any, layers: int) -> Weights:
    """Weights as shapes alone, of the run's model with another number of layers."""
    config = open_checkpoint(jax_common.source(job)).decoder()
    kinds = tuple(config.layer_kinds[i % config.num_layers] for i in range(layers))
    dtype = DTYPES[job["precision"]]
    numerics = Numerics.choose(dtype, jax.devices()[0].platform)
    shape = replace(config, num_layers=layers, layer_kinds=kinds)
    model = Model(shape, LoraConfig(), numerics, constrain=constrainer(mesh))
    (adapter, base), (adapter_axes, axes) = model.shapes(), model.axes()
    shardings = tree_shardings(mesh, adapter_axes, adapter)
    struct = lambda s, at: jax.ShapeDtypeStruct(s.shape, dtype, sharding=at)  # noqa: E731
    base = jax.tree.map(struct, base, tree_shardings(mesh, axes, base))
    loaded: Any = None  # nothing is read from it
    return Weights(loaded, model, adapter, base, False, shardings)


def epoch(job: Job, steps: batches.Steps, mesh: Any, message: Job) -> dict[str, Any]:
    """One epoch over the run's examples in rows of mixed lengths: what it compiles after warm-up."""
    settings = jax_sft.config(job, steps)
    weights = load_weights(jax_common.source(job, adapter=True), mesh, settings)
    machine = Machine(weights, objective_for("sft", settings), mesh, settings, 10**6, jax_common.say)
    rows = batch_source(steps, message["packing"])
    start = COMPILATIONS.count
    shapes = [abstract(blank(shape), mesh) for shape in rows.shapes]
    step = machine.train_programs(shapes)
    state = machine.new_state()
    state, metrics = step(state, weights.base, place(rows.batch(0), mesh))
    jax.block_until_ready(metrics)
    warm, lengths = COMPILATIONS.count, []
    for index in range(1, rows.steps_per_epoch + 1):
        batch = rows.batch(index)
        lengths.append(batch.tokens.shape[-1])
        state, metrics = step(state, weights.base, place(batch, mesh))
    loss = float(metrics["loss"])
    return {
        "packing": message["packing"],
        "steps": len(lengths),
        "shapes": len(rows.shapes),
        "lengths": sorted(set(lengths)),
        "warmup_compiles": warm - start,
        "compiles": COMPILATIONS.count - warm,
        "loss": loss,
    }


def batch_source(steps: batches.Steps, packing: bool) -> BatchSource:
    """The package's own batching over the run's examples, two rows a step."""
    pairs = [pair for i in range(len(steps.tokens)) for pair in steps.examples(i)]
    targets = (np.asarray(labels != batches.IGNORED) for _, labels in pairs)
    tokens = (np.asarray(t, np.int32) for t, _ in pairs)
    examples = [Example(str(i), t, m) for i, (t, m) in enumerate(zip(tokens, targets, strict=True))]
    return BatchSource(examples, batch_size=2, max_length=steps.tokens.shape[-1], packing=packing)


def blank(shape: tuple[int, ...]) -> Batch:
    """A batch of zeros, for its shapes."""
    zeros = np.zeros(shape, np.int32)
    return Batch(zeros, zeros.astype(bool), zeros, zeros)
