"""One training run from names to files: `train` puts the parts together and keeps the output folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.errors import UserError
from jaxalign.models.base import DTYPES, resolve_dtype
from jaxalign.models.export import export_hf, export_peft
from jaxalign.models.source import resolve
from jaxalign.registry import OBJECTIVES
from jaxalign.sharding import make_mesh
from jaxalign.train import feed
from jaxalign.train.assemble import (
    Machine,
    check_batch,
    data_shards,
    learning_rate,
    load_weights,
    with_head,
)
from jaxalign.train.checkpoint import Checkpoints, Restored
from jaxalign.train.flops import Work, work_of
from jaxalign.train.folder import RunFolder, adopt, check_same, disk_errors, locked, versions
from jaxalign.train.guards import Watch
from jaxalign.train.inputs import (
    Data,
    Inputs,
    check_fit,
    default_batch_size,
    held_out_batches,
    make_source,
    read_inputs,
    total_steps,
)
from jaxalign.train.loop import Loop, Outcome, Parties, Plan, Progress
from jaxalign.train.metrics import JsonLines, Screen, Silent, Sink, TensorBoard, make_screen, read_lines
from jaxalign.train.optim import learning_rates
from jaxalign.train.precompute import with_log_probs
from jaxalign.train.programs import COMPILATIONS, shape_of
from jaxalign.train.settings import TrainConfig, digest, objective_for
from jaxalign.train.state import TrainState
from jaxalign.types import Batch, ModelSource

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    folder        the output folder
    step          updates made, over all processes that worked on the run
    resumed_from  the update at which this process took over; `step` when there was nothing left to do
    metrics       the last value of every metric, evaluation included
    result        the folder that holds what was trained: adapter/ or model/
    compiled      {"programs", "seconds"} before the first step; {"late"}: anything compiled after it began
    """

    folder: Path
    step: int
    resumed_from: int
    metrics: dict[str, Any]
    result: Path
    compiled: dict[str, float] = field(default_factory=dict)


def train(method: str, model: str, data: Data, out: str | Path, config: TrainConfig) -> RunResult:
    """Trains `model` (what `-m` takes) on `data` (what `-d` takes) and leaves everything in the folder `out`.

    `config` is an instance of `config_for(method)`. The same call goes on where an earlier one stopped, and
    does nothing when the run is over. SIGTERM saves first, then raises a `UserError` of status 75.
    Raises `UserError` for every mistake of the input.
    """
    distributed.share_arena()
    distributed.start()
    distributed.use_compile_cache()
    notice, folder = distributed.Notice(), RunFolder(Path(out))
    if distributed.process_count() == 1:  # among others, JAX's coordination service listens
        notice.watch()
    try:
        with disk_errors(folder.path), locked(folder.path):
            return _Run(method, model, data, folder, config, notice).go()
    finally:
        notice.ignore()


def _print(text: str) -> None:
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


