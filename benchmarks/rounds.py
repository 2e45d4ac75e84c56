"""Interleaved rounds: A B A B ... in one run, each before the machine's load has been looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Guard, cpus
from benchmarks.protocol import Contender, Worker

Say = Callable[[str], None]
Rounds = list[dict[str, Any]]


def one_round(
    worker: Worker, message: Mapping[str, Any], guard: Guard, index: int, say: Say
) -> dict[str, Any]:
    """One contender's turn: the load is checked and printed, then it runs; its timings with the load."""
    name = worker.contender.name
    load = guard.check()
    answer = worker.ask({"op": "round", **message})
    mark = "  LOADED" if load["loaded"] else ""
    say(
        f"  round {index} {name:<28} load {load['load']:.2f}{mark}  "
        f"{answer['wall_s']:8.3f} s  {answer['cpu_s']:8.3f} CPU-s"
    )
    return {"contender": name, "round": index, **load, **answer}


def interleave(
    workers: Sequence[Worker], message: Mapping[str, Any], indices: Iterable[int], guard: Guard, say: Say
) -> Rounds:
    """A round of every worker in turn for each of `indices`. `message` is what a round is asked to do."""
    return [one_round(w, message, guard, i, say) for i in indices for w in workers]


def start(
    contender: Contender, job: Mapping[str, Any], guard: Guard, logs: Path, say: Say
) -> tuple[Worker, dict]:
    """A worker that has loaded and compiled, and what it said of that; `ready_s` counts from its launch."""
    say(f"  starting {contender.name}")
    begun = time.perf_counter()
    worker = Worker(contender, cpus(guard.threads), logs)
    try:
        reply = worker.setup(job)
        return worker, {**reply, "ready_s": time.perf_counter() - begun}
    except BaseException:
        worker.quit()
        raise


def column(rounds: Iterable[Mapping[str, Any]], contender: str, key: str) -> list[float]:
    """One contender's values of `key`, in order of rounds."""
    return [r[key] for r in rounds if r["contender"] == contender]


def warnings(rounds: Iterable[Mapping[str, Any]]) -> list[str]:
    """What speaks against publishing these rounds."""
    rounds = list(rounds)
    loaded, late = sum(r["loaded"] for r in rounds), sum(r.get("compiles", 0) for r in rounds)
    lines = [f"LOADED machine in {loaded} of {len(rounds)} rounds: not to be published"] * bool(loaded)
    return lines + [f"{late} programs were compiled inside timed rounds"] * bool(late)
