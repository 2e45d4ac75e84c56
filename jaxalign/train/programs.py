"""Compiled steps: one program per batch shape, compiled before it is needed; all compilations counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass
class Compilations:
    """How many programs this process compiled (or read from the persistent cache), in how many seconds."""

    count: int = 0
    seconds: float = 0.0

    def heard(self, event: str, seconds: float) -> None:
        """Counts the event if it is a compilation."""
        if event == _EVENT:
            self.count += 1
            self.seconds += seconds


# JAX has no public way to take a listener back, so there is one for the life of the process.
COMPILATIONS = Compilations()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **_: COMPILATIONS.heard(event, duration_secs)
)


def shape_of(tree: Any) -> tuple[Any, ...]:
    """What decides which program runs: shape and dtype of every leaf."""
    return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


@dataclass
class Programs:
    """A jitted `function(*rest, batch)` as a table of compiled programs, one for each shape of `batch`.

    A shape that `prepare` did not see is compiled on the spot, and `say` is told so: it should not happen.
    `late` counts those. The last argument is the batch; the others keep their shapes over the whole run.
    """

    function: Any
    name: str
    say: Callable[[str], None]
    late: int = 0
    seconds: float = 0.0
    table: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def prepare(self, *args: Any) -> Any:
        """Compiles for these arguments (arrays or `ShapeDtypeStruct` with shardings), once; the program."""
        key = shape_of(args[-1])
        if key not in self.table:
            start = time.perf_counter()
            self.table[key] = self.function.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self.table[key]

    @property
    def temporary(self) -> int:
        """Bytes that the programs take while they run, all added up; 0 where that is not known."""
        found = (program.memory_analysis() for program in self.table.values())
        return sum(analysis.temp_size_in_bytes for analysis in found if analysis is not None)

    def __call__(self, *args: Any) -> Any:
        """Runs the program of the batch's shape. Returns at once: the device works on."""
        program = self.table.get(shape_of(args[-1]))
        if program is None:
            shapes = [leaf.shape for leaf in jax.tree.leaves(args[-1])]
            self.late += 1
            program = self.prepare(*args)
            self.say(
                f"recompiled {self.name} because of the new shape {shapes[0]} ({self.seconds:.1f} s in all)"
            )
        return program(*args)
