"""The whole loop on a small model: answer, fine-tune, learn from preferences, compare. Ends with a report.

Every phase leaves a file in the output folder and is skipped where that file is there already:

    train.jsonl heldout.jsonl   the data, copied from the package
    before.jsonl                answers of the model as it came
    run/                        the training run; it is a model, also for every other command
    after.jsonl                 answers of the trained model
    preferred/                  the run that goes on from it: it prefers the briefer of its own answers
    preferred.jsonl             answers of that model
    report.html report.json     the comparison
    state.json                  what was asked for, and the seconds of every finished phase
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evals.checkers import LABELS, RULES, check_card, names_fact, words
from jaxalign.evals.report import write_report
from jaxalign.pages.page import p_value, percent, points
from jaxalign.stats import paired_difference, rate_interval

ASSETS = Path(__file__).parent / "assets" / "quickstart"
MODEL = "smollm2-135m-instruct"
MAX_TOKENS = 96  # of an answer; the longest in the data has 62

# Keys of `jaxalign train sft`: 95 updates, some 63,000 tokens.
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "epochs": 3,
    "max_length": 128,
    "lora.rank": 16,
    "lora.alpha": 32,
    "log_every": 5,
    "eval_every": 19,
    "seed": 0,
}
# Keys of `jaxalign train iterative_dpo`: two answers to every training question, the better and the other.
PREFERENCES: dict[str, Any] = {
    "rounds": 1,
    "n": 2,
    "max_tokens": MAX_TOKENS,
    "rewards": {"brief": {"kind": "python", "function": "jaxalign.evals.checkers:brief_cards"}},
    "learning_rate": 1e-4,
    "batch_size": 8,
    "epochs": 1.0,
    "max_length": 192,
    "log_every": 5,
    "seed": 0,
}
BRIEF = 28  # words; a quarter of the training answers have no more
PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")

Row = dict[str, Any]
Step = tuple[str, str | None, Callable[[], None]]  # name, the file that it leaves, the work


def pull(model: str) -> None:
    """Download `model`, unless it is here."""
    from jaxalign import api

    api.pull(model)


def train(model: str, data: Path, eval_data: Path, out: Path, settings: Mapping[str, Any]) -> None:
    """Fine-tune by SFT, as `jaxalign train sft` does; `settings` has its keys. Resumes what is in `out`."""
    from jaxalign import api

    api.train("sft", model=model, data=str(data), out=str(out), eval_data=str(eval_data), **settings)


def prefer(model: str, data: Path, out: Path, settings: Mapping[str, Any]) -> None:
    """Learn from preferences among own answers, as `jaxalign train iterative_dpo` does. Resumes."""
    from jaxalign import api

    api.train("iterative_dpo", model=model, data=str(data), out=str(out), **settings)


def answer(model: str, questions: Sequence[str]) -> list[str]:
    """Greedy answers of a model (anything `-m` takes, so a run folder too) to single user turns, in order."""
    from jaxalign.sampling.generate import answer_questions

    return answer_questions(model, list(questions), temperature=0.0, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Phases:
    """What does the work; tests put fakes here. The signatures are those of the functions above."""

    pull: Callable[[str], None] = pull
    answer: Callable[[str, Sequence[str]], list[str]] = answer
    train: Callable[[str, Path, Path, Path, Mapping[str, Any]], None] = train
    prefer: Callable[[str, Path, Path, Mapping[str, Any]], None] = prefer


def quickstart(
    out: str | Path = "quickstart",
    model: str = MODEL,
    *,
    settings: Mapping[str, Any] | None = None,
    phases: Phases = Phases(),
    say: Callable[[str], None] = print,
) -> Path:
    """Run the loop in the folder `out` and return the path of its report.

    `settings` overrides keys of the training. An interrupted run goes on where it stopped. Raises `UserError`
    when `out` holds a quickstart of another model, other settings or other data.
    """
    folder, chosen = Path(out), {**SETTINGS, **(settings or {})}
    _copy_data(folder)
    job = Job(folder, model, chosen, phases, say)
    job.open()
    heldout = read_jsonl(folder / "heldout.jsonl")
    steps: list[Step] = [
        ("pull the model", None, lambda: phases.pull(model)),
        ("answer before training", "before.jsonl", lambda: job.answer(model, heldout, "before.jsonl")),
        ("train", "run", job.train),
        ("answer after training", "after.jsonl", lambda: job.answer(str(job.run), heldout, "after.jsonl")),
        ("prefer brief answers", "preferred", job.prefer),
        (
            "answer once more",
            "preferred.jsonl",
            lambda: job.answer(str(job.last), heldout, "preferred.jsonl"),
        ),
    ]
    for number, step in enumerate(steps, 1):
        job.phase(f"[{number}/{len(steps)}]", *step)
    data = report_data(job, heldout)
    page = write_report(folder, data)
    say(_table(data["measures"], "before", "fine-tuned"))
    say(_table(data["preferences"]["measures"], "fine-tuned", "preferences"))
    say(f"report: {page.resolve()}")
    return page


@dataclass(frozen=True)
class Job:
    """One quickstart: where, with what, and how far it came."""

    folder: Path
    model: str
    settings: Mapping[str, Any]
    phases: Phases
    say: Callable[[str], None]

    @property
    def run(self) -> Path:
        """The folder of the training run."""
        return self.folder / "run"

    @property
    def last(self) -> Path:
        """The folder of what was learned from preferences."""
        return self.folder / "preferred"

    def asked(self) -> Row:
        """What two runs must share to continue one another."""
        names = ("train.jsonl", "heldout.jsonl")
        data = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()[:16] for name in names}
        settings = {"settings": dict(self.settings), "preferences": PREFERENCES}
        return json.loads(json.dumps({"model": self.model, **settings, "data": data}))

    def state(self) -> Row:
        """The content of `state.json`."""
        path = self.folder / "state.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def open(self) -> None:
        """Begin, or go on if the folder's quickstart is this one; `UserError` if it is another."""
        state, asked = self.state(), self.asked()
        if not state:
            write_text(self.folder / "state.json", json.dumps({"asked": asked, "seconds": {}}, indent=1))
            return
        different = [name for name, value in asked.items() if state["asked"].get(name) != value]
        if different:
            raise UserError(
                f"the folder holds a quickstart with another {', '.join(different)}",
                place=str(self.folder),
                remedy="choose another folder with -o, or delete this one",
            )

    def phase(self, mark: str, name: str, file: str | None, work: Callable[[], None]) -> None:
        """Do `work` and note its seconds, unless it is noted and its `file` is there."""
        if name in self.state()["seconds"] and (file is None or (self.folder / file).exists()):
            self.say(f"{mark} {name}: done before")
            return
        self.say(f"{mark} {name} ...")
        start = time.perf_counter()
        work()
        state = self.state()
        state["seconds"][name] = round(time.perf_counter() - start, 2)
        write_text(self.folder / "state.json", json.dumps(state, indent=1))
        self.say(f"      {state['seconds'][name]:.1f} s")

    def train(self) -> None:
        """Train on the folder's copy of the data."""
        data, eval_data = self.folder / "train.jsonl", self.folder / "heldout.jsonl"
        self.phases.train(self.model, data, eval_data, self.run, self.settings)

    def prefer(self) -> None:
        """Go on from the trained model, with the questions that it was trained on."""
        self.phases.prefer(str(self.run), self.folder / "train.jsonl", self.last, PREFERENCES)

    def answer(self, model: str, rows: Sequence[Row], name: str) -> None:
        """Answer the questions of `rows` and write them to the folder, all or none."""
        questions = [question(row) for row in rows]
        texts = self.phases.answer(model, questions)
        if len(texts) != len(rows):
            raise RuntimeError(f"{len(texts)} answers to {len(rows)} questions")
        lines = [
            {"id": row["id"], "question": asked, "answer": text}
            for row, asked, text in zip(rows, questions, texts, strict=True)
        ]
        write_text(self.folder / name, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))


