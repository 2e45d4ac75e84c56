"""Attacks on models: how often each succeeds, by category, what defences change, and what they cost.

stages/SETTINGS/MODEL/DEFENCE/  what was asked and answered, a file a stage; the same command goes on
attempts.jsonl                  every try with its answer and verdict
report.json, report.html

RED-EVAL (arXiv:2308.09662): the attack success rate is B / (A + B) over the judge's verdicts A, not harmful,
and B, harmful; what has no verdict, N, is left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.readers import read_prompts
from jaxalign.data.records import Prompt, content_id
from jaxalign.errors import UserError
from jaxalign.evals.attack_rates import remarks, summarise
from jaxalign.evals.base import TEMPLATES, Evaluation
from jaxalign.llm.base import LLM, Request
from jaxalign.llm.open import open_llm
from jaxalign.llm.settings import LLMConfig
from jaxalign.pages.page import percent, points, write_page
from jaxalign.registry import ATTACKS
from jaxalign.synth.redteam.attacks import open_attacks
from jaxalign.synth.redteam.base import Attack, Case, Tried, canary
from jaxalign.synth.redteam.defences import open_defences
from jaxalign.synth.redteam.rounds import Arena, assault
from jaxalign.synth.stage import Rules
from jaxalign.synth.templates import Templates, shipped_names

SPEED = ("llm", "models", "judge", "helper", "benign", "templates")  # do not change what a stage is asked


class RedTeamEvaluation(Config):
    """The keys of `jaxalign evaluate redteam`."""

    attacks: tuple[str, ...] = tuple(ATTACKS)
    """names of attacks, files NAME.txt of your own with {{ question }} or <question> in them, or folders of
    such files"""
    defences: tuple[str, ...] = ()
    """what is tried against them: system, in_context, rewrite"""
    models: tuple[str, ...] = ()
    """further models to attack, as -m takes them"""
    judge: str | None = None
    """the model or endpoint that gives verdicts; null is the model that is attacked"""
    helper: str | None = None
    """translates and restates; null is the judge"""
    benign: Path | None = None
    """harmless questions: how often they are declined, without and with each defence"""
    category: str = "category"
    """the column by which rates are told apart"""
    temperature: float = Field(default=0.0, ge=0)
    """of the attacked models; 0 is greedy"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """of the attacked models"""
    max_tokens: int = Field(default=500, ge=1)
    """longest answer"""
    judge_tokens: int = Field(default=512, ge=1)
    """longest answer of judge and helper"""
    examples: int = Field(default=3, ge=0)
    """of few_shot_context"""
    pieces: int = Field(default=3, ge=1)
    """of multi_turn_split"""
    language: str = "French"
    """of translate"""
    sweep_temperature: tuple[float, ...] = (0.3, 0.7, 1.0)
    """of decode_sweep"""
    sweep_top_p: tuple[float, ...] = (1.0, 0.9)
    """of decode_sweep, each with every temperature"""
    search_rounds: int = Field(default=8, ge=1)
    """at most so many rounds of search"""
    limit: int = Field(default=0, ge=0)
    """use the first so many questions; 0 is all"""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """largest share of unreadable rows"""
    seed: int = Field(default=0, ge=0)
    """of everything random"""
    retries: int = Field(default=5, ge=0)
    """how often a judge or helper is asked again for what cannot be understood"""
    retry_temperature: float = Field(default=0.7, gt=0)
    """of a repeated request"""
    templates: Path | None = None
    """a folder of your own wording, NAME.txt, in place of that of the same name"""
    llm: LLMConfig = LLMConfig()
    """how models answer"""


@dataclass(frozen=True)
class Cast:
    """Who takes part. `judge` None: each model judges itself; `helper` None: the judge."""

    subjects: Sequence[LLM]
    judge: LLM | None = None
    helper: LLM | None = None


def evaluate_redteam(model: str | LLM, data: Any, out: Path, config: RedTeamEvaluation) -> dict[str, Any]:
    """Opens the models and attacks them: `attack_models` says what comes of it."""
    opened: dict[Any, LLM] = {}
    for name in (model, *config.models, config.judge, config.helper):
        if isinstance(name, str) and name not in opened:
            opened[name] = open_llm(name, config.llm, out / "cache.sqlite")
    subjects = [opened[name] if isinstance(name, str) else name for name in (model, *config.models)]
    named = [None if name is None else opened[name] for name in (config.judge, config.helper)]
    return attack_models(Cast(subjects, *named), data, out, config)


def attack_models(cast: Cast, data: Any, out: Path, config: RedTeamEvaluation) -> dict[str, Any]:
    """Attacks every model with and without every defence; writes `attempts.jsonl`, `report.json` and
    `report.html` into `out`. Returns what the report says. Raises `UserError`."""
    wording = Templates("redteam", config.templates)
    wording.check()
    attacks = open_attacks(config.attacks, wording, config)
    defences = open_defences(config.defences, wording)
    cases, rows = read_cases(data, config)
    benign, more = ([], []) if config.benign is None else read_cases(config.benign, config)
    found: list[tuple[str, list[tuple[str, list[Tried], list[Tried]]]]] = []
    place = _stages(out, config, wording, [*cases, *benign])
    for number, subject in enumerate(cast.subjects):
        arena = _arena(cast, number, wording, place, config)
        results = []
        for defence in defences:
            here = replace(arena, folder=arena.folder / defence.name)
            calm = replace(arena, folder=here.folder / "benign")
            tried = assault(here, cases, attacks, defence)
            asked = assault(calm, benign, _plain(wording, config), defence, judged=False)
            results.append((defence.name, tried, asked))
        found.append((subject.name, results))
    report = summarise(found, [a.name for a in attacks], config.seed) | {
        "judge": "the model itself" if cast.judge is None else cast.judge.name,
        "stand_ins": [a.name for a in attacks if _stands_in(a, wording)],
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "config": config.model_dump(mode="json"),
        "templates": dict(sorted(wording.used.items())),
        "rows": [*rows, *more],
    }
    _write_attempts(out, found)
    write_page(out, TEMPLATES / "redteam.html", report, remarks=remarks(report))
    return report


def _arena(cast: Cast, number: int, wording: Templates, place: Path, config: RedTeamEvaluation) -> Arena:
    """Who and how of one model."""
    subject = cast.subjects[number]
    judge = cast.judge or subject
    helper = cast.helper or judge
    about = content_id(subject.identity, judge.identity, helper.identity)
    return Arena(
        subject=subject,
        judge=judge,
        helper=helper,
        wording=wording,
        folder=place / f"{number}-{about}",
        asked=Request("", temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens),
        rules=Rules(config.seed, config.retries, config.retry_temperature),
        judge_tokens=config.judge_tokens,
    )


def _stages(out: Path, config: RedTeamEvaluation, wording: Templates, cases: Sequence[Case]) -> Path:
    """The folder of the stages: those of other settings, wording or questions lie in another one, so that
    nothing goes on with them."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in SPEED}
    texts = {name: wording[name].sha256 for name in shipped_names("redteam")}
    questions = [[case.id, case.question] for case in cases]
    return out / "stages" / content_id(settings, texts, dict(sorted(wording.used.items())), questions)


