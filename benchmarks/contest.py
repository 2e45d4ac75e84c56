"""A contest of training contenders: starts, first and warm-up steps, interleaved rounds, and the table."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks import flops, machine, stats, tables
from benchmarks.machine import Guard
from benchmarks.protocol import OURS, Contender, Worker
from benchmarks.rounds import column, interleave, start, warnings
from benchmarks.session import Session

# bf16 weights under autocast is what jaxalign computes: bf16 products, float32 adapter and optimiser.
STYLES: dict[str, dict[str, dict[str, Any]]] = {
    "f32": {"": {}},
    "bf16": {
        ", bf16 weights": {},
        ", bf16 weights + autocast": {"autocast": True},
        ", f32 weights + autocast": {"weights": "f32", "autocast": True},
    },
}
# What TRL's trainers do when told nothing.
DEFAULT: dict[str, dict[str, Any]] = {
    "f32": {"checkpointing": True},
    "bf16": {"checkpointing": True, "weights": "f32", "autocast": True},
}


def learn(worker: Worker, warmup: int) -> dict[str, Any]:
    """The first step, which pays for what is not warm, and the warm-up steps after it."""
    first = worker.ask({"op": "round", "steps": 1})
    return {"first": first, "warmup": worker.ask({"op": "round", "steps": warmup})}


def options(p: argparse.ArgumentParser) -> None:
    """The options of a training benchmark."""
    p.add_argument("--steps", type=int, default=2, help="steps a round")
    p.add_argument("--warmup", type=int, default=2, help="steps between the first and the rounds")
    p.add_argument(
        "--all-rows", action="store_true", help="rounds for every setting of a peer, not its best alone"
    )


def count(options: argparse.Namespace) -> int:
    """Steps of a run from its first to its last."""
    return 1 + options.warmup + options.steps * options.rounds


def cold_start(session: Session, job: Mapping[str, Any], ours: Contender, guard: Guard) -> float:
    """Seconds one of our rows compiles where the cache has nothing of it; it is filled afterwards."""
    worker, reply = start(ours, job, guard, session.work / "logs", session.say)
    worker.quit()
    return reply["compile_s"]


def check(session: Session, learned: Mapping[str, Any], precision: str) -> dict[str, float]:
    """Gaps of the first losses, which are equal within the tolerance, or nothing is published."""
    first = {name: steps["first"]["losses"][0] for name, steps in learned.items()}
    gaps = stats.check_losses(first, OURS, precision)
    session.say(f"  first-step losses equal within {stats.LOSS_RTOL[precision]:g}")
    return gaps


# (session, first and warm-up steps by contender, precision) -> how far each one's first loss lies off.
Check = Callable[[Session, Mapping[str, Any], str], dict[str, float]]


@dataclass
class Contest:
    """The starts, first and warm-up steps, and rounds of one case, by contender.

    `same` raises `DifferentWorkError` unless all contenders did the same work in their first steps.
    """

    session: Session
    job: Mapping[str, Any]
    guard: Guard
    same: Check = check
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
        groups: dict[str, list[Contender]] = {}
        for c in who:
            groups.setdefault(c.name if options.all_rows or not c.rival else c.rival, []).append(c)
        with ExitStack() as stack:
            workers = [self.elect(group, stack) for group in groups.values()]
            self.gaps = self.same(self.session, self.learned, self.job["precision"])
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
        self.gaps = self.same(self.session, self.learned, self.job["precision"])


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
    return [{**label, "contender": c.name, **row(found, c, worth)} for c in who if c.name in measured]


def row(found: Mapping[str, Any], contender: Contender, worth: Mapping[str, float]) -> dict[str, Any]:
    """One contender's cells."""
    name, ours = contender.name, contender.against
    median = stats.spread(speeds(found["rounds"], name, "wall_s")).median
    pairs = zip(curve(found, name), curve(found, ours), strict=True)
    return {
        **pace(found, contender),
        **{key: median * percent for key, percent in worth.items()},
        "loss-1": f"{found['learned'][name]['first']['losses'][0]:.6f}",
        "gap-1": found["gaps"][name],
        "gap-curve": max(stats.gap(a, b) for a, b in pairs),
        **circumstances(found, name),
    }


def pace(found: Mapping[str, Any], contender: Contender) -> dict[str, Any]:
    """The cells of a contender's speed, and of ours over it."""
    rounds, name, ours = found["rounds"], contender.name, contender.against
    wall, cpu = speeds(rounds, name, "wall_s"), speeds(rounds, name, "cpu_s")
    return {
        "tok/s": stats.spread(wall),
        "tok/CPU-s": stats.spread(cpu),
        "ours/this": stats.ratios(speeds(rounds, ours, "wall_s"), wall),
        "CPU-ours/this": stats.ratios(speeds(rounds, ours, "cpu_s"), cpu),
    }


def circumstances(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The cells of a contender's start, memory and load."""
    rounds, begun = found["rounds"], found["starts"][name]
    return {
        "ready-s": begun["ready_s"],
        "compile-s": begun["compile_s"],
        "cold-compile-s": found["cold_compile_s"].get(name),
        "first-step-s": found["learned"][name]["first"]["wall_s"],
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


def begin(session: Session, label: Mapping[str, Any]) -> tuple[Guard, dict[str, float]]:
    """Names a case and waits for a quiet machine; its abort rule, and the machine's measured rates."""
    data, precision, threads = label["data"], label["precision"], label["threads"]
    session.say(f"\n{data}, {precision}, {threads} thread(s)")
    guard = session.guard(threads)
    guard.settle()
    return guard, session.measure_peak(precision, threads)


def hold(
    session: Session,
    label: Mapping[str, Any],
    who: Sequence[Contender],
    guard: Guard,
    same: Check = check,
    **job: Any,
) -> dict[str, Any]:
    """Runs the contest of one case; everything measured. `same` is that of `Contest`."""
    work = session.job(
        precision=label["precision"],
        batches=session.files[label["data"]],
        clip=1.0,
        cache=str(session.work / "cache-{data}-{precision}-{threads}".format(**label)),
        **job,
    )
    shutil.rmtree(work["cache"], ignore_errors=True)
    cold = {c.name: cold_start(session, work, c, guard) for c in who if not c.rival}
    contest = Contest(session, work, guard, same)
    contest.together(who) if session.together else contest.alone(who)
    for name, reply in contest.starts.items():
        session.versions.setdefault(name, reply["versions"])
    return {
        "starts": contest.starts,
        "learned": contest.learned,
        "rounds": contest.rounds,
        "gaps": contest.gaps,
        "cold_compile_s": cold,
    }


def record(
    label: Mapping[str, Any],
    found: Mapping[str, Any],
    who: Sequence[Contender],
    table: Sequence[Mapping[str, Any]],
    work: Any,
) -> dict[str, Any]:
    """What a result file holds of a case. `work`: FLOPs a token."""
    lines = [*headline(found, who, table), *dropped(found), *warnings(found["rounds"])]
    lines = ["{data} {precision} x{threads}: ".format(**label) + line for line in lines]
    return {"case": dict(label), "flops_a_token": work, **found, "rows": list(table), "headline": lines}
