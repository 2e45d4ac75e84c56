"""Checkpoints: what trains, optimiser, step and key; never the frozen base. The only user of orbax."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from jaxalign import distributed
from jaxalign.errors import UserError
from jaxalign.train.settings import flatten

Parts = Mapping[str, Any]  # name -> pytree of arrays, e.g. params, opt, rest
Say = Callable[[str], None]

_TMP = ".orbax-checkpoint-tmp"
_FORMAT = 1


@dataclass(frozen=True)
class Restored:
    """One checkpoint read back: `parts` as they were asked for, and the `progress` saved with them."""

    step: int
    parts: dict[str, Any]
    progress: dict[str, Any]


@dataclass
class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>, written in the background and complete or absent.

    `identity` says what the run is made of (base hash, data): nested strings and numbers. A checkpoint of
    another identity is refused. `about` is kept beside it for the reader (versions, configuration digest).
    The `keep` newest checkpoints stay; `say` takes one-line warnings.
    """

    folder: Path
    identity: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    keep: int = 2
    say: Say = print
    _pending: tuple[int, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _quieten()
        if distributed.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"*{_TMP}*"):
                shutil.rmtree(left, ignore_errors=True)
        distributed.wait_for_all("checkpoints opened")

    def _path(self, step: int) -> str:
        return str((self.folder / str(step)).absolute())

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in ascending order."""
        found = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]
        return sorted(s for s in found if ocp.is_orbax_checkpoint(self._path(s)))

    def save(self, step: int, parts: Parts, progress: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays may be donated as soon as this returns.

        `progress` is JSON and small. Raises `UserError` when this save, or the one before it, fails.
        """
        self.wait()
        flat = {name: part for name, tree in parts.items() if (part := _by_path(tree))}
        metadata = {"format": _FORMAT, "step": step, "identity": self.identity, "about": self.about}
        metadata["progress"] = dict(progress)
        try:
            with _context():
                job = ocp.save_checkpointables_async(
                    self._path(step), flat, overwrite=True, custom_metadata=metadata
                )
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._pending = (step, job)

    def wait(self) -> None:
        """Returns when the last save is on disk; then the oldest checkpoints over `keep` are removed.

        Raises `UserError` when that save failed. The checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        (step, job), self._pending = self._pending, None
        try:
            job.result()
        except Exception as error:
            raise self._not_saved(step, error) from error
        if distributed.is_first():
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def close(self) -> None:
        """Waits like `wait`, but only tells of a failure: for the way out of another one."""
        try:
            self.wait()
        except UserError as error:
            self.say(f"warning: {error}")

    def restore(self, like: Parts) -> Restored | None:
        """The newest checkpoint that can be read, or None where there is none.

        like: the parts' trees of `ShapeDtypeStruct` with shardings, of any mesh.
        Unreadable newer checkpoints are put aside with a warning. Raises `UserError` when none can be read,
        or when the newest belongs to another base or data set.
        """
        broken: list[int] = []
        for step in reversed(self.steps()):
            found = self._read(step, like)
            if found is not None:
                self._put_aside(broken)
                return found
            broken.append(step)
        if broken:
            raise UserError(
                f"none of the {len(broken)} checkpoint(s) can be read",
                place=str(self.folder),
                remedy="restore the folder from a copy, or delete it to start the run again",
            )
        return None

    def _read(self, step: int, like: Parts) -> Restored | None:
        """One checkpoint, or None with a warning where its files are damaged."""
        try:
            metadata = self._metadata(step)
            self._check(step, metadata["identity"])
            return Restored(step, self._load(step, like), metadata["progress"])
        except UserError:
            raise
        except Exception as error:
            self.say(f"warning: checkpoint {step} cannot be read, trying an older one: {_short(error)}")
            return None

    def _metadata(self, step: int) -> dict[str, Any]:
        found: Any = ocp.checkpointables_metadata(self._path(step)).custom_metadata
        return {name: found[name] for name in ("identity", "progress")}

    def _load(self, step: int, like: Parts) -> dict[str, Any]:
        """One part at a time: of several, a failing one would leave the others' coroutines behind, and Python
        would complain about each."""
        loaded: dict[str, Any] = {}
        for name, tree in like.items():
            if wanted := _by_path(tree):
                loaded |= ocp.load_checkpointables(self._path(step), {name: wanted})
        return {name: _back(tree, loaded.get(name, {})) for name, tree in like.items()}

    def _check(self, step: int, saved: dict[str, Any]) -> None:
        before, now = flatten(saved), flatten(self.identity)
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        if changed:
            lines = "\n  ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in changed)
            raise UserError(
                f"checkpoint {step} belongs to another run; what changed:\n  {lines}",
                place=str(self.folder),
                remedy="use the same model and data again, or another output folder",
            )

    def _put_aside(self, steps: list[int]) -> None:
        if steps and distributed.is_first():
            for step in steps:
                aside = self.folder / f"unreadable-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
        distributed.wait_for_all("unreadable checkpoints put aside")

    def _not_saved(self, step: int, error: Exception) -> UserError:
        last = f"checkpoint {self.steps()[-1]} is whole" if self.steps() else "no checkpoint was written yet"
        return UserError(
            f"the checkpoint of step {step} could not be written: {_short(error)}",
            place=str(self.folder),
            remedy=f"{last}; free disk space, then run the same command again",
            status=1,
        )


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree, optax states included, under their dotted paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _back(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `_by_path`: a tree of the form of `like`."""
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    return jax.tree.map_with_path(lambda path, _: flat[key(path)], like)


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:300]


def _context() -> ocp.Context:
    """Copies of an array are written whole by one device, not in slices by all: slicing compiles programs."""
    context = ocp.Context()
    context.array.saving.use_replica_parallel = False
    return context


class _NoOrbax(logging.Filter):
    """Drops what orbax logs: it prints a traceback for every error that it also raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _quieten() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NoOrbax) for f in logger.filters):
        logger.addFilter(_NoOrbax())
