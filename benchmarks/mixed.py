"""Greedy generation of answers of mixed lengths: jaxalign's slots against fixed batches of `generate`.

    python -m benchmarks.mixed --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data conversations.json --out benchmarks/results/mixed.json

Every answer ends at a length of its own, drawn log-uniformly: ours gets it as `max_tokens`, the peer as a
stopping criterion. A fixed batch waits for its longest answer; a slot is refilled.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import stats, tables
from benchmarks.generate import check
from benchmarks.machine import Guard
from benchmarks.prompts import Prompts
from benchmarks.protocol import OURS, Contender, Worker
from benchmarks.rounds import column, interleave, start, warnings
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "precision", "threads", "contender", "batch", "tok/s", "tok/CPU-s", "ours/this", "CPU-ours/this",
    "same-rows", "first-call-s", "peak-MiB", "max-load",
]
# fmt: on
COSTS = ("wall_s", "cpu_s")


def contenders(options: Any) -> list[Contender]:
    """Our engine and `generate`."""
    return [
        Contender(OURS, "benchmarks.jax_generate", options.python),
        Contender("generate", "benchmarks.torch_generate", options.peer_python, "generate"),
    ]


def measured(session: Session, workers: Sequence[Worker], guard: Guard, strict: int) -> dict[str, Any]:
    """First calls at every batch size, the comparison of answers, and interleaved rounds.

    A round is every prompt once. Ours and the peer go from batch size to batch size together.
    """
    count, sizes = session.options.count, session.options.batch
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for worker in workers:
        for batch in sizes:
            asked = {"op": "round", "batch": batch, "count": count, "tokens": True}
            first[worker.contender.name, batch] = worker.ask(asked)
    answers = {f"{name} {batch}": reply.pop("answers") for (name, batch), reply in first.items()}
    same = check({OURS: answers[f"{OURS} {sizes[0]}"], **answers}, strict)
    guard.settle()
    rounds: list[dict[str, Any]] = []
    for index in range(session.options.rounds):
        for batch in sizes:
            found = interleave(workers, {"batch": batch, "count": count}, [index], guard, session.say)
            rounds += [{**one, "batch": batch} for one in found]
    return {"first": first, "same": same, "rounds": rounds}


def rows(found: Mapping[str, Any], label: Mapping[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Table rows; `ours/this` compares with our best batch size, round by round."""

    def speed(name: str, batch: int, cost: str) -> list[float]:
        mine = [r for r in found["rounds"] if r["batch"] == batch]
        pairs = zip(column(mine, name, "tokens"), column(mine, name, cost), strict=True)
        return [tokens / seconds for tokens, seconds in pairs]

    best = {cost: max((stats.spread(speed(OURS, b, cost)).median, b) for b in sizes)[1] for cost in COSTS}
    out = []
    for (name, batch), first in found["first"].items():
        mine = [r for r in found["rounds"] if r["batch"] == batch]
        ours = {cost: speed(OURS, best[cost], cost) for cost in COSTS}
        against = {cost: stats.ratios(ours[cost], speed(name, batch, cost)) for cost in COSTS}
        row = {
            **label,
            "contender": name,
            "batch": batch,
            "tok/s": stats.spread(speed(name, batch, "wall_s")),
            "tok/CPU-s": stats.spread(speed(name, batch, "cpu_s")),
            "ours/this": against["wall_s"],
            "CPU-ours/this": against["cpu_s"],
            "same-rows": found["same"][f"{name} {batch}"]["rows"],
            "first-call-s": first["wall_s"],
            "peak-MiB": max(column(mine, name, "peak_mib")),
            "max-load": max(column(mine, name, "load")),
        }
        out.append(row)
    return out


def case(session: Session, precision: str, threads: int) -> dict[str, Any]:
    """All batch sizes in one precision and thread count."""
    options, guard = session.options, session.guard(threads)
    label = {"precision": precision, "threads": threads}
    session.say(f"\n{precision}, {threads} thread(s)")
    guard.settle()
    cache = str(session.work / f"cache-mixed-{precision}-{threads}")
    job = session.job(precision=precision, prompts=session.files["mixed-prompts"], cache=cache)
    starts, strict = {}, options.check if precision == "f32" and not options.random else 0
    with ExitStack() as stack:
        workers = []
        for contender in session.chosen(contenders(options)):
            worker, starts[contender.name] = start(contender, job, guard, session.work / "logs", session.say)
            workers.append(stack.enter_context(worker))
        found = measured(session, workers, guard, strict)
    for name, reply in starts.items():
        session.versions.setdefault(name, reply["versions"])
    table = rows(found, label, options.batch)
    peers = [row for row in table if row["contender"] != OURS]
    lines = warnings(found["rounds"])
    if peers:
        best = max(peers, key=lambda row: row["tok/s"].median)
        told = f"at its best batch size of {best['batch']}: {tables.cell(best['ours/this'])}"
        lines.insert(0, f"{precision} x{threads}: ours at its best over generate {told}")
    return {"case": label, "starts": starts, "rounds": found["rounds"], "rows": table, "headline": lines}


def main() -> None:
    """Runs every case and prints one table."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--batch", nargs="+", type=int, default=[16, 32, 64], help="slots, or rows of a batch")
    p.add_argument("--count", type=int, default=128, help="prompts of a round")
    p.add_argument("--prompt", nargs=2, type=int, default=[20, 300], help="prompt lengths in tokens")
    p.add_argument("--answer", nargs=2, type=int, default=[5, 200], help="answer lengths in tokens")
    p.add_argument("--check", type=int, default=4, help="prompts that f32 must answer equally")
    session = Session(p.parse_args())
    o = session.options
    how = {"count": o.count, "low": o.prompt[0], "high": o.prompt[1], "answer": o.answer}
    session.prepare([{"kind": "prompts", "name": "mixed-prompts", "how": how}])
    prompts = Prompts.load(session.files["mixed-prompts"])
    told = (
        f"{o.count} prompts of {prompts.lengths.mean():.0f} tokens and answers of {prompts.ends.mean():.0f}"
    )
    cases = (case(session, precision, t) for precision in o.precision for t in o.threads)
    notes = [f"{told} on average, of {o.answer[0]} to {o.answer[1]}", "the peer is no serving engine"]
    session.finish(__doc__.splitlines()[0], COLUMNS, cases, notes)


if __name__ == "__main__":
    sys.exit(exit_code(main))
