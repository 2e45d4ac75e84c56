"""One JSON object a line between the parent and a contender's process, and who may run when.

An idle contender is stopped with SIGSTOP: it cannot spin, whatever its thread pool would like to do, and no
setting of that pool has to be changed for it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "jaxalign"  # the name of our first row
ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """A contender failed or took too long. The message ends with the tail of its log."""


class Channel:
    """The worker's end. What libraries print to stdout goes to stderr: stdout carries the protocol alone."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The parent's next message; `{"op": "quit"}` when the parent is gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else {"op": "quit"}

    def reply(self, **fields: Any) -> None:
        """Answers the message received last."""
        self._out.write(json.dumps(fields) + "\n")


@dataclass(frozen=True)
class Contender:
    """One row of a table. `module` has `run(job, channel)`; `options` are merged into the job it gets.

    `rival` names the peer this row belongs to: the headline ratio is taken against the best row of a rival.
    It is empty for our own rows. `against` names that of ours which does the same work as this one.
    """

    name: str
    module: str
    python: str
    rival: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    against: str = OURS


class Worker:
    """A contender's process, stopped whenever it is not answering. Use as a context manager."""

    def __init__(self, contender: Contender, cpus: list[int], logs: Path) -> None:
        self.contender, self.cpus = contender, cpus
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{contender.name.replace(' ', '_')}-{os.getpid()}-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [contender.python, "-m", "benchmarks.worker", contender.module],
                cwd=ROOT,
                env=environment(len(cpus)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()

    def setup(self, job: Mapping[str, Any], timeout: float = 1800) -> dict[str, Any]:
        """Pins the process, imports its module and starts its job; the reply says what was loaded."""
        merged = {**job, **self.contender.options}
        return self.ask({"op": "setup", "cpus": self.cpus, "job": merged}, timeout)

    def ask(self, message: Mapping[str, Any], timeout: float = 1800) -> dict[str, Any]:
        """Lets the process run until it answers. Raises `WorkerError` on failure and on timeout."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], timeout)
            line = self._process.stdout.readline() if ready else b""
        except BrokenPipeError:
            line, ready = b"", [True]
        if not line.strip():
            cause = "ended without an answer" if ready else f"gave no answer in {timeout:.0f} s"
            raise WorkerError(f"{self.contender.name} {cause}; {self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.contender.name} failed: {answer['error']}")
        self._signal(signal.SIGSTOP)
        return answer

    def quit(self) -> None:
        """Asks the process to end, and ends it after ten seconds."""
        with self._process as process:  # leaving it closes the pipes and waits
            if process.poll() is not None or process.stdin is None:
                return
            self._signal(signal.SIGCONT)
            try:
                process.stdin.write(b'{"op": "quit"}\n')
                process.stdin.flush()
                process.wait(10)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                process.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _tail(self, lines: int = 25) -> str:
        text = self._log.read_text(errors="replace").splitlines()[-lines:]
        return f"its log {self._log} ends:\n" + "\n".join(text)


def environment(threads: int) -> dict[str, str]:
    """The environment of a worker: `threads` OpenMP threads, offline, and no simulated devices."""
    env = dict(os.environ)
    if "xla_force_host_platform_device_count" in env.get("XLA_FLAGS", ""):
        raise WorkerError("XLA_FLAGS simulates several devices; a benchmark needs the real ones: unset it")
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Both frameworks may sit on one card: neither may take it whole.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**env, **fixed}
