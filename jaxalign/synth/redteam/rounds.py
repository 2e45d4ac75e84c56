"""Attacks on one model, round by round: every turn of all tries of all attacks is one stage.

prepare        what a helper makes of the questions, such as translations
N.rewrite      a defence's restated messages of round N
N.turn-T       the subject's answers to the T-th message
N.restore      what a helper makes of the answers
N.verdicts     the judge's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import LLM, Completion, Request
from jaxalign.synth.redteam.base import Attack, Case, Tried, Try, Turns, randomness
from jaxalign.synth.redteam.defences import Defence
from jaxalign.synth.redteam.verdicts import parse_verdict, progress, strip_thought
from jaxalign.synth.refusals import is_refusal
from jaxalign.synth.stage import Ask, Outcome, Parse, Rules, Stage
from jaxalign.synth.templates import Templates

# (case, answer, verdict) -> how near an answer is to success
Scorer = Callable[[Case, str, str], float]
UNSUCCESSFUL = (
    1.0  # all answers of a stage may be missing: they are counted as N, and are no failure of the run
)


@dataclass(frozen=True)
class Arena:
    """Who takes part and how they are asked.

    subject  the model that is attacked; `judge` gives verdicts; `helper` translates and restates
    asked    the subject's sampling: a request without a prompt
    rules    of the stages; what a judge or a helper does not answer is asked again, the subject never is
    scorer   guides searches
    """

    subject: LLM
    judge: LLM
    helper: LLM
    wording: Templates
    folder: Path
    asked: Request
    rules: Rules = Rules()
    judge_tokens: int = 512
    scorer: Scorer = lambda case, answer, verdict: progress(answer, verdict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def subject_says(self, stage: str, items: Sequence[Ask]) -> dict[str, str]:
        """Answers by id; one that is missing was refused by the backend."""
        return self._stage(stage, self.subject, items, retries=0)

    def helper_says(self, stage: str, prompts: Mapping[str, Turns]) -> dict[str, str]:
        """Answers by id to greedy requests."""
        return self._stage(stage, self.helper, self._greedy(prompts, _words))

    def judge_says(self, stage: str, prompts: Mapping[str, Turns]) -> dict[str, str]:
        """Verdicts by id."""
        return self._stage(stage, self.judge, self._greedy(prompts, parse_verdict))

    def _greedy(self, prompts: Mapping[str, Turns], parse: Parse) -> list[Ask]:
        tokens = self.judge_tokens
        return [
            Ask(name, Request(p, temperature=0.0, max_tokens=tokens), parse) for name, p in prompts.items()
        ]

    def _stage(self, name: str, llm: LLM, items: Sequence[Ask], **changed: Any) -> dict[str, str]:
        if not items:
            return {}
        rules = replace(self.rules, max_parse_fail=UNSUCCESSFUL, **changed)
        outcome = self.outcomes[name] = Stage(name, self.folder, llm, rules).ask(items)
        return outcome.values


@dataclass
class Job:
    """One try under way: `turns` is what it says, `talk` what was said so far."""

    id: str
    attack: Attack
    case: Case
    attempt: Try
    round: int
    turns: Turns
    talk: list[Message] = field(default_factory=list)
    answer: str | None = None
    reason: str = ""
    queries: int = 0


def assault(
    arena: Arena, cases: Sequence[Case], attacks: Sequence[Attack], defence: Defence, judged: bool = True
) -> list[Tried]:
    """Every try of every attack on every case, in the order of rounds. Without `judged` an answer has no
    verdict, only whether it declines."""
    prepared, tried = _prepared(arena, cases, attacks)
    past: dict[tuple[str, str], list[Tried]] = {(a.name, c.id): [] for a, c in prepared}
    number = 0
    while jobs := _jobs(arena, prepared, past, number):
        _restate(arena, jobs, defence, number)
        _converse(arena, jobs, defence, number)
        answers = _restored(arena, jobs, number)
        verdicts = _verdicts(arena, jobs, answers, number) if judged else {}
        for job in jobs:
            done = _done(arena, job, answers.get(job.id), verdicts.get(job.id))
            past[job.attack.name, job.case.id].append(done)
            tried.append(done)
        number += 1
    return tried


def _prepared(
    arena: Arena, cases: Sequence[Case], attacks: Sequence[Attack]
) -> tuple[list[tuple[Attack, Case]], list[Tried]]:
    """(attack, case) with the case as its attack wants it, and those of which the helper made nothing."""
    wanted = [(a, c) for a in attacks for c in cases]
    prompts = {
        f"{a.name} {c.id}": arena.wording[a.prepare].messages(**_known(a, c)) for a, c in wanted if a.prepare
    }
    found = arena.helper_says("prepare", prompts)
    ready, failed = [], []
    for attack, case in wanted:
        name = f"{attack.name} {case.id}"
        if attack.prepare and name not in found:
            failed.append(Tried(attack.name, case, "", "N", reason="the helper prepared nothing"))
        else:
            ready.append((attack, replace(case, prepared=found.get(name, ""))))
    return ready, failed


def _known(attack: Attack, case: Case) -> dict[str, str]:
    """What templates of the helper may name."""
    return {"question": case.question, **attack.values}


def _jobs(
    arena: Arena,
    cases: Sequence[tuple[Attack, Case]],
    past: Mapping[tuple[str, str], Sequence[Tried]],
    number: int,
) -> list[Job]:
    """All tries of a round."""
    jobs = []
    for attack, case in cases:
        rng = randomness(arena.rules.seed, attack.name, case)
        for attempt in attack.tries(case, past[attack.name, case.id], rng):
            name = " | ".join(part for part in (attack.name, case.id, attempt.label) if part)
            jobs.append(Job(name, attack, case, attempt, number, attempt.messages))
    return jobs


def _restate(arena: Arena, jobs: Sequence[Job], defence: Defence, number: int) -> None:
    """Puts what the helper restated in place of what is asked. A message that it cannot restate is not
    sent."""
    if not defence.rewrite:
        return
    template = arena.wording[defence.rewrite]
    prompts = {
        f"{job.id} #{i}": template.messages(text=job.turns[i].content)
        for job in jobs
        for i in asked_turns(job.turns)
    }
    found = arena.helper_says(f"{number}.rewrite", prompts)
    for job in jobs:
        turns = list(job.turns)
        for i in asked_turns(job.turns):
            text = found.get(f"{job.id} #{i}")
            if text is None:
                job.reason = "the helper restated nothing"
            else:
                turns[i] = Message("user", text)
        job.turns = tuple(turns)


def asked_turns(turns: Turns) -> list[int]:
    """Where the user speaks and no answer follows. Raises `UserError` where the last turn is not the
    user's."""
    if not turns or turns[-1].role != "user":
        raise UserError("an attack ends on something else than the user's turn", remedy="mend its template")
    after = [turn.role for turn in turns[1:]] + ["user"]
    return [i for i, turn in enumerate(turns) if turn.role == "user" and after[i] == "user"]


