"""Critique and revise (CnR, arXiv:2311.14543): a model comments on an answer and writes a better one, several
times over; what it wrote is preferred to what it had before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from jaxalign.data.readers import read_records, unique_ids
from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Question, Request
from jaxalign.stats import mean_interval, rate_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.stage import Ask, Choose, Parsed
from jaxalign.synth.turns import pair_row, sft_row, transcript, turns_of

CRITIQUE, REVISION, DONE = "### Critique", "### Revised answer", "Nothing to improve."


class CnRConfig(BuildConfig):
    """Critique and revise."""

    passes: int = Field(5, ge=1)
    """how often an answer is revised; an answer that needs nothing more is left alone sooner"""
    steps: Literal["together", "apart"] = "together"
    """together: one reply holds critique and revision; apart: two replies, the second sees the first"""
    answers: Literal["sampled", "given"] = "sampled"
    """sampled: the writer answers the prompts first; given: the data's own answers are revised"""
    accept: Literal["always", "judge"] = "always"
    """judge: a revision is kept only where the judge prefers it in both orders"""
    compare: bool = False
    """let the judge compare every pass with the first answer: the report has its win rates"""
    output: Literal["pairs", "sft", "teach"] = "pairs"
    """pairs: each revision against the answer before it; sft: the last answers to imitate; teach: rows from
    which a model learns to criticise and revise"""
    temperature: float = Field(0.7, ge=0)
    """spread of the draws"""
    top_p: float = Field(1.0, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    max_tokens: int = Field(512, ge=1)
    """longest reply, critique and revision together"""
    writer: str | None = None
    """what gives the first answers; null: the model of -m"""
    judge: str | None = None
    """what compares answers; null: the model of -m"""


@dataclass
class _Case:
    """One prompt and its answers so far, oldest first. `over`: why it is not revised any more."""

    id: str
    prompt: tuple[Message, ...]
    answers: list[str]
    critiques: list[str] = field(default_factory=list)
    over: str = ""

    @property
    def task(self) -> str:
        """What was asked, as a critic reads it."""
        if len(self.prompt) == 1:
            return self.prompt[0].content
        return transcript(self.prompt).removesuffix("\n\nAssistant:").strip()


def run(work: Work) -> Built:
    """Revises all answers pass by pass; each pass asks for all of them at once."""
    config = work.config
    cases = _given(work) if config.answers == "given" else _sampled(work)
    kept = [case for case in cases if case.answers]
    refused: Counter[str] = Counter()
    for number in range(1, config.passes + 1):
        todo = [case for case in kept if not case.over]
        if not todo:
            break
        _revise(work, todo, number, refused)
    wins = _win_rates(work, kept) if config.compare else {}
    rows = [row for case in kept for row in _ROWS[config.output](work, case)]
    return Built(rows, _metrics(kept, refused) | wins, {"no first answer": len(cases) - len(kept)})


def _sampled(work: Work) -> list[_Case]:
    prompts = work.prompts()
    items = [Ask(p.id, _request(work, turns_of(p)), _answer) for p in prompts]
    found = work.ask("answers", items, "writer")
    return [_Case(p.id, turns_of(p), [found[p.id]] if p.id in found else []) for p in prompts]


def _given(work: Work) -> list[_Case]:
    """The last assistant turn of every row, and what stands before it."""
    records, report = read_records(work.data, max_bad_rows=work.config.max_bad_rows)
    for line in report.lines():
        work.say(line)
    chosen = unique_ids([r for r in records if r.messages])[: work.config.limit or None]
    if not chosen:
        raise UserError(
            "no row has messages", place="answers=given", remedy="give rows that end on an answer"
        )
    work.read(len(chosen))
    talks = [(r.id, r.messages) for r in chosen if r.messages]
    return [_Case(name, turns[:-1], [turns[-1].content]) for name, turns in talks]


def _revise(work: Work, todo: Sequence[_Case], number: int, refused: Counter[str]) -> None:
    """One pass over the cases that go on."""
    found = _STEPS[work.config.steps](work, todo, number)
    pending = []
    for case in todo:
        said = found.get(case.id)
        if said is None:
            case.over = "no_revision"
            continue
        case.critiques.append(said["critique"])
        if said["revision"] is None:
            case.over = "nothing to improve"
        elif said["revision"] == case.answers[-1]:
            case.over = "unchanged"
        else:
            pending.append((case, said["revision"]))
    better = {case.id for case, _ in pending}
    if work.config.accept == "judge":
        better = _preferred(
            work, f"accept-{number}", [(c.id, c.task, new, c.answers[-1]) for c, new in pending]
        )
    for case, revision in pending:
        if case.id in better:
            case.answers.append(revision)
        else:
            case.over = "not preferred"
            refused["not preferred"] += 1


def _together(work: Work, cases: Sequence[_Case], number: int) -> dict[str, Any]:
    template = work.templates["critique_revise"]
    headers = {"critique_header": CRITIQUE, "revision_header": REVISION, "done": DONE}
    items = [
        Ask(c.id, _request(work, template.messages(task=c.task, answer=c.answers[-1], **headers)), sections)
        for c in cases
    ]
    return work.ask(f"revise-{number}", items)


def _apart(work: Work, cases: Sequence[_Case], number: int) -> dict[str, Any]:
    critic, reviser = work.templates["critique"], work.templates["revise"]
    slots = {c.id: {"task": c.task, "answer": c.answers[-1]} for c in cases}
    asked = {name: critic.messages(**known, done=DONE) for name, known in slots.items()}
    critiques = work.ask(f"critique-{number}", [Ask(n, _request(work, m), _answer) for n, m in asked.items()])
    open_ = {name: text for name, text in critiques.items() if not is_done(text)}
    asked = {name: reviser.messages(**slots[name], critique=text) for name, text in open_.items()}
    revisions = work.ask(f"revise-{number}", [Ask(n, _request(work, m), _answer) for n, m in asked.items()])
    return {
        name: {"critique": text, "revision": revisions.get(name)}
        for name, text in critiques.items()
        if name in revisions or name not in open_
    }


def sections(completions: Sequence[Completion]) -> Parsed:
    """Critique and revision of one reply; a critique that finds nothing to mend has no revision."""
    text = completions[0].text
    if text.count(CRITIQUE) != 1 or text.count(REVISION) > 1:
        return None, "the headers are not there once each"
    critique, header, revision = text.partition(CRITIQUE)[2].partition(REVISION)
    critique, revision = critique.strip(), revision.strip()
    if not critique:
        return None, "no critique"
    if is_done(critique) and not revision:
        return {"critique": critique, "revision": None}, ""
    if not header or not revision:
        return None, "no revision"
    if completions[0].finish != "stop":
        return None, "the revision does not end"
    return {"critique": critique, "revision": revision}, ""


def is_done(critique: str) -> bool:
    """Whether it says that nothing is to be improved."""
    return DONE.rstrip(".").lower() in critique.lower()


def _answer(completions: Sequence[Completion]) -> Parsed:
    text = completions[0].text.strip()
    if completions[0].finish != "stop":
        return None, "the answer does not end"
    return (text, "") if text else (None, "an empty answer")


def _request(work: Work, prompt: tuple[Message, ...]) -> Request:
    c = work.config
    return Request(prompt, temperature=c.temperature, top_p=c.top_p, max_tokens=c.max_tokens)


def _preferred(work: Work, stage: str, compared: Sequence[tuple[str, str, str, str]]) -> set[str]:
    """Ids of (id, task, new, old) whose new answer the judge prefers in both orders."""
    return {name for name, score in _scores(work, stage, compared).items() if score == 1.0}


def _scores(work: Work, stage: str, compared: Sequence[tuple[str, str, str, str]]) -> dict[str, float]:
    """{id: 1, 0, or 1/2 where the preference turns with the order} of (id, task, new, old)."""
    template, items = work.templates["compare"], []
    for name, task, new, old in compared:
        for order, (first, second) in (("new", (new, old)), ("old", (old, new))):
            prompt = template.messages(task=task, first=first, second=second)
            items.append(Choose(f"{name} {order} first", Question(prompt, ("A", "B"))))
    found = work.choose(stage, items, "judge")
    scores = {}
    for name, *_ in compared:
        straight, swapped = (found.get(f"{name} {order} first") for order in ("new", "old"))
        if straight and swapped:
            wins = [straight[0] > straight[1], swapped[1] > swapped[0]]
            scores[name] = sum(wins) / 2
    return scores


def _win_rates(work: Work, cases: Sequence[_Case]) -> dict[str, Any]:
    """The share of answers after each pass that the judge prefers to the first ones, ties as halves."""
    rates = {}
    for number in range(1, max((len(c.answers) for c in cases), default=1)):
        changed = [c for c in cases if len(c.answers) > 1]
        compared = [(c.id, c.task, c.answers[min(number, len(c.answers) - 1)], c.answers[0]) for c in changed]
        scores = _scores(work, f"compare-{number}", compared)
        same = [0.5] * (len(cases) - len(changed))
        rates[str(number)] = mean_interval([*scores.values(), *same]).to_json()
    return {"win_rate_over_first": rates}


def _metrics(cases: Sequence[_Case], refused: Counter[str]) -> dict[str, Any]:
    passes = [len(case.answers) - 1 for case in cases]
    revised = [case for case in cases if len(case.answers) > 1]
    growth = [len(c.answers[-1].split()) / max(1, len(c.answers[0].split())) for c in revised]
    return {
        "revised": rate_interval(len(revised), len(cases)).to_json(),
        "passes": {str(n): passes.count(n) for n in range(max(passes, default=0) + 1)},
        "ended": dict(Counter(case.over or "all passes" for case in cases)),
        "length_growth": mean_interval(growth).to_json(),
        "refused_revisions": dict(refused),
    }


def _pairs(work: Work, case: _Case) -> list[dict[str, Any]]:
    return [
        pair_row(
            f"{case.id}:{i + 1}",
            case.prompt,
            case.answers[i + 1],
            case.answers[i],
            source="cnr",
            method="cnr",
            iteration=i + 1,
            parent=case.id,
            critique=case.critiques[i],
        )
        for i in range(len(case.answers) - 1)
    ]


def _last(work: Work, case: _Case) -> list[dict[str, Any]]:
    about = {"source": "cnr", "method": "cnr", "iteration": len(case.answers) - 1}
    return [sft_row(case.id, case.prompt, case.answers[-1], **about)]


def _lessons(work: Work, case: _Case) -> list[dict[str, Any]]:
    """What a model learns to criticise and revise from: the request, and a reply in its form."""
    template, rows = work.templates["critique_revise"], []
    headers = {"critique_header": CRITIQUE, "revision_header": REVISION, "done": DONE}
    for i in range(len(case.answers) - 1):
        asked = template.messages(task=case.task, answer=case.answers[i], **headers)
        reply = f"{CRITIQUE}\n{case.critiques[i]}\n{REVISION}\n{case.answers[i + 1]}"
        about = {"source": "cnr", "method": "cnr", "iteration": i + 1, "parent": case.id}
        rows.append(sft_row(f"{case.id}:{i + 1}", asked, reply, **about))
    return rows


_STEPS: dict[str, Callable[..., dict[str, Any]]] = {"together": _together, "apart": _apart}
_ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {"pairs": _pairs, "sft": _last, "teach": _lessons}

BUILDER = Builder(CnRConfig, run, roles=("writer", "judge"))