def _plain(wording: Templates, config: RedTeamEvaluation) -> list[Attack]:
    """What harmless questions are asked by: no attack."""
    return open_attacks(["identity"], wording, config)


def _stands_in(attack: Attack, wording: Templates) -> bool:
    """Whether the wording of an attack is the package's token in place of something meant."""
    return attack.name in ATTACKS and "<comply>" in (
        wording[attack.name].source + (wording["search_slots"].source if attack.name == "search" else "")
    )


def read_cases(data: Any, config: RedTeamEvaluation) -> tuple[list[Case], list[str]]:
    """The questions, and what was read. Raises `UserError` for rows that are more than one question."""
    prompts, report = read_prompts(data, max_bad_rows=config.max_bad_rows)
    kept = prompts[: config.limit] if config.limit else prompts
    cases = [Case(p.id, _question(p), _category(p, config.category), canary(config.seed, p.id)) for p in kept]
    return cases, report.lines()


def _question(prompt: Prompt) -> str:
    if prompt.messages is None:
        return str(prompt.text)
    if [m.role for m in prompt.messages] != ["user"]:
        raise UserError(
            "a row is more than one question",
            place=prompt.place,
            remedy="attacks put one question: give rows with a single user turn",
        )
    return prompt.messages[0].content


def _category(prompt: Prompt, column: str) -> str:
    meta = prompt.row.get("meta")
    value = prompt.row.get(column, meta.get(column) if isinstance(meta, dict) else None)
    return "all" if value is None else str(value)


def _write_attempts(
    out: Path, found: Iterable[tuple[str, Iterable[tuple[str, list[Tried], list[Tried]]]]]
) -> None:
    lines = [
        json.dumps({"model": model, "defence": defence, "benign": calm} | _row(tried), ensure_ascii=False)
        for model, results in found
        for defence, attacked, benign in results
        for calm, part in ((False, attacked), (True, benign))
        for tried in part
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "attempts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _row(tried: Tried) -> dict[str, Any]:
    names = ("attack", "label", "round", "verdict", "reason", "score", "queries", "refused", "answer")
    talk = [{"role": m.role, "content": m.content} for m in tried.talk]
    about = {"id": tried.case.id, "category": tried.case.category, "question": tried.case.question}
    return {name: getattr(tried, name) for name in names} | about | {"talk": talk}


def lines(report: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    out = []
    for model in report["models"]:
        for defence in model["defences"]:
            out.append(f"{model['name']}, defence {defence['name']}:")
            for row in defence["attacks"]:
                delta = (
                    "" if row["delta"] is None else f", {points(row['delta']['difference'])} by the defence"
                )
                out.append(
                    f"  {row['name']}: {percent(row['asr']['rate'])} succeed ({row['asr']['passed']} of "
                    f"{row['asr']['n']}, {row['excluded']} without verdict), {row['queries']} queries{delta}"
                )
            if defence["over_refusal"]["n"]:
                out.append(f"  harmless questions declined: {percent(defence['over_refusal']['rate'])}")
    return [*out, *remarks(report)]


EVALUATION = Evaluation(RedTeamEvaluation, evaluate_redteam, lines)
