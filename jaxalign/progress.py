"""What long work over many items shows: a progress bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between two lines


class Meter:
    """Counts items, tokens and failures of the work called `what`."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.done = self.failed = self.tokens = 0
        self._console = Console(stderr=True)
        self._start = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(what, total=total, note="")

    def __enter__(self) -> Meter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def resume(self, count: int) -> None:
        """So many items were done before."""
        self.done += count
        self._show()

    def add(self, tokens: int) -> None:
        """One item is done."""
        self.done += 1
        self.spend(tokens)

    def fail(self, tokens: int) -> None:
        """One item is given up."""
        self.failed += 1
        self.add(tokens)

    def spend(self, tokens: int) -> None:
        """Tokens that finish no item."""
        self.tokens += tokens
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        failed = f", {self.failed} failed" if self.failed else ""
        note = f"{self.tokens / max(now - self._start, 1e-9):.0f} tokens/s{failed}"
        self._bar.update(self._task, completed=self.done, note=note)
        if not self._console.is_terminal and now - self._said > EVERY:
            self._said = now
            print(f"{self.what}: {self.done}/{self.total}, {note}", file=sys.stderr, flush=True)
