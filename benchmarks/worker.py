"""Entry point of a contender's process: `python -m benchmarks.worker benchmarks.torch_sft`.

Protocol, a JSON object a line: `{"op": "setup", "cpus": [0, 1], "job": {...}}` comes first and is answered by
what was loaded and compiled; then `{"op": "round", ...}`, each answered by timings; `{"op": "quit"}` ends it.
A reply with the key `error` carries a traceback.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback

from benchmarks.protocol import Channel

# A contender never runs on another device than its job says.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
# Linux: a worker that is stopped would otherwise outlive a parent that was killed.
PR_SET_PDEATHSIG = 1


def main(module: str) -> None:
    """Pins this process before anything heavy is imported, then hands over to `module.run(job, channel)`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Channel()
    try:
        message = channel.receive()
        if message["op"] == "quit":
            return
        # Thread pools size themselves by the affinity mask they find when they start.
        os.sched_setaffinity(0, message["cpus"])
        os.environ["JAX_PLATFORMS"] = PLATFORMS[message["job"].get("device", "cpu")]
        importlib.import_module(module).run(message["job"], channel)
    except Exception:
        channel.reply(error=traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
