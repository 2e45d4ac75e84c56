"""Contender: jaxalign's training, put together as `jaxalign train sft` puts it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from benchmarks import batches, jax_common
from benchmarks.measure import Clock, reset_peak, serve
from benchmarks.protocol import Channel
from jaxalign.distributed import keep_freed_memory
from jaxalign.train.assemble import Machine, load_weights
from jaxalign.train.feed import abstract, place
from jaxalign.train.programs import COMPILATIONS
from jaxalign.train.settings import TrainConfig, config_for, objective_for


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Loads and compiles, then answers each round of `steps` steps with their losses."""
    mesh, clock = jax_common.prepare(job), Clock()
    loop = Loop(job, mesh)
    loaded = clock.lap()["wall_s"]
    program = loop.compile()
    channel.reply(
        **jax_common.report(),
        load_s=loaded,
        prepare_s=clock.lap()["wall_s"],
        alias_bytes=program.memory_analysis().alias_size_in_bytes,
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(loop.state)),
        peak_reset=reset_peak(),
    )
    serve(channel, loop.round)


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


class Loop:
    """Weights, state, compiled step and the place in the data."""

    def __init__(self, job: Mapping[str, Any], mesh: Any) -> None:
        self.mesh, self.steps, self.at = mesh, batches.load(job["batches"]), 0
        settings = config(job, self.steps)
        weights = load_weights(jax_common.source(job, adapter=True), mesh, settings)
        self.weights = replace(weights, model=replace(weights.model, **job.get("model", {})))
        objective = objective_for("sft", settings)
        # The number of steps shapes the schedule alone, and that is constant.
        self.machine = Machine(self.weights, objective, mesh, settings, 10**6, jax_common.say)

    def compile(self) -> Any:
        """Makes the step and the state; the compiled program."""
        batch = abstract(jax_common.host_batch(self.steps, 0), self.mesh)
        self.step = self.machine.train_programs([batch])
        self.state = self.machine.new_state()
        jax.block_until_ready(self.state)
        keep_freed_memory()
        return self.step.prepare(self.machine.abstract_state, self.weights.base, batch)

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`steps` steps, batches built and placed on the way; losses are fetched after the last."""
        before, first = COMPILATIONS.count, self.at
        self.at, losses = first + message["steps"], []
        for index in range(first, self.at):
            batch = place(jax_common.host_batch(self.steps, index), self.mesh)
            self.state, metrics = self.step(self.state, self.weights.base, batch)
            losses.append(metrics["loss"])
        losses = [float(x) for x in jax.device_get(losses)]
        jax.block_until_ready(self.state)
        tokens = sum(self.steps.trained(i) for i in range(first, self.at))
        return {"losses": losses, "tokens": tokens, **jax_common.compiled(before), **jax_common.device_peak()}
