"""Interleaved rounds: A B A B ... in one run, each before the machine's load has been looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Guard, cpus
from benchmarks.protocol import Contender, Worker

Say = Callable[[str], None]
Rounds = list[dict[str, Any]]


def one_round(worker: Worker, message: Mapping[str, Any], guard: Guard, index: int, say: Say) -> dict[str, Any]:
    """One contender's turn: the load is checked and printed, then it runs; returns its timings with the load."""
    name = worker.contender.name
    load = guard.check()
    answer = worker.ask({"op": "round", **message})
    mark = "  LOADED" if load["loaded"] else ""
    say(
        f"  round {index} {name:<28} load {load['load']:.2f}{mark}  "
        f"{answer['wall_s']:8.3f} s  {answer['cpu_s']:8.3f} CPU-s"
    )
    return {"contender": name, "round": index, **load, **answer}


def interleave(workers: Sequence[Worker], message: Mapping[str, Any], count: int, guard: Guard, say: Say) -> Rounds:
    """`count` rounds of every worker in turn. `message` is what a round is asked to do."""
    return [one_round(w, message, guard, i, say) for i in range(count) for w in workers]


def start(contender: Contender, job: Mapping[str, Any], guard: Guard, logs: Path, say: Say) -> tuple[Worker, dict]:
    """A worker that has loaded and compiled, and what it said about that."""
    say(f"  starting {contender.name}")
    worker = Worker(contender, cpus(guard.threads), logs)
    try:
        return worker, worker.setup(job)
    except BaseException:
        worker.quit()
        raise


def column(rounds: Iterable[Mapping[str, Any]], contender: str, key: str) -> list[float]:
    """One contender's values of `key`, in order of rounds."""
    return [r[key] for r in rounds if r["contender"] == contender]
