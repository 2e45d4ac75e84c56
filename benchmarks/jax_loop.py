"""What the jaxalign trainings share: put together as `jaxalign train` puts one together, run in rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax

from benchmarks import batches, jax_common
from benchmarks.measure import Clock, reset_peak, serve
from benchmarks.protocol import Channel
from jaxalign.distributed import keep_freed_memory
from jaxalign.train.assemble import Machine, Weights, load_weights
from jaxalign.train.feed import abstract, place
from jaxalign.train.programs import COMPILATIONS
from jaxalign.train.settings import TrainConfig, objective_for
from jaxalign.types import Batch


class Trains(Protocol):
    """A training that runs in rounds. `state` is there once it has compiled."""

    state: Any

    def compile(self) -> Any:
        """The program of its largest batch."""
        ...

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`steps` steps; losses and tokens."""
        ...


def run(job: Mapping[str, Any], channel: Channel, make: Callable[[Mapping[str, Any], Any], Trains]) -> None:
    """Loads and compiles, then answers each round of `steps` steps with their losses."""
    mesh, clock = jax_common.prepare(job), Clock()
    loop = make(job, mesh)
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


def load(job: Mapping[str, Any], mesh: Any, settings: TrainConfig) -> Weights:
    """The run's model with the shared adapter. `job["model"]` overrides fields of `Model`."""
    weights = load_weights(jax_common.source(job, adapter=True), mesh, settings)
    return replace(weights, model=replace(weights.model, **job.get("model", {})))


class Loop:
    """State, compiled steps and the place in the data.

    `host(index)` is the batch of a step of `steps`, numpy leaves [A=1, B, G, T]; its shape may vary.
    """

    def __init__(
        self,
        method: str,
        settings: TrainConfig,
        weights: Weights,
        mesh: Any,
        steps: batches.Steps,
        host: Callable[[int], Batch],
    ) -> None:
        self.mesh, self.steps, self.host, self.at = mesh, steps, host, 0
        objective = objective_for(method, settings)
        # The number of steps shapes the schedule alone, and that is constant.
        self.machine = Machine(weights, objective, mesh, settings, 10**6, jax_common.say)

    def compile(self) -> Any:
        """Makes the steps of every shape, and the state; the program of the largest."""
        shapes = {}
        for index in range(len(self.steps.tokens)):
            batch = self.host(index)
            size = sum(leaf.size for leaf in jax.tree.leaves(batch))
            shapes[size, str(jax.tree.map(lambda x: x.shape, batch))] = batch
        ordered = [abstract(shapes[key], self.mesh) for key in sorted(shapes)]
        self.step = self.machine.train_programs(ordered)
        self.state = self.machine.new_state()
        jax.block_until_ready(self.state)
        keep_freed_memory(self.step.temporary)
        return self.step.prepare(self.machine.abstract_state, self.machine.weights.base, ordered[-1])

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`steps` steps, batches built and placed on the way; losses are fetched after the last."""
        before, first = COMPILATIONS.count, self.at
        self.at, losses = first + message["steps"], []
        for index in range(first, self.at):
            batch = place(self.host(index), self.mesh)
            self.state, metrics = self.step(self.state, self.machine.weights.base, batch)
            losses.append(metrics["loss"])
        losses = [float(x) for x in jax.device_get(losses)]
        jax.block_until_ready(self.state)
        tokens = sum(self.steps.trained(i) for i in range(first, self.at))
        return {"losses": losses, "tokens": tokens, **jax_common.compiled(before), **jax_common.device_peak()}