def question(row: Row) -> str:
    """The user's turn of a row."""
    return row["messages"][0]["content"]


def reference(row: Row) -> str:
    """The answer that the data gives to a row's question."""
    return row["messages"][-1]["content"]


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece, so that a killed process never leaves half of one."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _copy_data(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        if not (folder / name).exists():
            write_text(folder / name, (ASSETS / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ the report


def report_data(job: Job, heldout: Sequence[Row]) -> Row:
    """The data of `write_report` out of a finished job's files."""
    before, after, preferred = (
        _graded(job.folder / f"{name}.jsonl", heldout) for name in ("before", "after", "preferred")
    )
    items = [
        {
            "id": row["id"],
            "topic": row["topic"],
            "question": question(row),
            "reference": reference(row),
            "before": first,
            "after": second,
            "preferred": third,
        }
        for row, first, second, third in zip(heldout, before, after, preferred, strict=True)
    ]
    measures = [
        _measure("Kept the style", _STYLE_ABOUT, before, after, "passed"),
        _measure("Fact said at once", _FACT_ABOUT, before, after, "fact"),
    ]
    preferences = [
        _measure("Kept it briefly", _BRIEF_ABOUT, after, preferred, "brief"),
        _measure("Kept the style", _KEPT_ABOUT, after, preferred, "passed"),
    ]
    rates = [f"{100 * measures[0][when]['rate']:.0f} %" for when in ("before", "after")]
    example, *others = read_jsonl(job.folder / "train.jsonl")
    return {
        "title": f"Style kept: from {rates[0]} to {rates[1]}",
        "summary": f"{job.model} answered {len(items)} held-out questions before and after it was fine-tuned "
        f"with low-rank adapters on {1 + len(others)} examples of one answering style, and again after it "
        "learned to prefer the briefer of its own answers.",
        "model": job.model,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": {**_STYLE, "example": reference(example)},
        "measures": measures,
        "preferences": {"about": _PREFERENCES_ABOUT, "measures": preferences},
        "items": items,
        "metrics": _metrics(job.run / "metrics.jsonl"),
        "config": {
            "model": job.model,
            **job.settings,
            "preferences": PREFERENCES,
            "answers": {"max_tokens": MAX_TOKENS, "temperature": 0},
        },
        "versions": versions(),
        "machine": machine(),
        "phases": [{"name": name, "seconds": value} for name, value in job.state()["seconds"].items()],
        "commands": commands(job),
        "notes": list(_NOTES),
    }


_STYLE = {
    "name": "the checkable answer",
    "about": "An answer, the reason for it and a way to check it, one plain sentence each. A checker reads "
    "these rules from the text alone:",
    "labels": list(LABELS),
    "rules": RULES,
}
_STYLE_ABOUT = "The share of answers that keep every rule of the style. The model is never told the rules."
_FACT_ABOUT = (
    "The share of answers whose first sentence has the expected word or number. It watches that the model "
    "does not pay for its new manners with what it knows; talking around the question first loses here."
)
_PREFERENCES_ABOUT = (
    "The fine-tuned model answered every training question twice. A rule says which answer is better: one "
    "that keeps the style, and of two that do the one of fewer words. DPO made the better answers likelier "
    "and the others less likely, starting from the fine-tuned model."
)
_BRIEF_ABOUT = f"The share of answers that keep every rule of the style in at most {BRIEF} words."
_KEPT_ABOUT = "The same measure as above, now from the fine-tuned model on: brevity must not cost the style."
_NOTES = (
    "The checker reads form, not truth: an answer can keep the style and be wrong. A model of 135 million "
    "weights often is.",
    "Answers are greedy (temperature 0), one for each question, with the model's own chat template and no "
    "instruction beside the question.",
    "The held-out questions are about other things than the training questions. Their loss is drawn in the "
    "chart; training never sees it.",
    "The seconds of a phase are those of the attempt that finished it.",
)


def _graded(path: Path, heldout: Sequence[Row]) -> list[Row]:
    """The answers in the order of `heldout`, each with its verdict."""
    texts = {row["id"]: row["answer"] for row in read_jsonl(path)}
    graded = []
    for row in heldout:
        text = texts[row["id"]]
        verdict = check_card(text)
        fact = names_fact(text, row["expect"])
        brief = verdict.passed and len(words(text)) <= BRIEF
        graded.append(
            {"text": text, "passed": verdict.passed, "failed": verdict.failed, "fact": fact, "brief": brief}
        )
    return graded


def _measure(name: str, about: str, old: Sequence[Row], new: Sequence[Row], key: str) -> Row:
    """Verdicts on the answers of two models, item by item."""
    before, after = [answer[key] for answer in old], [answer[key] for answer in new]
    return {
        "name": name,
        "about": about,
        "before": rate_interval(sum(before), len(before)).to_json(),
        "after": rate_interval(sum(after), len(after)).to_json(),
        "paired": paired_difference(before, after).to_json(),
    }


def _metrics(path: Path) -> list[Row]:
    names = ("step", "loss", "eval_loss", "learning_rate", "tokens_per_sec")
    return [{name: row[name] for name in names if name in row} for row in read_jsonl(path)]


def versions() -> Row:
    """Python and the packages that make the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> Row:
    """The machine in words: processor, cores, memory, and the devices that JAX sees."""
    import jax

    devices = jax.devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{memory / 2**30:.0f} GiB" if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commands(job: Job) -> list[Row]:
    """What to type next, with this job's folders."""
    run, data = shlex.quote(str(job.last)), shlex.quote(str(job.folder / "train.jsonl"))
    keys = " ".join(f"{name}={value}" for name, value in job.settings.items())
    model = shlex.quote(job.model)
    return [
        {"about": "Talk to the trained model", "command": f"jaxalign chat -m {run}"},
        {
            "about": "Answer a file of questions",
            "command": f"jaxalign generate -m {run} -d prompts.jsonl -o answers.jsonl temperature=0",
        },
        {
            "about": "Write a folder that transformers loads",
            "command": f"jaxalign export -m {run} -o merged --format hf",
        },
        {
            "about": "Train like this; put a file of your own after -d",
            "command": f"jaxalign train sft -m {model} -d {data} -o my-run {keys}",
        },
    ]


def _table(measures: Sequence[Row], before: str, after: str) -> str:
    """Two models in plain columns."""
    lines = [f"{'':20}{before:>26}{after:>26}   change"]
    for m in measures:
        cells = [
            f"{percent(r['rate'])} ({percent(r['low'])} to {percent(r['high'])})"
            for r in (m["before"], m["after"])
        ]
        lines.append(
            f"{m['name']:20}{cells[0]:>26}{cells[1]:>26}   {points(m['paired']['difference'])} points, "
            f"{p_value(m['paired']['p'])}"
        )
    return "\n".join(lines)
