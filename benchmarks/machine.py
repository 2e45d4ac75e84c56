"""The machine, its load, and the rule that a loaded machine publishes nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import ROOT

CARD = "name,memory.total,driver_version"


class LoadTooHighError(Exception):
    """Something else is running: a ratio measured now would be wrong."""


def load_average() -> float:
    """The 1-minute load average."""
    return os.getloadavg()[0]


@dataclass(frozen=True)
class Guard:
    """The abort rule: the 1-minute load may not pass 1.2 times our own threads.

    `settle` waits for the load to fall before a configuration; `check` is called before each round. With
    `allow` a loaded round is flagged in the results instead of ending the run.
    """

    threads: int
    allow: bool = False
    factor: float = 1.2
    patience: float = 300.0
    read: Callable[[], float] = load_average
    sleep: Callable[[float], None] = time.sleep

    @property
    def limit(self) -> float:
        """The highest load that is quiet."""
        return self.factor * self.threads

    def settle(self) -> float:
        """Waits until the load is under the limit; raises `LoadTooHighError` after `patience` seconds."""
        waited = 0.0
        while (load := self.read()) > self.limit and not self.allow:
            if waited >= self.patience:
                raise LoadTooHighError(f"load {load:.2f} stayed over {self.limit:.2f} for {waited:.0f} s")
            self.sleep(5.0)
            waited += 5.0
        return load

    def check(self) -> dict[str, Any]:
        """`{"load": x, "loaded": bool}` before a round; raises `LoadTooHighError` unless `allow`."""
        load = self.read()
        loaded = load > self.limit
        if loaded and not self.allow:
            raise LoadTooHighError(f"load {load:.2f} is over {self.limit:.2f} (1.2 x {self.threads} threads)")
        return {"load": round(load, 2), "loaded": loaded}


def cpus(threads: int) -> list[int]:
    """The first `threads` processors this process may use; raises when there are fewer."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"{threads} threads asked for, {len(allowed)} processor(s) here")
    return allowed[:threads]


def describe() -> dict[str, Any]:
    """Processor, memory, accelerator, kernel and commit; nothing that names the host."""
    git = ("git", "-C", str(ROOT))
    return {
        "processor": _field(Path("/proc/cpuinfo"), "model name"),
        "processors": len(os.sched_getaffinity(0)),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "accelerator": _output("nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"),
        "kernel": platform.release(),
        "commit": _output(*git, "rev-parse", "--short", "HEAD"),
        "modified": bool(_output(*git, "status", "--porcelain", "--", "jaxalign", "benchmarks/*.py")),
    }


def _field(path: Path, key: str) -> str:
    """The value after `key` in a `key : value` file, or an empty string."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(key)), "")


def _output(*command: str) -> str:
    """What a command prints, or an empty string where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
