"""Batches on their way to the devices: made and placed by a thread, ahead of the step that runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.sharding import RULES
from jaxalign.train.flops import Work
from jaxalign.types import Batch


class Source(Protocol):
    """Batches by step: `batch(step)` is a pure function of its argument. Leaves [A, B_local, G, T]."""

    def batch(self, step: int) -> Batch:
        """The micro-batches of one update, on the host."""
        ...


def batch_sharding(mesh: Mesh, leading: int) -> NamedSharding:
    """How a batch leaf lies: `leading` whole axes, then the row axis over the mesh's data axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, RULES["batch"]))


def place(batch: Batch, mesh: Mesh, leading: int = 1) -> Batch:
    """A host batch (this process's rows) as arrays over all devices; `leading` axes stand before the rows."""
    sharding = batch_sharding(mesh, leading)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def abstract(batch: Batch, mesh: Mesh, leading: int = 1) -> Batch:
    """The `ShapeDtypeStruct`s of `place(batch)`, without touching a device."""
    sharding = batch_sharding(mesh, leading)

    def leaf(x: Any) -> Any:
        shape = list(x.shape)
        shape[leading] *= jax.process_count()
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, batch)


@dataclass(frozen=True)
class Fed:
    """One step's batch on the devices, and what it holds."""

    step: int
    batch: Batch
    work: Work


class Feed:
    """Iterates over `Fed` for steps `first` to `last` - 1; a thread stays `ahead` batches in front.

    An error in the thread is raised where its batch is asked for. Leaving the context ends the thread.
    """

    def __init__(
        self, make: Callable[[int], tuple[Batch, Work]], first: int, last: int, ahead: int = 2
    ) -> None:
        self._make, self._steps, self._stop = make, range(first, last), threading.Event()
        self._ready: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=ahead)
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[Fed]:
        for _ in self._steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if self._stop.is_set():
                    return
                self._ready.put(Fed(step, *self._make(step)))
        except BaseException as error:  # handed to the reader, whatever it is
            self._ready.put(error)


class Direct:
    """`Feed` without a thread: a batch is made when it is asked for, by what the steps before it left."""

    def __init__(self, make: Callable[[int], tuple[Batch, Work]], first: int, last: int) -> None:
        self._make, self._steps = make, range(first, last)

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""

    def __iter__(self) -> Iterator[Fed]:
        for step in self._steps:
            yield Fed(step, *self._make(step))
