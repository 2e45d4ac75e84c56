"""What the jaxalign contenders share: the source, the mesh, the compilation cache and its counters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.batches import Steps
from benchmarks.measure import versions
from jaxalign.distributed import share_arena, use_compile_cache
from jaxalign.sharding import make_mesh
from jaxalign.train.programs import COMPILATIONS
from jaxalign.types import Batch, ModelSource

VERSIONS = ("jax", "jaxlib", "flax", "optax")


def prepare(job: Mapping[str, Any]) -> Any:
    """Sets the process up as a run does, with the cache the job names; returns the mesh."""
    share_arena()
    if job.get("cache"):
        use_compile_cache(Path(job["cache"]))
    return make_mesh()


def source(job: Mapping[str, Any], adapter: bool = False) -> ModelSource:
    """The folder that every contender reads, with the shared adapter on top where asked."""
    path = Path(job["adapter"]) if adapter else None
    return ModelSource("benchmark", Path(job["folder"]), adapter=path)


def say(text: str) -> None:
    """The package's remarks go to the log."""
    print(text, file=sys.stderr, flush=True)


def host_batch(steps: Steps, index: int) -> Batch:
    """Step `index` as one micro-batch, numpy leaves [A=1, B, G=1, T]."""
    at = index % len(steps.tokens)
    leaves = (steps.tokens, steps.mask, steps.segments, steps.positions)
    return Batch(*(leaf[at][None, :, None] for leaf in leaves))


def compiled(before: int) -> dict[str, int]:
    """`{"compiles": programs compiled since `before`}`: in a timed round it has to be 0."""
    return {"compiles": COMPILATIONS.count - before}


def device_peak() -> dict[str, float]:
    """`device_peak_mib` where the device reports it: the highest since the process started."""
    stats = jax.local_devices()[0].memory_stats()
    return {"device_peak_mib": stats["peak_bytes_in_use"] / 2**20} if stats else {}


def report() -> dict[str, Any]:
    """What a setup reply says of the interpreter, and the compilations so far (cache hits included)."""
    counts = {"compile_s": COMPILATIONS.seconds, "compiles": COMPILATIONS.count}
    return {"versions": versions(*VERSIONS), **counts}
