"""Compilation: flat in depth, nothing after warm-up in an epoch of mixed lengths, the state donated.

    python -m benchmarks.compile --peer-python .venv/bin/python --data conversations.json

Ends with status 4 where an epoch compiles something after its warm-up, or donation aliases too few bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import stats
from benchmarks.protocol import Contender
from benchmarks.rounds import interleave, start
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "task", "precision", "threads", "layers", "trace-s", "compile-s", "against-fewest", "aliased-bytes",
    "state-bytes", "steps", "row-lengths", "warm-up-compiles", "later-compiles",
]
# fmt: on


def depth_rows(found: Sequence[Mapping[str, Any]], label: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each depth: medians over the rounds, and the quotient to the shallowest."""
    depths = sorted({r["layers"] for r in found})
    seconds = {n: [r["compile_s"] for r in found if r["layers"] == n] for n in depths}
    trace = {n: [r["trace_s"] for r in found if r["layers"] == n] for n in depths}
    sizes = {r["layers"]: (r["alias_bytes"], r["state_bytes"]) for r in found}
    return [
        {
            "task": "training step",
            **label,
            "layers": n,
            "trace-s": stats.spread(trace[n]),
            "compile-s": stats.spread(seconds[n]),
            "against-fewest": stats.ratios(seconds[n], seconds[depths[0]]),
            "aliased-bytes": str(sizes[n][0]),
            "state-bytes": str(sizes[n][1]),
        }
        for n in depths
    ]


def epoch_row(found: Mapping[str, Any], label: Mapping[str, Any]) -> dict[str, Any]:
    """The row of one epoch."""
    return {
        "task": f"epoch, {'packed' if found['packing'] else 'length buckets'}",
        **label,
        "steps": found["steps"],
        "row-lengths": str(found["lengths"]),
        "warm-up-compiles": found["warmup_compiles"],
        "later-compiles": found["compiles"],
    }


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must not be: programs compiled after warm-up, a state that is not updated in place."""
    late = [
        f"{r['task']}: {r['later-compiles']} compiled after warm-up" for r in rows if r.get("later-compiles")
    ]
    sizes = [
        (r["layers"], int(r["aliased-bytes"]), int(r["state-bytes"])) for r in rows if "aliased-bytes" in r
    ]
    return late + [f"{n} layers: {a} of {s} bytes of the state are aliased" for n, a, s in sizes if a < s]


def case(session: Session, precision: str, threads: int) -> dict[str, Any]:
    """Depths, interleaved, then an epoch in length buckets and a packed one."""
    options, guard = session.options, session.guard(threads)
    label = {"precision": precision, "threads": threads}
    session.say(f"\n{precision}, {threads} thread(s)")
    guard.settle()
    job = session.job(precision=precision, batches=session.files["mixed"], learning_rate=2e-4, clip=1.0)
    ours = Contender("jaxalign", "benchmarks.jax_compile", options.python)
    worker, reply = start(ours, job, guard, session.work / "logs", session.say)
    session.versions["jaxalign"] = reply["versions"]
    depths: list[dict[str, Any]] = []
    with worker:
        for index in range(options.rounds):
            for layers in options.layers:
                message = {"task": "depth", "layers": layers}
                depths += interleave([worker], message, [index], guard, session.say)
        epochs = [
            worker.ask({"op": "round", "task": "epoch", "packing": packing}) for packing in (False, True)
        ]
    rows = [*depth_rows(depths, label), *(epoch_row(e, label) for e in epochs)]
    return {"case": label, "rounds": depths, "epochs": epochs, "rows": rows, "headline": faults(rows)}


def main() -> None:
    """Prints one table; raises where something compiles late or is not donated."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32])
    p.add_argument("--steps", type=int, default=6, help="steps that the epoch's examples fill")
    p.add_argument("--mixed-rows", type=int, default=2)
    p.add_argument("--mixed-length", type=int, default=512)
    session = Session(p.parse_args())
    o = session.options
    how = {"steps": o.steps, "rows": o.mixed_rows, "length": o.mixed_length}
    session.prepare([{"kind": "mixed", "name": "mixed", "how": how}])
    cases = (case(session, precision, t) for precision in o.precision for t in o.threads)
    wrong = [line for c in session.finish(__doc__.splitlines()[0], COLUMNS, cases) for line in c["headline"]]
    if wrong:
        raise stats.DifferentWorkError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(exit_code(main))
