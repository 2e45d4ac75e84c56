"""What a run learns from: its objective, its batches and its evaluation. `run` knows no more of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxalign.data.chat import Tokenizer
from jaxalign.models.decoder import Model
from jaxalign.sharding import data_shards
from jaxalign.train import feed
from jaxalign.train.assemble import Machine
from jaxalign.train.flops import Work, work_of
from jaxalign.train.folder import RunFolder
from jaxalign.train.inputs import Data, Inputs, check_fit, held_out_batches, read_inputs, total_steps
from jaxalign.train.loop import Parties
from jaxalign.train.metrics import Screen
from jaxalign.train.prepare import Preparation
from jaxalign.train.programs import Programs, shape_of
from jaxalign.train.settings import TrainConfig, objective_for
from jaxalign.types import Batch

Say = Callable[[str], None]


class Lesson(Protocol):
    """One run's matter, read and checked before the weights are loaded."""

    @property
    def objective(self) -> Any:
        """The loss."""
        ...

    @property
    def total(self) -> int:
        """Updates of the run."""
        ...

    @property
    def epoch(self) -> float:
        """Updates of one pass over the rows."""
        ...

    @property
    def begins(self) -> tuple[int, ...]:
        """The numbers of updates after which another stage begins."""
        ...

    @property
    def report(self) -> dict[str, Any]:
        """What became of the rows, as JSON."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this data this data: a checkpoint of other data is refused, with what differs."""
        ...

    def check(self, model: Model) -> None:
        """Raises `UserError` where the data has what the model has not: token ids, or positions."""
        ...

    def ready(self, machine: Machine, folder: RunFolder) -> Lesson:
        """The lesson with what only the model can tell. Raises `UserError`."""
        ...

    def abstract(self) -> list[Batch]:
        """Shapes and dtypes of this process's batches, the largest last, as far as they are known."""
        ...

    def parties(self, programs: Programs, common: dict[str, Any]) -> tuple[Parties, list[Programs]]:
        """Whom the loop calls, with `common` parts of theirs, and the programs that were compiled beside
        `programs`, the training step."""
        ...

    def lines(self, start: int) -> list[str]:
        """What is said before update `start`."""
        ...

    def tell(self, step: int, screen: Screen) -> None:
        """Says what begins after update number `step`."""
        ...


Open = Callable[[str, Data, TrainConfig, Tokenizer, Say], Lesson]


@dataclass(frozen=True)
class Offline:
    """The lesson of a method that learns from rows."""

    method: str
    config: TrainConfig
    objective: Any
    inputs: Inputs
    pad_id: int
    say: Say
    machine: Machine | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """As in `Lesson`."""
        return total_steps(self.config, self.inputs.source)

    @property
    def epoch(self) -> float:
        """As in `Lesson`."""
        return len(self.inputs.source.rows) / (self.config.batch_size or 1)

    @property
    def begins(self) -> tuple[int, ...]:
        """As in `Lesson`."""
        return self.inputs.source.order.begins

    @property
    def report(self) -> dict[str, Any]:
        """As in `Lesson`."""
        return self.inputs.report

    @property
    def identity(self) -> dict[str, Any]:
        """As in `Lesson`."""
        return self.inputs.identity

    def check(self, model: Model) -> None:
        """As in `Lesson`."""
        shape, adapter = model.config, model.adapter
        check_fit(self.inputs, shape.vocab_size, shape.max_positions, adapter.virtual if adapter else 0)

    def ready(self, machine: Machine, folder: RunFolder) -> Offline:
        """With the reference's log-probs, and rows in stages, where that is asked for; laid out for the
        mesh."""
        inputs = Preparation(self.method, machine, folder, self.pad_id, self.say).of(self.inputs)
        inputs = inputs.in_blocks(data_shards(machine.mesh))
        return replace(self, inputs=inputs, machine=machine, config=machine.config)

    def abstract(self) -> list[Batch]:
        """As in `Lesson`."""
        return self.inputs.source.abstract()

    def parties(self, programs: Programs, common: dict[str, Any]) -> tuple[Parties, list[Programs]]:
        """Batches are made ahead, by a thread."""
        machine, source = self._machine, self.inputs.source
        held_out = self._held_out()
        shapes = {shape_of(b): feed.abstract(b, machine.mesh, 0) for b in held_out}
        tests = machine.eval_programs(list(shapes.values()))
        windows = machine.layer_windows

        def make(step: int) -> tuple[Batch, Work]:
            host = source.batch(step)
            return feed.place(host, machine.mesh), work_of(host, windows)

        found = Parties(
            step=lambda state, batch: programs(state, machine.weights.base, batch),
            make=make,
            rows=source.ids,
            evaluate=machine.evaluator(tests, held_out) if held_out else None,
            facts=source.order.facts,
            **common,
        )
        return found, [tests]

    def _held_out(self) -> list[Batch]:
        c, shards = self.config, data_shards(self._machine.mesh)
        rows = c.eval_batch_size or (c.batch_size or 1) // c.grad_accumulation
        rows = -(-rows // shards) * shards
        return held_out_batches(self.inputs, c, self.objective, self.pad_id, rows, shards)

    def lines(self, start: int) -> list[str]:
        """Rows, padding, and the stage that the run is in."""
        source, rows = self.inputs.source, self.config.batch_size or 1
        stats = source.stats
        size = f"{stats.rows} rows an epoch, {stats.pad_share:.0%} padding"
        out = [f"run: {self.total} steps of {rows} rows, {size}"]
        if stats.rows < rows:
            out.append(f"fewer rows than batch_size={rows}: each is taken more than once in every step")
        if self.begins and start < self.total:
            out.append(source.order.line(start))
        return out

    def tell(self, step: int, screen: Screen) -> None:
        """The stage that begins."""
        if step in self.begins:
            screen.say(self.inputs.source.order.line(step))

    @property
    def _machine(self) -> Machine:
        assert self.machine is not None, "`ready` comes first"
        return self.machine


def from_rows(method: str, data: Data, config: TrainConfig, tokenizer: Tokenizer, say: Say) -> Offline:
    """The lesson of an offline method. `config` must be resolved. Raises what `read_inputs` raises."""
    objective = objective_for(method, config)
    inputs = read_inputs(data, tokenizer, config, objective, say)
    return Offline(method, config, objective, inputs, tokenizer.pad_id, say)
