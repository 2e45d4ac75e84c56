"""Preference tuning with LoRA and DPO: jaxalign against TRL's DPOTrainer.

    python -m benchmarks.dpo --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data preferences.json --out benchmarks/results/dpo.json
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import batches, contest, flops, stats
from benchmarks.contest import DEFAULT, STYLES
from benchmarks.protocol import OURS, Contender
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "data", "precision", "threads", "contender", "tok/s", "pairs/s", "tok/CPU-s", "ours/this",
    "CPU-ours/this", "MFU%", "datasheet-MFU%", "loss-1", "gap-1", "gap-curve", "ready-s", "compile-s",
    "cold-compile-s", "first-step-s", "peak-MiB", "device-MiB", "max-load",
]
# fmt: on
KINDS = {"fixed": "fixed-pairs", "real": "real-pairs"}
# B of the common adapter: policy and reference, which is the model without it, lie far apart from the start.
# The rounding of bfloat16 alone moves a pair's log-ratio by half a nat: beta keeps that within the tolerance.
START, BETA = 0.1, 0.02
LEARNING_RATE = 5e-5
PRECOMPUTED, APART = {"precomputed": True}, {"apart": True}


def contenders(options: Any, precision: str) -> list[Contender]:
    """Two rows of ours, the reference in the step and computed before it, each against TRL doing the same.

    A third computes the prompt of a pair for each answer anew, as TRL does.
    """
    python, peer, trl = options.python, options.peer_python, "benchmarks.trl_dpo"
    before = f"{OURS} precomputed"
    rows = [
        Contender(OURS, "benchmarks.jax_dpo", python),
        Contender(before, "benchmarks.jax_dpo", python, options=PRECOMPUTED, against=before),
        Contender(f"{OURS}, prompts twice", "benchmarks.jax_dpo", python, options=APART),
    ]
    for suffix, how in STYLES[precision].items():
        rows.append(Contender(f"TRL{suffix}", trl, peer, "TRL", how))
        ready = {**how, **PRECOMPUTED}
        rows.append(Contender(f"TRL precomputed{suffix}", trl, peer, "TRL precomputed", ready, before))
    rows.append(Contender("TRL default (checkpointing)", trl, peer, "TRL default", DEFAULT[precision]))
    return rows


def check(found: Mapping[str, Any]) -> None:
    """Raises `DifferentWorkError` where policy and reference are one: then the loss says nothing."""
    for name, steps in found["learned"].items():
        loss = steps["first"]["losses"][0]
        if abs(loss - math.log(2)) < 1e-3:
            raise stats.DifferentWorkError(f"{name} compares the policy with itself: loss {loss:.6f} is ln 2")


def table(
    found: Mapping[str, Any],
    who: list[Contender],
    label: Mapping[str, Any],
    work: Mapping[str, float],
    peak: Mapping[str, float],
    pairs: int,
) -> list[dict[str, Any]]:
    """Table rows of one case. `work`: FLOPs a token, by `cost`; `pairs` stand in one round."""
    out = []
    for contender in who:
        worth = contest.utilisation(work[cost(contender)], peak, label["precision"])
        for row in contest.rows(found, [contender], label, worth):
            seconds = [r["wall_s"] for r in found["rounds"] if r["contender"] == contender.name]
            out.append({**row, "pairs/s": stats.spread([pairs / s for s in seconds])})
    return out


def cost(contender: Contender) -> str:
    """Which work a row does: the reference `in the step`, or `precomputed`."""
    return "precomputed" if contender.options.get("precomputed") else "in the step"


def case(session: Session, data: str, precision: str, threads: int) -> dict[str, Any]:
    """One precision and thread count on one kind of data."""
    label = {"data": KINDS[data], "precision": precision, "threads": threads}
    guard, peak = contest.begin(session, label)
    who = session.chosen(contenders(session.options, precision))
    found = contest.hold(session, label, who, guard, learning_rate=LEARNING_RATE, beta=BETA)
    check(found)
    shape, context = flops.read(session.folder), batches.load(session.files[label["data"]]).context()
    train = shape.lora_train(context)
    work = {"precomputed": train, "in the step": train + shape.forward(context)}
    pairs = session.options.pairs * session.options.steps
    return contest.record(label, found, who, table(found, who, label, work, peak, pairs), work)


def orders(options: Any) -> list[dict[str, Any]]:
    """The token files of the run."""
    common = {"steps": contest.count(options), "pairs": options.pairs}
    sizes = {
        "fixed": {"prompt": options.prompt, "answer": options.length - options.prompt},
        "real": {"length": options.real_length},
    }
    return [{"kind": KINDS[n], "name": KINDS[n], "how": {**common, **sizes[n]}} for n in options.variants]


def main() -> None:
    """Runs every case and prints one table."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--variants", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    p.add_argument("--pairs", type=int, default=4, help="pairs a step")
    p.add_argument("--length", type=int, default=249, help="tokens of each row of the fixed-length data")
    p.add_argument("--prompt", type=int, default=128, help="how many of them are the prompt")
    p.add_argument("--real-length", type=int, default=512, help="longest row of the data's own pairs")
    contest.options(p)
    session = Session(p.parse_args())
    session.prepare(orders(session.options), START)
    o = session.options
    cases = (case(session, d, p, t) for d in o.variants for p in o.precision for t in o.threads)
    session.finish(__doc__.splitlines()[0], COLUMNS, cases)


if __name__ == "__main__":
    sys.exit(exit_code(main))
