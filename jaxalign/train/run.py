"""One training run from names to files: `train` puts the parts together and keeps the output folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.errors import UserError
from jaxalign.models.base import DTYPES, resolve_dtype
from jaxalign.models.decoder import Adapter
from jaxalign.models.export import export_hf, export_peft
from jaxalign.models.source import resolve
from jaxalign.sharding import data_shards, make_mesh
from jaxalign.train import feed
from jaxalign.train.assemble import Machine, check_batch, learning_rate, load_weights
from jaxalign.train.checkpoint import Checkpoints, Restored
from jaxalign.train.folder import RunFolder, adopt, check_same, disk_errors, locked, versions
from jaxalign.train.guards import Watch
from jaxalign.train.heads import HEADS
from jaxalign.train.inputs import Data, default_batch_size
from jaxalign.train.lesson import Lesson, Open, from_rows
from jaxalign.train.loop import Loop, Outcome, Plan, Progress
from jaxalign.train.metrics import JsonLines, Screen, Silent, Sink, TensorBoard, make_screen, read_lines
from jaxalign.train.optim import learning_rates
from jaxalign.train.programs import COMPILATIONS
from jaxalign.train.settings import TrainConfig, digest
from jaxalign.train.state import TrainState
from jaxalign.types import ModelSource

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
    stopped       why the run ended before its last update, or ""
    """

    folder: Path
    step: int
    resumed_from: int
    metrics: dict[str, Any]
    result: Path
    compiled: dict[str, float] = field(default_factory=dict)
    stopped: str = ""


