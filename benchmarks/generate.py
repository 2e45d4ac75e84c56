"""Greedy generation: jaxalign's engine against transformers' `generate`, a forced number of tokens.

    python -m benchmarks.generate --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data conversations.json --out benchmarks/results/generate.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import flops, stats, tables
from benchmarks.machine import Guard
from benchmarks.prompts import Prompts
from benchmarks.protocol import OURS, Contender, Worker
from benchmarks.rounds import column, interleave, start, warnings
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "batch", "precision", "threads", "contender", "tok/s", "tok/CPU-s", "ours/this", "CPU-ours/this",
    "prefill-s", "decode-ms/step", "bandwidth%", "same-rows", "same-tokens", "ready-s", "first-call-s",
    "peak-MiB", "device-MiB", "max-load",
]
# fmt: on
ITEM = {"f32": 4, "bf16": 2}


def contenders(options: Any, precision: str) -> list[Contender]:
    """Our row and the settings of `generate` that can be its best on this device."""
    peer, module = options.peer_python, "benchmarks.torch_generate"
    rows = [
        Contender(OURS, "benchmarks.jax_generate", options.python),
        Contender("generate, dynamic cache", module, peer, "generate"),
        # On a card transformers compiles the decoding step of a static cache by itself.
        Contender("generate, static cache", module, peer, "generate", {"cache_kind": "static"}),
    ]
    if precision == "bf16":
        how = {"weights": "f32", "autocast": True}
        rows.append(Contender("generate, f32 weights + autocast", module, peer, "generate", how))
    return rows


def warm(worker: Worker, batch: int, new: int) -> dict[str, Any]:
    """The first call of a batch size, with its answers, then one more of either kind that is timed later."""
    first = worker.ask({"op": "round", "batch": batch, "new": new, "tokens": True})
    worker.ask({"op": "round", "batch": batch, "new": 1})
    worker.ask({"op": "round", "batch": batch, "new": new})
    return first


def check(answers: Mapping[str, list[list[int]]], strict: int) -> dict[str, dict[str, float]]:
    """How far each peer's answers agree with ours; the first `strict` rows must be equal token for token."""
    ours = answers[OURS]
    for name, theirs in answers.items():
        same = stats.agreement(ours[:strict], theirs[:strict]) if strict else {"rows": 1.0}
        if same["rows"] < 1:
            raise stats.DifferentWorkError(
                f"{name} answers the first {strict} prompts differently: {same['rows']:.0%} rows equal"
            )
    return {name: stats.agreement(ours, theirs) for name, theirs in answers.items()}


def run_batch(
    session: Session, workers: Sequence[Worker], batch: int, guard: Guard, strict: int
) -> dict[str, Any]:
    """First calls, the comparison of the tokens, then interleaved rounds of one token and of all."""
    new = session.options.new
    session.say(f"  batch {batch}")
    first = {w.contender.name: warm(w, batch, new) for w in workers}
    same = check({name: reply.pop("answers") for name, reply in first.items()}, min(strict, batch))
    for name, found in same.items():
        session.say(f"    {name}: {found['rows']:.0%} of rows, {found['tokens']:.0%} of tokens as ours")
    guard.settle()
    rounds, prefill = [], []
    for index in range(session.options.rounds):
        for kind, count in ((prefill, 1), (rounds, new)):
            kind += interleave(workers, {"batch": batch, "new": count}, [index], guard, session.say)
    return {"batch": batch, "first": first, "same": same, "rounds": rounds, "prefill": prefill}


