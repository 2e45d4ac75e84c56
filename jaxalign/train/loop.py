"""The training loop: feed, step, log one step late, evaluate, save, stop when told to. It knows no method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from jaxalign import distributed
from jaxalign.errors import UserError
from jaxalign.train.checkpoint import Checkpoints, Parts
from jaxalign.train.feed import Direct, Feed
from jaxalign.train.flops import Work
from jaxalign.train.metrics import Sink, Window
from jaxalign.types import Batch


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps (updates). `eval_every` None never evaluates."""

    total: int
    log_every: int = 10
    checkpoint_every: int = 200
    eval_every: int | None = None
    steps_per_epoch: float = math.inf
    max_nonfinite: int = 5


@dataclass(frozen=True)
class Speed:
    """What turns work into utilisation: flops(work), and the peak FLOP/s of one device (None: unknown)."""

    flops: Callable[[Work], float] = lambda work: 0.0
    peak: float | None = None


class Ended(Exception):  # noqa: N818, it is no error
    """Raised by `Parties.make` where no further update is to be made, with the reason in words. `back` gives
    the state that the run ends with, of the one it has come to."""

    def __init__(self, reason: str, back: Callable[[Any], Any]) -> None:
        super().__init__(reason)
        self.back = back


@dataclass(frozen=True)
class Parties:
    """Whom the loop calls.

    step(state, batch) -> (state, metrics)   compiled; returns at once, donates the state
    make(step) -> (batch, work)              the batch of a step, placed on the devices; called from a thread
    rows(step) -> ids                        ids of the rows in that batch, for messages
    rate(step) -> float                      the learning rate of that step
    parts(state) -> trees                    what a checkpoint holds
    evaluate(state) -> metrics               `eval_` names; called between steps
    facts(step) -> metrics                   what else a log line says of that step
    begin(state)                             told of the state before the first step
    feed                                     `Feed`, or `Direct` where a batch depends on the steps before it
    """

    step: Callable[[Any, Batch], tuple[Any, Mapping[str, Any]]]
    make: Callable[[int], tuple[Batch, Work]]
    parts: Callable[[Any], Parts]
    rows: Callable[[int], list[str]] = lambda step: []
    rate: Callable[[int], float] | None = None
    evaluate: Callable[[Any], dict[str, float]] | None = None
    facts: Callable[[int], dict[str, float]] = lambda step: {}
    begin: Callable[[Any], None] = lambda state: None
    feed: type[Feed] | type[Direct] = Feed


