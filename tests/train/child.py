"""A training process of its own that ends itself at a chosen point.

`python -m tests.train.child END OUT MODEL ROWS KEY=VALUE ...` with END `never`, `step:N` (SIGKILL once step N
was given to the device), or `save:N` (SIGKILL while the checkpoint of step N is being written).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.programs import Programs
from jaxalign.train.run import train
from jaxalign.train.settings import config_for


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(function: Callable[..., Any], over: Callable[..., bool]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        out = function(*args)
        if over(*args):
            _die()
        return out

    return wrapped


def plant(end: str) -> None:
    """Makes the process kill itself as `end` says."""
    kind, _, number = end.partition(":")
    given = itertools.count(1)  # training steps given to the device by this process
    if kind == "step":
        Programs.__call__ = _after(
            Programs.__call__, lambda self, *_: "training" in self.name and next(given) >= int(number)
        )
    if kind == "save":
        Checkpoints.save = _after(Checkpoints.save, lambda self, step, *_: step >= int(number))


def main() -> None:
    end, out, model, rows, *keys = sys.argv[1:]
    plant(end)
    try:
        train("sft", model, rows, out, load_config(config_for("sft"), overrides=keys))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":
    assert Path(sys.argv[3]).is_dir()
    main()
