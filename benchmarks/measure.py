"""What a worker measures about itself: wall time, CPU seconds of all its threads, resident memory."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.protocol import Channel

STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """Peak resident memory (VmHWM) since the start or since the last `reset_peak`, in MiB."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak() -> bool:
    """Starts the peak anew at the present size, so that loading and training are told apart.

    False where the kernel cannot: then the peak counts from the start of the process, loading included.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of these distributions in this interpreter."""
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


class Clock:
    """Wall and CPU time since the last `lap`."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> dict[str, float]:
        """`wall_s` and `cpu_s` (all threads, user and system) since the last lap; starts the next."""
        now = (time.perf_counter(), time.process_time())
        last, self._last = getattr(self, "_last", now), now
        return {"wall_s": now[0] - last[0], "cpu_s": now[1] - last[1]}


def serve(channel: Channel, round_: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """Answers every `round` with what `round_` returns, its times and the peak memory, until `quit`."""
    while (message := channel.receive())["op"] != "quit":
        clock = Clock()
        result = round_(message)
        times = clock.lap()
        channel.reply(**times, **result, peak_mib=peak_mib())
