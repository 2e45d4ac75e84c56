"""LoRA fine-tuning: jaxalign against a bare transformers + peft loop and TRL's SFTTrainer.

    python -m benchmarks.sft --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data conversations.json --out benchmarks/results/sft.json
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks import batches, flops, machine, stats, tables
from benchmarks.machine import Guard
from benchmarks.protocol import Contender, Worker
from benchmarks.rounds import column, interleave, start, warnings
from benchmarks.session import Session, exit_code, parser

OURS = "jaxalign"
# fmt: off
COLUMNS = [
    "data", "precision", "threads", "contender", "tok/s", "tok/CPU-s", "ours/this", "CPU-ours/this",
    "MFU%", "datasheet-MFU%", "loss-1", "gap-1", "gap-curve", "ready-s", "compile-s", "cold-compile-s",
    "first-step-s", "peak-MiB", "device-MiB", "max-load",
]
# fmt: on
# bf16 weights under autocast is what jaxalign computes: bf16 products, float32 adapter and optimiser.
STYLES: dict[str, dict[str, dict[str, Any]]] = {
    "f32": {"": {}},
    "bf16": {
        ", bf16 weights": {},
        ", bf16 weights + autocast": {"autocast": True},
        ", f32 weights + autocast": {"weights": "f32", "autocast": True},
    },
}
DEFAULT = {"f32": {}, "bf16": {"weights": "f32", "autocast": True}}  # what SFTConfig does when told nothing


def contenders(options: Any, data: str, precision: str) -> list[Contender]:
    """Our row and every setting of each peer; the headline takes the best row of a rival."""
    python, peer = options.python, options.peer_python
    rows = [Contender(OURS, "benchmarks.jax_sft", python)]
    for suffix, how in STYLES[precision].items():
        rows.append(Contender(f"bare loop{suffix}", "benchmarks.torch_sft", peer, "bare loop", how))
        rows.append(Contender(f"TRL{suffix}", "benchmarks.trl_sft", peer, "TRL", how))
    default = {"checkpointing": True, **DEFAULT[precision]}
    rows.append(Contender("TRL default (checkpointing)", "benchmarks.trl_sft", peer, "TRL default", default))
    if data == "mixed":
        packed = {"packing": True, "autocast": precision == "bf16"}
        rows.append(Contender("TRL packed", "benchmarks.trl_sft", peer, "TRL packed", packed))
    if options.compile_peer:
        how = {"compile": True}
        rows.append(Contender("bare loop compiled", "benchmarks.torch_sft", peer, "bare loop compiled", how))
    return rows


def learn(worker: Worker, warmup: int) -> dict[str, Any]:
    """The first step, which pays for what is not warm, and the warm-up steps after it."""
    first = worker.ask({"op": "round", "steps": 1})
    return {"first": first, "warmup": worker.ask({"op": "round", "steps": warmup})}


def cold_start(session: Session, job: Mapping[str, Any], guard: Guard) -> float:
    """Seconds jaxalign compiles with an empty cache; the cache is filled afterwards."""
    shutil.rmtree(job["cache"], ignore_errors=True)
    ours = Contender(OURS, "benchmarks.jax_sft", session.options.python)
    worker, reply = start(ours, job, guard, session.work / "logs", session.say)
    worker.quit()
    return reply["compile_s"]


@dataclass
class Contest:
    """The starts, first and warm-up steps, and rounds of one case, by contender."""

    session: Session
    job: Mapping[str, Any]
    guard: Guard
    starts: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    gaps: dict[str, float] = field(default_factory=dict)

    def begin(self, contender: Contender, stack: ExitStack) -> Worker:
        """A worker past its warm-up."""
        worker, reply = start(contender, self.job, self.guard, self.session.work / "logs", self.session.say)
        stack.enter_context(worker)
        learned = learn(worker, self.session.options.warmup)
        self.starts.setdefault(contender.name, reply)
        self.learned.setdefault(contender.name, learned)
        loss, seconds = learned["first"]["losses"][0], learned["warmup"]["wall_s"]
        self.session.say(f"    first-step loss {loss:.6f}, warm-up {seconds:.2f} s")
        return worker

    def elect(self, candidates: Sequence[Contender], stack: ExitStack) -> Worker:
        """The candidate with the fastest warm-up; the others quit, for their memory."""
        best = self.begin(candidates[0], stack)
        for contender in candidates[1:]:
            names = (best.contender.name, contender.name)
            new = self.begin(contender, stack)
            old_s, new_s = (self.learned[n]["warmup"]["wall_s"] for n in names)
            best, worse = (new, best) if new_s < old_s else (best, new)
            worse.quit()
        return best

    def together(self, who: Sequence[Contender]) -> None:
        """Everybody loaded at once, in interleaved rounds; of a rival's rows only the best."""
        options, say = self.session.options, self.session.say
        groups = [[c for c in who if c.rival == rival] for rival in dict.fromkeys(c.rival for c in who)]
        if options.all_rows:
            groups = [[c] for c in who]
        with ExitStack() as stack:
            workers = [self.elect(group, stack) for group in groups]
            self.gaps = check(self.session, self.learned, self.job["precision"])
            self.guard.settle()
            message = {"steps": options.steps}
            self.rounds = interleave(workers, message, range(options.rounds), self.guard, say)

    def alone(self, who: Sequence[Contender]) -> None:
        """One after another, in two passes of opposite order."""
        options = self.session.options
        half, message = range(-(-options.rounds // 2)), {"steps": options.steps}
        for index, order in enumerate((who, who[::-1])):
            for contender in order:
                with ExitStack() as stack:
                    worker = self.begin(contender, stack)
                    found = interleave([worker], message, half, self.guard, self.session.say)
                    self.rounds += [{**r, "pass": index} for r in found]
        self.gaps = check(self.session, self.learned, self.job["precision"])


def check(session: Session, learned: Mapping[str, Any], precision: str) -> dict[str, float]:
    """Gaps of the first losses, which are equal within the tolerance, or nothing is published."""
    first = {name: steps["first"]["losses"][0] for name, steps in learned.items()}
    gaps = stats.check_losses(first, OURS, precision)
    session.say(f"  first-step losses equal within {stats.LOSS_RTOL[precision]:g}")
    return gaps


def curve(found: Mapping[str, Any], name: str) -> list[float]:
    """Every loss of a contender from its first step on; with two passes those of the first."""
    learned = found["learned"][name]
    rounds = [r["losses"] for r in found["rounds"] if r["contender"] == name and not r.get("pass")]
    return [*learned["first"]["losses"], *learned["warmup"]["losses"], *(x for r in rounds for x in r)]


def speeds(rounds: Sequence[Mapping[str, Any]], name: str, cost: str) -> list[float]:
    """Non-padding tokens a second (or a CPU second) of each round."""
    pairs = zip(column(rounds, name, "tokens"), column(rounds, name, cost), strict=True)
    return [tokens / seconds for tokens, seconds in pairs]


def rows(
    found: Mapping[str, Any], who: Sequence[Contender], label: Mapping[str, Any], worth: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Table rows of one case. `worth` says how many percent of each peak one token a second is."""
    measured = {r["contender"] for r in found["rounds"]}
    return [{**label, "contender": c.name, **row(found, c.name, worth)} for c in who if c.name in measured]


def row(found: Mapping[str, Any], name: str, worth: Mapping[str, float]) -> dict[str, Any]:
    """One contender's cells."""
    rounds, begun, first = found["rounds"], found["starts"][name], found["learned"][name]["first"]
    wall, cpu = speeds(rounds, name, "wall_s"), speeds(rounds, name, "cpu_s")
    pairs = zip(curve(found, name), curve(found, OURS), strict=True)
    return {
        "tok/s": stats.spread(wall),
        "tok/CPU-s": stats.spread(cpu),
        "ours/this": stats.ratios(speeds(rounds, OURS, "wall_s"), wall),
        "CPU-ours/this": stats.ratios(speeds(rounds, OURS, "cpu_s"), cpu),
        **{key: stats.spread(wall).median * percent for key, percent in worth.items()},
        "loss-1": f"{first['losses'][0]:.6f}",
        "gap-1": found["gaps"][name],
        "gap-curve": max(stats.gap(a, b) for a, b in pairs),
        "ready-s": begun["ready_s"],
        "compile-s": begun["compile_s"],
        "cold-compile-s": found["cold_compile_s"] if name == OURS else None,
        "first-step-s": first["wall_s"],
        "peak-MiB": max(column(rounds, name, "peak_mib")),
        "device-MiB": device_mib(rounds, name),
        "max-load": max(column(rounds, name, "load")),
    }


def utilisation(work: float, peak: Mapping[str, float], precision: str) -> dict[str, float]:
    """Percent of the measured product rate, and of the data sheet's where it is known, that one token is."""
    sheet = flops.datasheet(machine.describe()["accelerator"]) if precision == "bf16" else {}
    known = {"datasheet-MFU%": 100 * work / sheet["flops"]} if sheet else {}
    return {"MFU%": 100 * work / peak["flops"], **known}


def device_mib(rounds: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Peak memory of the card, or None on a CPU."""
    found = [r["device_peak_mib"] for r in rounds if r["contender"] == name and "device_peak_mib" in r]
    return max(found, default=None)


def headline(
    found: Mapping[str, Any], who: Sequence[Contender], table: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One line a rival: our speed over its best row's."""
    median = {row["contender"]: row["tok/s"].median for row in table}
    best = stats.best(median, {c.name: c.rival for c in who})
    by_name = {row["contender"]: row for row in table}
    return [
        f"ours over {rival}: {tables.cell(by_name[name]['ours/this'])}, per CPU-second "
        f"{tables.cell(by_name[name]['CPU-ours/this'])} (its best row: {name})"
        for rival, name in best.items()
    ]


def dropped(found: Mapping[str, Any]) -> list[str]:
    """A line for each row that its rival's better one made superfluous, with the speed of its warm-up."""
    measured = {r["contender"] for r in found["rounds"]}
    out = {n: steps["warmup"] for n, steps in found["learned"].items() if n not in measured}
    return [
        f"{n}: {w['tokens'] / w['wall_s']:.0f} tok/s in its warm-up, not the best" for n, w in out.items()
    ]


def case(session: Session, data: str, precision: str, threads: int) -> dict[str, Any]:
    """One precision and thread count on one kind of data."""
    options, guard = session.options, session.guard(threads)
    label = {"data": data, "precision": precision, "threads": threads}
    session.say(f"\n{data}, {precision}, {threads} thread(s)")
    guard.settle()
    steps = batches.load(session.files[data])
    peak = session.measure_peak(precision, threads)
    job = session.job(
        precision=precision,
        batches=session.files[data],
        learning_rate=2e-4,
        clip=1.0,
        cache=str(session.work / f"cache-{data}-{precision}-{threads}"),
    )
    who = session.chosen(contenders(options, data, precision))
    cold, contest = cold_start(session, job, guard), Contest(session, job, guard)
    contest.together(who) if session.together else contest.alone(who)
    found = {
        "starts": contest.starts,
        "learned": contest.learned,
        "rounds": contest.rounds,
        "gaps": contest.gaps,
        "cold_compile_s": cold,
    }
    for name, reply in found["starts"].items():
        session.versions.setdefault(name, reply["versions"])
    work = flops.read(session.folder).lora_train(steps.context())
    table = rows(found, who, label, utilisation(work, peak, precision))
    lines = [*headline(found, who, table), *dropped(found), *warnings(found["rounds"])]
    lines = [f"{data} {precision} x{threads}: {line}" for line in lines]
    return {"case": label, "flops_a_token": work, **found, "rows": table, "headline": lines}


def orders(options: Any) -> list[dict[str, Any]]:
    """The token files of the run."""
    count = 1 + options.warmup + options.steps * options.rounds
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
    p.add_argument("--steps", type=int, default=2, help="steps a round")
    p.add_argument("--warmup", type=int, default=2, help="steps between the first and the rounds")
    p.add_argument(
        "--all-rows", action="store_true", help="rounds for every setting of a peer, not its best alone"
    )
    p.add_argument("--compile-peer", action="store_true", help="a row for the bare loop under torch.compile")
    session = Session(p.parse_args())
    session.prepare(orders(session.options))
    o = session.options
    cases = (case(session, d, p, t) for d in o.variants for p in o.precision for t in o.threads)
    session.finish(__doc__.splitlines()[0], COLUMNS, cases)


if __name__ == "__main__":
    sys.exit(exit_code(main))