def train(
    method: str, model: str, data: Data, out: str | Path, config: TrainConfig, open_lesson: Open = from_rows
) -> RunResult:
    """Trains `model` (what `-m` takes) on `data` (what `-d` takes) and leaves everything in the folder `out`.

    `config` is of the method's own class, `open_lesson` reads what it learns from. The same call goes on
    where an earlier one stopped, and does nothing when the run is over. SIGTERM saves first, then raises a
    `UserError` of status 75. Raises `UserError` for every mistake of the input.
    """
    distributed.share_arena()
    distributed.start()
    distributed.use_compile_cache()
    notice, folder = distributed.Notice(), RunFolder(Path(out))
    if distributed.process_count() == 1:  # among others, JAX's coordination service listens
        notice.watch()
    try:
        with disk_errors(folder.path), locked(folder.path):
            return _Run(method, model, data, folder, config, notice, open_lesson).go()
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
    open_lesson: Open

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
                "dtype": resolve_dtype(config.dtype),
            }
        )

    def _already_done(self, recorded: Mapping[str, Any]) -> RunResult | None:
        """The result of a run that is over, told without reading model or data: for the very same command."""
        same = all(recorded[k] == v for k, v in self.asked.items())
        now = self.config.model_dump(mode="json")
        same &= all(recorded["config"].get(k) == now.get(k) for k in ("max_steps", "epochs", "limits"))
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
        lesson = self.open_lesson(self.method, self.data, self.config, tokenizer, _print)
        total = lesson.total
        self.folder.check_total(total, staged=bool(lesson.begins))
        weights = load_weights(source, mesh, self.config.spelled(tokenizer.encode))
        if lesson.objective.kind in HEADS:
            weights = HEADS[lesson.objective.kind](weights, mesh, self.config)
        self.config = self._settled(weights.model.adapter, lesson.objective)
        lesson.check(weights.model)
        machine = Machine(weights, lesson.objective, mesh, self.config, total, _print, lesson.begins)
        lesson = lesson.ready(machine, self.folder)
        self.folder.begin(self.asked, self.config, total)
        self.folder.write("data_report.json", lesson.report)
        return self._with_machine(machine, lesson, source, tokenizer)

    def _settled(self, adapter: Adapter | None, objective: Any) -> TrainConfig:
        """The configuration with what the model decides: its adapter where none was named, and the rate."""
        config = self.config if self.config.names_adapter else self.config.with_adapter(adapter)
        return config.model_copy(update={"learning_rate": learning_rate(config, objective.rates)})

    def _with_machine(
        self, machine: Machine, lesson: Lesson, source: ModelSource, tokenizer: Tokenizer
    ) -> RunResult:
        checkpoints = self._checkpoints(machine, lesson)
        if checkpoints.steps():
            machine.forget_start()
        found = checkpoints.restore(machine.parts(machine.abstract_state))
        start = found.step if found else 0
        _announce(machine, lesson, start)
        compiled: dict[str, float] = {"programs": 0, "seconds": 0.0, "late": 0}
        if start < machine.total:
            outcome, compiled = self._loop(machine, lesson, checkpoints, found)
            if outcome.preempted:
                raise _preempted(outcome.step, machine.total, self.folder.path)
            state, step, stopped = outcome.state, outcome.step, outcome.stopped
        else:
            state, step, stopped = _state_of(machine, found), start, ""
        result = self._export(machine, state, source, tokenizer)
        self._finish(step, result, stopped)
        return self._result(step, start, compiled)

    def _checkpoints(self, machine: Machine, lesson: Lesson) -> Checkpoints:
        identity = {"base_hash": machine.weights.loaded.base_hash, "data": lesson.identity}
        about = {"versions": versions(), "config": digest(self.config.model_dump(mode="json"))}
        return Checkpoints(
            self.folder.checkpoints, identity, about, keep=self.config.keep_checkpoints, say=_print
        )

    def _loop(
        self, machine: Machine, lesson: Lesson, checkpoints: Checkpoints, found: Restored | None
    ) -> tuple[Outcome, dict[str, float]]:
        start = found.step if found else 0
        programs = machine.train_programs([feed.abstract(b, machine.mesh) for b in lesson.abstract()])
        rates = learning_rates(machine.schedule, machine.total)
        common = {"parts": machine.parts, "rate": lambda step: float(rates[step])}
        parties, others = lesson.parties(programs, common)
        known = [programs, *others]
        compiled: dict[str, float] = {
            "programs": sum(len(p.table) for p in known),
            "seconds": sum(p.seconds for p in known),
        }
        _print(f"compiled {compiled['programs']} programs in {compiled['seconds']:.1f} s")
        progress = Progress.load(found.progress) if found else Progress()
        with self._sinks(machine.total, start) as (screen, sinks):
            checkpoints.say = screen.say
            for p in known:
                p.say = screen.say
            loop = Loop(
                self._plan(lesson),
                parties,
                checkpoints,
                sinks,
                _telling(lesson, screen),
                machine.speed,
                progress,
                self.notice,
            )
            state, before = _state_of(machine, found), COMPILATIONS.count
            distributed.keep_freed_memory(sum(p.temporary for p in known))
            outcome = loop.run(state, start)
        return outcome, compiled | {"late": COMPILATIONS.count - before}

    def _plan(self, lesson: Lesson) -> Plan:
        c = self.config
        every = c.eval_every or max(1, round(lesson.epoch))
        return Plan(lesson.total, c.log_every, c.checkpoint_every, every, lesson.epoch, c.max_nonfinite)

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

    def _finish(self, step: int, result: str, stopped: str) -> None:
        distributed.wait_for_all("the result is written")
        about = {"step": step, "result": result, "metrics": self._last(), "stopped": stopped}
        self.folder.write("result.json", about)
        if stopped:
            _print(f"ended before update {step + 1}: {stopped}")
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
        path, stopped = self.folder.path, result.get("stopped", "")
        return RunResult(path, step, start, self._last(), path / result["result"], compiled, stopped)


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


def _announce(machine: Machine, lesson: Lesson, start: int) -> None:
    trained, total = machine.weights.counts
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    _print(f"model: {total:,} parameters, {trained:,} trained, {machine.config.dtype}, on {devices}")
    if start:
        _print(f"resuming after step {start} of {machine.total}")
    for line in lesson.lines(start):
        _print(line)


def _telling(lesson: Lesson, screen: Screen) -> Callable[[int], None]:
    """The screen's `advance`, which also says what begins."""

    def advance(step: int) -> None:
        screen.advance(step)
        lesson.tell(step, screen)

    return advance


def _preempted(step: int, total: int, path: Path) -> UserError:
    return UserError(
        f"stopped by a signal after step {step} of {total}; the checkpoint is written",
        place=str(path),
        remedy="run the same command again to go on",
        status=distributed.PREEMPTED,
    )
