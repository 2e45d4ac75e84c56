"""What a run tells: `metrics.jsonl`, TensorBoard events, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

Values = Mapping[str, float]

SKIPS = ("nonfinite", "skipped")  # shown where there are any
SUMMED = ("num_tokens", *SKIPS)  # counts of a step; every other metric is averaged over the window


@dataclass
class Window:
    """The steps since the last log line. Plain numbers, so that a checkpoint can hold it half full.

    A step that was skipped for a value that is not finite counts in `nonfinite` alone.
    """

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def add(self, values: Values) -> None:
        """Takes in the metrics of one step."""
        self.steps += 1
        skipped = values.get("nonfinite", 0) > 0
        for name, value in values.items():
            if name in SUMMED or not skipped:
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.weights[name] = self.weights.get(name, 0) + 1

    def close(self) -> dict[str, float]:
        """The means (sums for counts) of the window, which is empty afterwards."""
        out = {k: v if k in SUMMED else v / self.weights[k] for k, v in self.sums.items()}
        self.steps, self.sums, self.weights = 0, {}, {}
        return out

    def state(self) -> dict[str, Any]:
        """As JSON; `Window(**state)` is the window again."""
        return asdict(self)


class Sink(Protocol):
    """Where log lines go. `step` is the number of updates made."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes one line."""
        ...

    def close(self) -> None:
        """Lets go of files."""
        ...


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, on disk when `write` returns. What is not finite is null."""

    def __init__(self, path: Path, after: int) -> None:
        """Opens `path` for appending. Lines of steps after `after` are dropped: they will be made again."""
        truncate(path, after)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        row = {"step": step, **{k: _finite(v) for k, v in values.items()}, "time": round(time.time(), 3)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate(path: Path, after: int) -> None:
    """Drops the lines of steps after `after`, in one atomic replacement."""
    if not path.exists():
        return
    rows = [row for row in read_lines(path) if row["step"] <= after]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(draft, path)


class TensorBoard:
    """Event files for TensorBoard; `eval_x` is shown as `eval/x`, the rest under `train/`."""

    def __init__(self, folder: Path, after: int) -> None:
        """Opens a new event file that hides events of steps after `after`."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one scalar per number."""
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(_tag(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class Screen(Sink, Protocol):
    """A sink that people watch."""

    def say(self, text: str) -> None:
        """Shows a message."""
        ...

    def advance(self, step: int) -> None:
        """Notes that `step` updates were made."""
        ...


class PlainProgress:
    """One line of text per log line: what a file, a pod's log or a pipe wants."""

    def __init__(self, total: int, stream: IO[str]) -> None:
        self._total, self._stream = total, stream

    def say(self, text: str) -> None:
        """Prints a message."""
        print(text, file=self._stream, flush=True)

    def advance(self, step: int) -> None:
        """A step was made; nothing to print."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Prints the metrics."""
        self.say(f"step {step}/{self._total}  {describe(values)}")

    def close(self) -> None:
        """Nothing to let go of."""


class RichProgress:
    """A progress bar on a terminal, with the metrics printed above it."""

    def __init__(self, total: int, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._total = total
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=Console(file=stream))
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def say(self, text: str) -> None:
        """Prints a message above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Prints the metrics and shows the time left beside the bar."""
        self.say(f"step {step}/{self._total}  {describe(values)}")
        if "eta_sec" in values:
            self._bar.update(self._task, description=f"{clock(values['eta_sec'])} left")

    def close(self) -> None:
        """Leaves the bar where it is."""
        self._bar.stop()


class Silent:
    """Takes everything and shows nothing: the other processes of a run."""

    def say(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def make_screen(total: int, stream: IO[str] | None = None) -> Screen:
    """A bar where `stream` (stderr by default) is a terminal, plain lines elsewhere; `total` steps."""
    out: IO[str] = sys.stderr if stream is None else stream
    return RichProgress(total, out) if out.isatty() else PlainProgress(total, out)


_SHOWN = {
    "tokens_per_sec": lambda v: f"{v:,.0f} tokens/s",
    "step_time_sec": lambda v: f"{v:.3g} s/step",
    "mfu": lambda v: f"mfu {100 * v:.1f} %",
    "eta_sec": lambda v: f"{clock(v)} left",
    "learning_rate": lambda v: f"lr {v:.2e}",
    "num_tokens": lambda v: f"{v:,.0f} tokens",
}
_HIDDEN = ("epoch", "tokens_per_sec_per_device", "entropy", "eval_entropy", "num_targets")


def describe(values: Mapping[str, Any]) -> str:
    """Metrics in one line: `loss 1.234  grad_norm 0.51  lr 2.00e-04  1,234 tokens/s  ...`."""
    parts = []
    for name, value in sorted(values.items(), key=lambda item: item[0] not in ("loss", "eval_loss")):
        if name in _HIDDEN or value is None or (name in SKIPS and not value):
            continue
        parts.append(_SHOWN[name](value) if name in _SHOWN else f"{name} {value:.4g}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
