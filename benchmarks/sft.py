"""LoRA fine-tuning: jaxalign against a bare transformers + peft loop and TRL's SFTTrainer.

    python -m benchmarks.sft --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data conversations.json --out benchmarks/results/sft.json
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import batches, contest, flops
from benchmarks.contest import DEFAULT, STYLES
from benchmarks.protocol import OURS, Contender
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "data", "precision", "threads", "contender", "tok/s", "tok/CPU-s", "ours/this", "CPU-ours/this",
    "MFU%", "datasheet-MFU%", "loss-1", "gap-1", "gap-curve", "ready-s", "compile-s", "cold-compile-s",
    "first-step-s", "peak-MiB", "device-MiB", "max-load",
]
# fmt: on


def contenders(options: Any, data: str, precision: str) -> list[Contender]:
    """Our row and every setting of each peer; the headline takes the best row of a rival."""
    python, peer = options.python, options.peer_python
    rows = [Contender(OURS, "benchmarks.jax_sft", python)]
    for suffix, how in STYLES[precision].items():
        rows.append(Contender(f"bare loop{suffix}", "benchmarks.torch_sft", peer, "bare loop", how))
        rows.append(Contender(f"TRL{suffix}", "benchmarks.trl_sft", peer, "TRL", how))
    default = DEFAULT[precision]
    rows.append(Contender("TRL default (checkpointing)", "benchmarks.trl_sft", peer, "TRL default", default))
    if data == "mixed":
        packed = {"packing": True, "autocast": precision == "bf16"}
        rows.append(Contender("TRL packed", "benchmarks.trl_sft", peer, "TRL packed", packed))
    if options.compile_peer:
        how = {"compile": True}
        rows.append(Contender("bare loop compiled", "benchmarks.torch_sft", peer, "bare loop compiled", how))
    return rows


def case(session: Session, data: str, precision: str, threads: int) -> dict[str, Any]:
    """One precision and thread count on one kind of data."""
    label = {"data": data, "precision": precision, "threads": threads}
    guard, peak = contest.begin(session, label)
    who = session.chosen(contenders(session.options, data, precision))
    found = contest.hold(session, label, who, guard, learning_rate=2e-4)
    work = flops.read(session.folder).lora_train(batches.load(session.files[data]).context())
    table = contest.rows(found, who, label, contest.utilisation(work, peak, precision))
    return contest.record(label, found, who, table, work)


def orders(options: Any) -> list[dict[str, Any]]:
    """The token files of the run."""
    count = contest.count(options)
    sizes = {
        "fixed": {"steps": count, "rows": options.rows, "length": options.length},
        "mixed": {"steps": count, "rows": options.mixed_rows, "length": options.mixed_length},
    }
    return [{"kind": name, "name": name, "how": sizes[name]} for name in options.variants]


def main() -> None:
    """Runs every case and prints one table."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--variants", nargs="+", choices=("fixed", "mixed"), default=["fixed", "mixed"])
    p.add_argument("--rows", type=int, default=4, help="rows a step of the fixed-length data")
    p.add_argument("--length", type=int, default=256, help="their length")
    p.add_argument("--mixed-rows", type=int, default=2, help="packed rows a step of the mixed data")
    p.add_argument("--mixed-length", type=int, default=1024, help="their length, and where examples are cut")
    contest.options(p)
    p.add_argument("--compile-peer", action="store_true", help="a row for the bare loop under torch.compile")
    session = Session(p.parse_args())
    session.prepare(orders(session.options))
    o = session.options
    cases = (case(session, d, p, t) for d in o.variants for p in o.precision for t in o.threads)
    session.finish(__doc__.splitlines()[0], COLUMNS, cases)


if __name__ == "__main__":
    sys.exit(exit_code(main))
