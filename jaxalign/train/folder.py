"""A run's output folder: what is in it, whose run it is, and whether that run is over.

config.yaml       the resolved configuration, with method, model and data: `-c` takes it
versions.json     packages, devices and seed
data_report.json  what became of the rows
metrics.jsonl     one line per log and per evaluation; tb/ has the same for TensorBoard
checkpoints/      what the same command resumes from
adapter/, model/  the result: a PEFT adapter, or a whole model
result.json       written last: the run is over
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxalign import distributed
from jaxalign.config import dump_config
from jaxalign.errors import UserError
from jaxalign.registry import ADAPTERS
from jaxalign.train.settings import TrainConfig, differences
from jaxalign.yaml_layers import inline

PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """The folder `path`; every file is written by the first process alone, and whole or not at all."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it is absent. Raises `UserError` when it is damaged."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"not JSON ({error.msg})",
                place=f"{file}:{error.lineno}",
                remedy="delete the file, or restore it from a copy",
            ) from error

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Replaces a JSON file."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file."""
        if not distributed.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f".{name}.tmp"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path / name)

    def begin(self, asked: Mapping[str, Any], config: TrainConfig, total: int) -> None:
        """Writes what the run is, before its first step. `asked`: method, model and data."""
        head = "".join(f"{name}: {inline(value)}\n" for name, value in asked.items())
        self.write_text("config.yaml", head + dump_config(config))
        self.write("versions.json", versions() | {"seed": config.seed})
        self.write("run.json", {**asked, "total": total, "config": config.model_dump(mode="json")})

    def check_total(self, total: int, staged: bool = False) -> None:
        """Raises `UserError` when the run was planned for more than `total` steps, as its schedule was; in
        stages (`staged`) for any other number, as where they end was."""
        recorded = self.read("run.json")
        if recorded and (total < recorded["total"] or (staged and total != recorded["total"])):
            least = "as they were: stages end where they end" if staged else "no lower than before"
            raise UserError(
                f"the run in this folder was planned for {recorded['total']} steps, now there are {total}",
                place=str(self.path),
                remedy=f"set max_steps (or epochs) {least}, or choose another output folder",
            )

    def finished(self, total: int) -> dict[str, Any] | None:
        """The result of a run that is over or ended early, or None while there are steps to make."""
        result = self.read("result.json")
        return result if result and (result["step"] >= total or result.get("stopped")) else None


def adopt(config: TrainConfig, recorded: Mapping[str, Any] | None) -> TrainConfig:
    """`config` with the keys that it leaves open as the folder's run resolved them."""
    if recorded is None:
        return config
    before = type(config).model_validate(recorded["config"])
    open_keys = [name for name in ("batch_size", "learning_rate") if getattr(config, name) is None]
    open_keys += ["dtype"] if config.dtype == "auto" else []
    open_keys += [] if config.names_adapter else list(ADAPTERS)
    return config.model_copy(update={name: getattr(before, name) for name in open_keys})


def check_same(path: Path, recorded: Mapping[str, Any], method: str, config: TrainConfig) -> None:
    """Raises `UserError` that names the keys in which `config` is not the folder's run."""
    changed = differences(recorded["config"], config.model_dump(mode="json"))
    if recorded["method"] != method:
        changed.insert(0, f"method: {recorded['method']} -> {method}")
    if changed:
        raise UserError(
            "the folder holds a run with another configuration:\n  " + "\n  ".join(changed),
            place=str(path),
            remedy="use the same keys to go on with it, or choose another output folder",
        )


def versions() -> dict[str, Any]:
    """Packages, Python, platform and devices of this process."""
    import jax

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None  # run from a checkout, or not needed here
    kind = jax.devices()[0].device_kind
    return found | {"device": kind, "devices": jax.device_count(), "processes": jax.process_count()}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock goes with the process, however it ends.

    Raises `UserError` when another one has it.
    """
    if not distributed.is_first():
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as file:
        if not _take(file):
            raise UserError(
                "another process is training into this folder",
                place=str(path),
                remedy="wait for it, stop it, or choose another output folder",
            )
        yield


def _take(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no such lock
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's word for a full or forbidden disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space, then run the same command again: it goes on from the last checkpoint"
            raise UserError("the disk is full", place=str(error.filename or path), remedy=remedy) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            remedy = "check the path and its permissions, or choose another output folder"
            raise UserError(str(error.strerror), place=str(error.filename or path), remedy=remedy) from error
        raise