@dataclass
class _Run:
    """One process's part in a run."""

    method: str
    name: str
    data: Data
    folder: RunFolder
    config: TrainConfig
    notice: distributed.Notice

    @property
    def asked(self) -> dict[str, Any]:
        """Method, model and data as they were named."""
        many = isinstance(self.data, list | tuple)
        return {
            "method": self.method,
            "model": self.name,
            "data": [str(d) for d in self.data] if many else str(self.data),  # type: ignore[union-attr]
        }

    def go(self) -> RunResult:
        recorded = self.folder.read("run.json")
        if recorded and self.config.resume == "never":
            raise UserError(
                "the folder already holds a run",
                place=str(self.folder.path),
                remedy="choose another output folder, or set resume=auto to go on with it",
            )
        mesh = make_mesh(self.config.mesh)
        self.config = self._resolved(adopt(self.config, recorded), mesh)
        if recorded:
            check_same(self.folder.path, recorded, self.method, self.config)
            done = self._already_done(recorded)
            if done:
                return done
        check_batch(self.config, mesh)
        return self._train(mesh)

    def _resolved(self, config: TrainConfig, mesh: Any) -> TrainConfig:
        rows = config.batch_size or default_batch_size(data_shards(mesh), config.grad_accumulation)
        return config.model_copy(
            update={
                "batch_size": rows,
                "learning_rate": learning_rate(config, OBJECTIVES[self.method].rates),
                "dtype": resolve_dtype(config.dtype),
            }
        )

    def _already_done(self, recorded: Mapping[str, Any]) -> RunResult | None:
        """The result of a run that is over, told without reading model or data: for the very same command."""
        same = all(recorded[k] == v for k, v in self.asked.items())
        same &= all(recorded["config"][k] == getattr(self.config, k) for k in ("max_steps", "epochs"))
        result = self.folder.finished(recorded["total"]) if same else None
        if result is None:
            return None
        _print(
            f"{self.folder.path}: this run is finished ({result['step']} steps); the result is in "
            f"{self.folder.path / result['result']}. Nothing to do."
        )
        return self._result(result["step"], result["step"], {})

    def _train(self, mesh: Any) -> RunResult:
        source = resolve(self.name)
        template = self.config.chat_template
        tokenizer = load_tokenizer(source, _read(template) if template else None)
        objective = objective_for(self.method, self.config)
        inputs = read_inputs(self.data, tokenizer, self.config, objective, _print)
        total = total_steps(self.config, inputs.source)
        self.folder.check_total(total)
        weights = load_weights(source, mesh, self.config)
        if objective.kind == "reward":
            weights = with_head(weights, mesh, self.config.seed)
        self.config = self.config.model_copy(update={"lora": weights.model.adapter})
        check_fit(inputs, weights.model.config.vocab_size, weights.model.config.max_positions)
        machine = Machine(weights, objective, mesh, self.config, total, _print)
        self.folder.begin(self.asked, self.config, total)
        self.folder.write("data_report.json", inputs.report)
        if machine.mode == "precomputed":
            inputs = self._precomputed(machine, inputs, tokenizer.pad_id)
        return self._with_machine(machine, inputs, source, tokenizer)

    def _precomputed(self, machine: Machine, inputs: Inputs, pad_id: int) -> Inputs:
        """The inputs with the reference's log-probs, from its file or computed and written there."""
        if inputs.source.rotated:
            raise UserError(
                f"{self.method} compares each prompt with answers of other rows, drawn anew in every step",
                place="reference.mode",
                remedy="leave reference.mode out: precomputed needs answers that stay with their prompts",
            )
        c: Any = self.config
        rows = -(-(c.batch_size or 1) // c.grad_accumulation)
        train, held_out = inputs.source.examples, inputs.held_out
        items = with_log_probs(
            [*train, *held_out],
            machine.reference(),
            c.reference.cache or self.folder.path / "reference.npz",
            _print,
            rows=rows,
            max_length=c.max_length,
            pad_id=pad_id,
        )
        source = make_source(items[: len(train)], c, machine.objective, pad_id)
        return replace(inputs, source=source, held_out=items[len(train) :])

    def _with_machine(
        self, machine: Machine, inputs: Inputs, source: ModelSource, tokenizer: Tokenizer
    ) -> RunResult:
        checkpoints = self._checkpoints(machine, inputs)
        if checkpoints.steps():
            machine.forget_start()
        found = checkpoints.restore(machine.parts(machine.abstract_state))
        start = found.step if found else 0
        _announce(machine, inputs, start)
        compiled: dict[str, float] = {"programs": 0, "seconds": 0.0, "late": 0}
        if start < machine.total:
            outcome, compiled = self._loop(machine, inputs, checkpoints, found, tokenizer.pad_id)
            if outcome.preempted:
                raise _preempted(outcome.step, machine.total, self.folder.path)
            state, step = outcome.state, outcome.step
        else:
            state, step = _state_of(machine, found), start
        result = self._export(machine, state, source, tokenizer)
        self._finish(step, result)
        return self._result(step, start, compiled)

    def _checkpoints(self, machine: Machine, inputs: Inputs) -> Checkpoints:
        identity = {"base_hash": machine.weights.loaded.base_hash, "data": inputs.identity}
        about = {"versions": versions(), "config": digest(self.config.model_dump(mode="json"))}
        return Checkpoints(
            self.folder.checkpoints, identity, about, keep=self.config.keep_checkpoints, say=_print
        )

    def _loop(
        self, machine: Machine, inputs: Inputs, checkpoints: Checkpoints, found: Restored | None, pad_id: int
    ) -> tuple[Outcome, dict[str, float]]:
        c, start = self.config, found.step if found else 0
        rows = c.eval_batch_size or (c.batch_size or 1) // c.grad_accumulation
        shards = data_shards(machine.mesh)
        held_out = held_out_batches(inputs, c, machine.objective, pad_id, -(-rows // shards) * shards)
        expected = [feed.abstract(batch, machine.mesh) for batch in inputs.source.abstract()]
        programs = machine.train_programs(expected)
        unique = {shape_of(b): feed.abstract(b, machine.mesh, 0) for b in held_out}
        tests = machine.eval_programs(list(unique.values()))
        compiled: dict[str, float] = {
            "programs": len(programs.table) + len(tests.table),
            "seconds": programs.seconds + tests.seconds,
        }
        _print(f"compiled {compiled['programs']} programs in {compiled['seconds']:.1f} s")
        rates = learning_rates(machine.schedule, machine.total)
        parties = Parties(
            step=lambda state, batch: programs(state, machine.weights.base, batch),
            make=_maker(machine, inputs),
            parts=machine.parts,
            rows=inputs.source.ids,
            rate=lambda step: float(rates[step]),
            evaluate=machine.evaluator(tests, held_out) if held_out else None,
        )
        progress = Progress.load(found.progress) if found else Progress()
        with self._sinks(machine.total, start) as (screen, sinks):
            programs.say = tests.say = checkpoints.say = screen.say
            plan = self._plan(machine.total, inputs)
            loop = Loop(
                plan, parties, checkpoints, sinks, screen.advance, machine.speed, progress, self.notice
            )
            state, before = _state_of(machine, found), COMPILATIONS.count
            distributed.keep_freed_memory()
            outcome = loop.run(state, start)
        return outcome, compiled | {"late": COMPILATIONS.count - before}

    def _plan(self, total: int, inputs: Inputs) -> Plan:
        c, epoch = self.config, len(inputs.source.rows) / (self.config.batch_size or 1)
        every = c.eval_every or max(1, round(epoch))
        return Plan(total, c.log_every, c.checkpoint_every, every, epoch, c.max_nonfinite)

    @contextmanager
    def _sinks(self, total: int, start: int) -> Iterator[tuple[Screen, list[Sink]]]:
        path = self.folder.path
        first = distributed.is_first()
        screen = make_screen(total) if first else Silent()
        files: list[Sink] = (
            [JsonLines(path / "metrics.jsonl", start), TensorBoard(path / "tb", start)] if first else []
        )
        watch = Watch(screen.say, self._first())
        try:
            yield screen, [*files, screen, watch]
        finally:
            for sink in (*files, screen):
                sink.close()

    def _export(self, machine: Machine, state: TrainState, source: ModelSource, tokenizer: Tokenizer) -> str:
        weights, stops = machine.weights, tokenizer.stop_tokens
        params, head = weights.split(state.params)
        if weights.full:
            dtype = DTYPES[self.config.dtype]
            target = self.folder.path / "model"
            export_hf(
                weights.model,
                params,
                source,
                target,
                stop_tokens=stops,
                tokenizer=tokenizer.hf,
                dtype=dtype,
                head=head,
            )
            return target.name
        target = self.folder.path / "adapter"
        export_peft(
            weights.model,
            params,
            source,
            target,
            stop_tokens=stops,
            base_hash=weights.loaded.base_hash,
            tokenizer=tokenizer.hf,
            head=head,
        )
        return target.name

    def _finish(self, step: int, result: str) -> None:
        distributed.wait_for_all("the result is written")
        self.folder.write("result.json", {"step": step, "result": result, "metrics": self._last()})
        _print(f"finished after {step} steps; the result is in {self.folder.path / result}")

    def _first(self) -> dict[str, Any]:
        """The first value of every metric that the log holds."""
        first: dict[str, Any] = {}
        for row in read_lines(self.folder.path / "metrics.jsonl"):
            first = row | first
        return first

    def _last(self) -> dict[str, Any]:
        """The last value of every metric that the log holds."""
        last: dict[str, Any] = {}
        for row in read_lines(self.folder.path / "metrics.jsonl"):
            last |= row
        return last

    def _result(self, step: int, start: int, compiled: dict[str, float]) -> RunResult:
        result = self.folder.read("result.json") or {"result": ""}
        path = self.folder.path
        return RunResult(path, step, start, self._last(), path / result["result"], compiled)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read: {error}", place=str(path), remedy="check the path of chat_template"
        ) from error


def _state_of(machine: Machine, found: Restored | None) -> TrainState:
    """The state of the checkpoint, or a fresh one."""
    return machine.new_state() if found is None else machine.resumed(found.parts)


def _maker(machine: Machine, inputs: Inputs) -> Callable[[int], tuple[Batch, Work]]:
    """make(step): the placed batch of a step and what it holds on this process."""
    windows, mesh = machine.layer_windows, machine.mesh

    def make(step: int) -> tuple[Batch, Work]:
        host = inputs.source.batch(step)
        return feed.place(host, mesh), work_of(host, windows)

    return make


def _announce(machine: Machine, inputs: Inputs, start: int) -> None:
    trained, total = machine.weights.counts
    c, stats = machine.config, inputs.source.stats
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    _print(
        f"model: {total:,} parameters, {trained:,} trained, {c.dtype}, on {devices}\n"
        f"run: {machine.total} steps of {c.batch_size} rows, {stats.rows} rows an epoch, "
        f"{stats.pad_share:.0%} padding"
    )
    if stats.rows < (c.batch_size or 1):
        _print(f"fewer rows than batch_size={c.batch_size}: each is taken more than once in every step")
    if start:
        _print(f"resuming after step {start} of {machine.total}")


def _preempted(step: int, total: int, path: Path) -> UserError:
    return UserError(
        f"stopped by a signal after step {step} of {total}; the checkpoint is written",
        place=str(path),
        remedy="run the same command again to go on",
        status=distributed.PREEMPTED,
    )