def run_alone(
    session: Session, who: Sequence[Contender], job: Mapping[str, Any], guard: Guard, strict: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every contender by itself, in two passes of opposite order; replies of the starts, and the batches."""
    starts, parts = {}, {b: [] for b in session.options.batch}
    for order in (who, who[::-1]):
        for contender in order:
            worker, reply = start(contender, job, guard, session.work / "logs", session.say)
            starts.setdefault(contender.name, reply)
            with worker:
                for batch, found in parts.items():
                    found.append(solo(session, worker, batch, guard))
    return starts, [join(batch, found, min(strict, batch)) for batch, found in parts.items()]


def solo(session: Session, worker: Worker, batch: int, guard: Guard) -> dict[str, Any]:
    """Half of the rounds of one contender and batch size."""
    new, half = session.options.new, range(-(-session.options.rounds // 2))
    message = {"batch": batch, "new": new}
    return {
        "contender": worker.contender.name,
        "first": warm(worker, batch, new),
        "prefill": interleave([worker], {**message, "new": 1}, half, guard, session.say),
        "rounds": interleave([worker], message, half, guard, session.say),
    }


def join(batch: int, parts: Sequence[Mapping[str, Any]], strict: int) -> dict[str, Any]:
    """The batch record of contenders that ran one after another."""
    first: dict[str, Any] = {}
    for part in parts:
        first.setdefault(part["contender"], part["first"])
    same = check({name: reply.pop("answers") for name, reply in first.items()}, strict)
    lists = {key: [r for part in parts for r in part[key]] for key in ("rounds", "prefill")}
    return {"batch": batch, "first": first, "same": same, **lists}


def rows(
    found: Mapping[str, Any], starts: Mapping[str, Any], label: Mapping[str, Any], bandwidth: float, new: int
) -> list[dict[str, Any]]:
    """Table rows of one batch size. `bandwidth`: the share of the copy rate that a step a second is worth."""
    rounds, out = found["rounds"], []
    speed = lambda name, cost: [  # noqa: E731
        t / s for t, s in zip(column(rounds, name, "tokens"), column(rounds, name, cost), strict=True)
    ]
    for name in starts:
        prefill = stats.spread(column(found["prefill"], name, "wall_s")).median
        step = (stats.spread(column(rounds, name, "wall_s")).median - prefill) / (new - 1)
        wall, cpu = speed(name, "wall_s"), speed(name, "cpu_s")
        device = [r["device_peak_mib"] for r in rounds if r["contender"] == name and "device_peak_mib" in r]
        row = {
            **label,
            "batch": found["batch"],
            "contender": name,
            "tok/s": stats.spread(wall),
            "tok/CPU-s": stats.spread(cpu),
            "ours/this": stats.ratios(speed(OURS, "wall_s"), wall),
            "CPU-ours/this": stats.ratios(speed(OURS, "cpu_s"), cpu),
            "prefill-s": prefill,
            "decode-ms/step": 1000 * step,
            "bandwidth%": bandwidth / step if step > 0 else None,
            "same-rows": found["same"][name]["rows"],
            "same-tokens": found["same"][name]["tokens"],
            "ready-s": starts[name]["ready_s"],
            "first-call-s": found["first"][name]["wall_s"],
            "peak-MiB": max(column(rounds, name, "peak_mib")),
            "device-MiB": max(device, default=None),
            "max-load": max(column(rounds, name, "load")),
        }
        out.append(row)
    return out


def case(session: Session, precision: str, threads: int) -> dict[str, Any]:
    """Every batch size in one precision and thread count."""
    options, guard = session.options, session.guard(threads)
    label = {"precision": precision, "threads": threads}
    session.say(f"\n{precision}, {threads} thread(s)")
    guard.settle()
    peak = session.measure_peak(precision, threads)
    cache = str(session.work / f"cache-generate-{precision}-{threads}")
    job = session.job(precision=precision, prompts=session.files["prompts"], cache=cache)
    who = session.chosen(contenders(options, precision))
    strict = options.check if precision == "f32" and not options.random else 0
    if session.together:
        with ExitStack() as stack:
            workers, starts = [], {}
            for contender in who:
                worker, reply = start(contender, job, guard, session.work / "logs", session.say)
                workers.append(stack.enter_context(worker))
                starts[contender.name] = reply
            batches = [run_batch(session, workers, b, guard, strict) for b in options.batch]
    else:
        starts, batches = run_alone(session, who, job, guard, strict)
    for name, reply in starts.items():
        session.versions.setdefault(name, reply["versions"])
    return {
        "case": label,
        "starts": starts,
        "batches": batches,
        **summary(session, label, starts, batches, peak),
    }


def summary(
    session: Session,
    label: Mapping[str, Any],
    starts: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]],
    peak: Mapping[str, float],
) -> dict[str, Any]:
    """`rows` of the table and the `headline` below it."""
    shape, prompts = flops.read(session.folder), Prompts.load(session.files["prompts"])
    table, lines = [], []
    for found in batches:
        batch = found["batch"]
        context = prompts.mean(batch) + session.options.new / 2
        size = shape.decode_bytes(batch, context, ITEM[label["precision"]])
        mine = rows(found, starts, label, 100 * size / peak["bandwidth"], session.options.new)
        table += mine
        best = max((r for r in mine if r["contender"] != OURS), key=lambda r: r["tok/s"].median, default=None)
        where = f"batch {batch} {label['precision']} x{label['threads']}: "
        if best:
            lines.append(
                f"{where}ours over generate: {tables.cell(best['ours/this'])}, per CPU-second "
                f"{tables.cell(best['CPU-ours/this'])} (its best row: {best['contender']})"
            )
        lines += [where + line for line in warnings([*found["rounds"], *found["prefill"]])]
    return {"rows": table, "headline": lines}


def main() -> None:
    """Runs every case and prints one table."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    p.add_argument("--new", type=int, default=64, help="tokens every row gets, end-of-sequence ignored")
    p.add_argument("--shortest", type=int, default=40, help="shortest prompt in tokens")
    p.add_argument("--longest", type=int, default=88, help="longest prompt in tokens")
    p.add_argument(
        "--check", type=int, default=4, help="prompts that f32 must answer equally, token for token"
    )
    session = Session(p.parse_args())
    o = session.options
    how = {"count": max(o.batch), "low": o.shortest, "high": o.longest}
    session.prepare([{"kind": "prompts", "name": "prompts", "how": how}])
    cases = (case(session, precision, t) for precision in o.precision for t in o.threads)
    notes = ["the baseline is transformers' `generate`, no serving engine"]
    session.finish(__doc__.splitlines()[0], COLUMNS, cases, notes)


if __name__ == "__main__":
    sys.exit(exit_code(main))