@dataclass
class Progress:
    """What a run has to remember between two processes, besides its state. Saved with every checkpoint."""

    tokens: int = 0
    evaluated: int = 0
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    train_seconds: float = 0.0
    window: Window = field(default_factory=Window)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Progress:
        """From the JSON that `asdict` gave."""
        return cls(**{**saved, "window": Window(**saved["window"])})


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: the state, the updates made, whether it was told to stop before the last one, and
    why it ended before that by itself, if it did."""

    state: Any
    step: int
    preempted: bool
    progress: Progress
    stopped: str = ""


@dataclass
class _Clock:
    """Seconds of pure training: evaluation, saving and compiling are left out."""

    mark: float = field(default_factory=time.perf_counter)
    window: float = 0.0
    steps: int = 0
    work: Work = field(default_factory=Work)

    def start(self) -> None:
        self.mark = time.perf_counter()

    def lap(self, work: Work) -> float:
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.window, self.steps = self.window + seconds, self.steps + 1
        self.work = self.work + work
        return seconds

    def rates(self, speed: Speed, left: int) -> dict[str, float]:
        if not self.steps or not self.window:
            return {}
        step_time, devices = self.window / self.steps, jax.local_device_count()
        tokens = self.work.tokens / self.window / devices
        out = {
            "tokens_per_sec": tokens * jax.device_count(),
            "tokens_per_sec_per_device": tokens,
            "step_time_sec": step_time,
        }
        if speed.peak:
            out["mfu"] = speed.flops(self.work) / self.window / devices / speed.peak
        self.window, self.steps, self.work = 0.0, 0, Work()
        return out | {"eta_sec": step_time * left}


@dataclass
class Loop:
    """Runs `parties` by `plan` from update `start` on. `sinks` take the log; `advance` every step made."""

    plan: Plan
    parties: Parties
    checkpoints: Checkpoints
    sinks: list[Sink]
    advance: Callable[[int], None] = lambda step: None
    speed: Speed = Speed()
    progress: Progress = field(default_factory=Progress)
    notice: distributed.Notice = field(default_factory=distributed.Notice)
    _pending: tuple[int, Work, Any] | None = None
    _clock: _Clock = field(default_factory=_Clock)
    _cold: bool = True

    def run(self, state: Any, start: int) -> Outcome:
        """Trains from update `start` to the last one, or until a notice comes; then the state is saved.

        Raises `UserError` after `max_nonfinite` skipped steps in a row, and when a checkpoint fails.
        """
        try:
            return self._run(state, start)
        except BaseException:
            self.checkpoints.close()
            raise

    def _run(self, state: Any, start: int) -> Outcome:
        step, stop, ended = start, False, None
        if start:  # a stop leaves no time for an evaluation that is due
            self._evaluate(state, start)
        self._clock.start()
        self.parties.begin(state)
        try:
            with self.parties.feed(self.parties.make, start, self.plan.total) as feed:
                for fed in feed:
                    state, metrics = self.parties.step(state, fed.batch)
                    self._settle()
                    self._pending, step = (fed.step, fed.work, metrics), fed.step + 1
                    stop = distributed.preempted(step, self.notice)
                    if self._pause(state, step, stop):
                        break
        except Ended as end:
            ended = end
        self._settle()
        if ended:
            state = self._end(state, step, ended)
        self.checkpoints.wait()
        preempted = stop and step < self.plan.total
        return Outcome(state, step, preempted, self.progress, str(ended) if ended else "")

    def _end(self, state: Any, step: int, ended: Ended) -> Any:
        """The state that an early end goes back to. The checkpoint is of the one it had come to: with another
        limit the same command goes on."""
        self.checkpoints.save(step, self.parties.parts(state), asdict(self.progress))
        state = ended.back(state)
        if self.parties.evaluate:
            self._write(step, self.parties.evaluate(state))
        return state

    def _pause(self, state: Any, step: int, stop: bool) -> bool:
        """What stands between two steps: evaluation and saving. True ends the run."""
        plan, over = self.plan, stop or step == self.plan.total
        test = (not stop or step == plan.total) and _due(step, plan.eval_every, plan.total)
        if not (over or test or step % plan.checkpoint_every == 0):
            return False
        self._settle()
        if test:
            self._evaluate(state, step)
        if over or step % plan.checkpoint_every == 0:
            self.checkpoints.save(step, self.parties.parts(state), asdict(self.progress))
        self._clock.start()
        return over

    def _evaluate(self, state: Any, step: int) -> None:
        """Evaluates and logs, if it is the step for it and it was not done before."""
        due = _due(step, self.plan.eval_every, self.plan.total) and self.progress.evaluated < step
        if self.parties.evaluate and due:
            self._write(step, self.parties.evaluate(state))
            self.progress.evaluated = step

    def _settle(self) -> None:
        """Waits for the step before, whose metrics are ready by now, and logs them if it is their turn."""
        if self._pending is None:
            return
        (step, work, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._time(work)
        self._count(step, values)
        self.progress.window.add(values)
        self.advance(done := step + 1)
        if done % self.plan.log_every == 0 or done == self.plan.total or done == 1:
            self._log(done)

    def _time(self, work: Work) -> None:
        if self._cold:  # the first step of a process pays for what is not warm yet
            self._cold = False
            self._clock.start()
            return
        self.progress.train_seconds += self._clock.lap(work)

    def _count(self, step: int, values: dict[str, float]) -> None:
        progress = self.progress
        progress.tokens += int(values.get("num_tokens", 0))
        bad = values.get("nonfinite", 0) > 0
        progress.skipped += int(values.get("skipped", bad))
        progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if bad else 0
        if progress.nonfinite_in_a_row >= self.plan.max_nonfinite:
            raise _not_finite(step, progress.nonfinite_in_a_row, self.parties.rows(step))

    def _log(self, step: int) -> None:
        values = self.progress.window.close() | {"epoch": step / self.plan.steps_per_epoch}
        values |= {"num_tokens": self.progress.tokens} | self.parties.facts(step - 1)
        if self.parties.rate:
            # A skipped step does not move the schedule.
            values["learning_rate"] = self.parties.rate(max(0, step - 1 - self.progress.skipped))
        values |= self._clock.rates(self.speed, self.plan.total - step)
        self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)


def _due(step: int, every: int | None, total: int) -> bool:
    return every is not None and (step % every == 0 or step == total)


def _not_finite(step: int, count: int, rows: list[str]) -> UserError:
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return UserError(
        f"the loss or its gradient was not a finite number in {count} steps in a row, the last of them step "
        f"{step + 1} with the rows {shown or 'unknown'}",
        place="training",
        remedy="those steps were skipped and the checkpoints are sound; look at the rows, lower "
        "learning_rate, or set dtype=f32, then start again",
        status=1,
    )