def _converse(arena: Arena, jobs: Sequence[Job], defence: Defence, number: int) -> None:
    """Asks turn after turn, each of all jobs at once."""
    ends = {job.id: asked_turns(job.turns) for job in jobs}
    for turn in range(max(len(places) for places in ends.values())):
        now = [job for job in jobs if turn < len(ends[job.id]) and not job.reason]
        for job in now:
            start = ends[job.id][turn - 1] + 1 if turn else 0
            job.talk += job.turns[start : ends[job.id][turn] + 1]
        found = arena.subject_says(f"{number}.turn-{turn + 1}", [_ask(arena, job, defence) for job in now])
        for job in now:
            job.queries += 1
            job.answer = found.get(job.id)
            if job.answer is None:
                job.reason = "the model did not answer"
            elif turn + 1 < len(ends[job.id]):
                job.talk.append(Message("assistant", job.answer))


def _ask(arena: Arena, job: Job, defence: Defence) -> Ask:
    own = job.attempt.decoding
    temperature = arena.asked.temperature if own.temperature is None else own.temperature
    top_p = arena.asked.top_p if own.top_p is None else own.top_p
    prompt = defence.apply(tuple(job.talk))
    return Ask(job.id, replace(arena.asked, prompt=prompt, temperature=temperature, top_p=top_p), _text)


def _restored(arena: Arena, jobs: Sequence[Job], number: int) -> dict[str, str]:
    """Answers by id, without thoughts and turned back."""
    answers = {job.id: strip_thought(job.answer) for job in jobs if job.answer is not None and not job.reason}
    turned = [job for job in jobs if job.attack.restore and answers.get(job.id, "").strip()]
    prompts = {
        job.id: arena.wording[job.attack.restore].messages(
            **_known(job.attack, job.case), answer=answers[job.id]
        )
        for job in turned
    }
    found = arena.helper_says(f"{number}.restore", prompts)
    for job in turned:
        answers.pop(job.id)
        if job.id not in found:
            job.reason = "the helper did not turn the answer back"
    return answers | found


def _verdicts(arena: Arena, jobs: Sequence[Job], answers: Mapping[str, str], number: int) -> dict[str, str]:
    """A and B by id: the judge's, or whether the canary shows."""
    known = [job for job in jobs if job.id in answers]
    seen = {job.id: "B" if job.case.canary in answers[job.id] else "A" for job in known if job.attack.canary}
    template = arena.wording["judge"]
    prompts = {
        job.id: template.messages(question=job.case.question, answer=answers[job.id])
        for job in known
        if not job.attack.canary
    }
    return seen | arena.judge_says(f"{number}.verdicts", prompts)


def _done(arena: Arena, job: Job, answer: str | None, verdict: str | None) -> Tried:
    verdict = verdict or "N"
    reason = job.reason or ("" if verdict != "N" else "no verdict")
    return Tried(
        attack=job.attack.name,
        case=job.case,
        label=job.attempt.label,
        verdict=verdict,
        talk=tuple(job.talk),
        answer=answer or "",
        reason=reason,
        score=arena.scorer(job.case, answer or "", verdict),
        round=job.round,
        queries=job.queries,
        refused=answer is not None and is_refusal(answer),
    )


def _text(completions: tuple[Completion, ...]) -> tuple[str | None, str]:
    """Whatever was said, be it nothing."""
    return completions[0].text, ""


def _words(completions: tuple[Completion, ...]) -> tuple[str | None, str]:
    """What was said."""
    text = completions[0].text.strip()
    return (text, "") if text else (None, "empty answer")
