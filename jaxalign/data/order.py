"""Which rows an update takes: a pure function of (seed, step), so that the step is the data position."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxalign.errors import UserError


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` rows in one epoch: a function of its arguments on every machine and numpy release.

    It ranks raw Philox words, which numpy guarantees; `Generator.permutation` may change between releases.
    """
    words = np.random.Philox(key=np.asarray([seed % 2**64, epoch], np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")


class Order(Protocol):
    """An order of rows, in one stage or several."""

    @property
    def begins(self) -> tuple[int, ...]:
        """The numbers of updates after which another stage begins."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order besides seed, number of rows and batch size, as JSON."""
        ...

    def at(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows of update number `step`, counted from 0."""
        ...

    def steps(self, epochs: float) -> int:
        """Updates that make `epochs` passes over the rows; at least 1."""
        ...

    def facts(self, step: int) -> dict[str, float]:
        """What metrics say of the place of a step."""
        ...

    def line(self, step: int) -> str:
        """The same in words, or nothing."""
        ...

    def report(self) -> list[dict[str, Any]]:
        """Its stages, if any, as JSON."""
        ...


class Shuffled:
    """Row after row, epoch after epoch, each in its own order. An update may span two epochs, so that none
    is smaller. `rows`: indices int64 [n]."""

    begins: tuple[int, ...] = ()

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._known: tuple[int, np.ndarray] = (-1, rows)

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def at(self, step: int) -> np.ndarray:
        """As in `Order`."""
        flat = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(flat, len(self.rows))
        return np.concatenate([self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _epoch(self, epoch: int) -> np.ndarray:
        known, order = self._known  # a cache, not a state: any step may be asked for, from any thread
        if known != epoch:
            order = self.rows[permutation(self.seed, epoch, len(self.rows))]
            self._known = (epoch, order)
        return order

    def steps(self, epochs: float) -> int:
        """As in `Order`; the last pass is rounded up."""
        return max(1, math.ceil(epochs * len(self.rows) / self.batch_size - 1e-9))

    def facts(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def line(self, step: int) -> str:
        """Nothing."""
        return ""

    def report(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []


@dataclass(frozen=True)
class Stage:
    """Rows that are trained on together, before those of the next stage.

    rows  indices int64 [n], in the order of the data
    name  the file that they come from, or what they were sorted by
    gap   (largest, smallest) of what they were sorted by
    """

    rows: np.ndarray
    name: str = ""
    gap: tuple[float, float] | None = None

    def about(self) -> str:
        """In words: how many rows, which ones."""
        rows = f"{len(self.rows)} rows"
        if self.gap is None:
            return f"{rows} of {self.name}" if self.name else rows
        return f"{rows}, {self.name} {self.gap[0]:.4g} to {self.gap[1]:.4g}"


class Staged:
    """Stages one after another, each `Shuffled` by itself: no update takes rows of two.

    ends  the number of updates after which each stage is over, ascending (`stage_ends`)
    """

    def __init__(self, stages: Sequence[Stage], ends: Sequence[int], batch_size: int, seed: int) -> None:
        self.stages, self.ends = tuple(stages), tuple(ends)
        self._orders = [Shuffled(stage.rows, batch_size, seed) for stage in stages]

    @property
    def begins(self) -> tuple[int, ...]:
        """As in `Order`."""
        return self.ends[:-1]

    @property
    def identity(self) -> dict[str, Any]:
        """Where the stages end, and what is in them."""
        digest = hashlib.sha256()
        for stage in self.stages:
            digest.update(len(stage.rows).to_bytes(8, "little") + stage.rows.astype("<i8").tobytes())
        return {"ends": list(self.ends), "stages": digest.hexdigest()}

    def stage(self, step: int) -> int:
        """The stage of an update, from 0; updates after the end belong to the last one."""
        return min(bisect_right(self.ends, step), len(self.ends) - 1)

    def at(self, step: int) -> np.ndarray:
        """As in `Order`."""
        index = self.stage(step)
        return self._orders[index].at(step - (0, *self.ends)[index])

    def steps(self, epochs: float) -> int:
        """As in `Order`: `epochs` passes over every stage, each rounded up."""
        return sum(order.steps(epochs) for order in self._orders)

    def facts(self, step: int) -> dict[str, float]:
        """`stage`, counted from 1."""
        return {"stage": self.stage(step) + 1}

    def line(self, step: int) -> str:
        """`stage 2 of 3: updates 11 to 20, 80 rows, rating_gap 1.5 to 0.5`."""
        index = self.stage(step)
        updates = f"updates {(0, *self.ends)[index] + 1} to {self.ends[index]}"
        return f"stage {index + 1} of {len(self.ends)}: {updates}, {self.stages[index].about()}"

    def report(self) -> list[dict[str, Any]]:
        """Every stage as JSON: rows, updates, name, gap."""
        begins = (0, *self.ends)
        return [
            {"rows": len(s.rows), "updates": [begin + 1, end], "name": s.name, "gap": s.gap}
            for s, begin, end in zip(self.stages, begins, self.ends, strict=False)
        ]


def stage_ends(
    stages: Sequence[Stage], batch_size: int, epochs: float, max_steps: int | None
) -> tuple[int, ...]:
    """The `ends` of `Staged`: `epochs` passes over each stage, or `max_steps` shared out by their rows.

    Raises `UserError` where `max_steps` leaves a stage without an update.
    """
    if max_steps is None:
        steps = [Shuffled(stage.rows, batch_size, 0).steps(epochs) for stage in stages]
        return tuple(np.cumsum(steps).tolist())
    rows = np.cumsum([len(stage.rows) for stage in stages])
    ends = np.floor(rows / rows[-1] * max_steps + 0.5).astype(int)
    empty = np.flatnonzero(np.diff(ends, prepend=0) < 1)
    if empty.size:
        raise UserError(
            f"{max_steps} updates leave none to stage {empty[0] + 1} of {len(stages)}",
            place="max_steps",
            remedy="raise it, or leave it out: epochs counts passes over each stage",
        )
    return tuple(ends.tolist())


def in_order(size: int, count: int) -> list[Stage]:
    """`size` rows as they stand, in `count` parts of one size or nearly so. Raises `UserError` for too few
    rows."""
    return [Stage(part) for part in _parts(np.arange(size), count)]


def by_gap(gaps: np.ndarray, count: int, name: str) -> list[Stage]:
    """`count` parts of one size or nearly so, the largest gaps [n] first; of equal gaps the first row first.

    Raises `UserError` for too few rows. Curry-DPO, arXiv:2403.07230, section 3.1.
    """
    parts = _parts(np.argsort(-gaps, kind="stable"), count)
    return [Stage(np.sort(p), name, (float(gaps[p].max()), float(gaps[p].min()))) for p in parts]


def by_file(files: Sequence[str]) -> list[Stage]:
    """A stage for each file, in the order in which they appear; `files`: that of every row."""
    names = list(dict.fromkeys(files))
    return [Stage(np.flatnonzero([f == name for f in files]), name) for name in names]


def _parts(rows: np.ndarray, count: int) -> list[np.ndarray]:
    if len(rows) < count:
        raise UserError(
            f"{len(rows)} rows do not make {count} stages",
            place="stages.count",
            remedy="lower it, or give more rows",
        )
    return np.array_split(rows, count)
