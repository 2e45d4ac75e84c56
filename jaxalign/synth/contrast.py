"""Pairs without people: RLCD (arXiv:2307.12950) and RLAIF (arXiv:2212.08073, as that paper compares with it).

RLCD asks twice, once in a good character and once in its opposite, and takes the first answer as the chosen
one: nobody judges. RLAIF asks twice alike and lets a model say which answer is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from jaxalign.data.records import Message, Prompt
from jaxalign.llm.base import Completion, Question, Request
from jaxalign.llm.base import Prompt as Said
from jaxalign.stats import mean_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.stage import Ask, Choose, Parsed
from jaxalign.synth.turns import draws, pair_row, sft_row, transcript, turns_of

STOPS = ("\n\nHuman:", "\n\nAssistant:")  # where a base model begins the next turn by itself
UNWANTED = ("\\", "`")  # no character of a conversation, but of code


Pair = tuple[str, str]


class ContrastConfig(BuildConfig):
    """What both have in common."""

    task: Literal["harmless", "helpful"] = "harmless"
    """what the answers are to be contrasted or judged by"""
    form: Literal["chat", "transcript"] = "chat"
    """chat goes through the model's chat template; transcript is continued as it stands, for base models"""
    temperature: float = Field(1.0, gt=0)
    """spread of the draws"""
    top_p: float = Field(1.0, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    max_tokens: int = Field(300, ge=1)
    """longest answer; one that does not end by itself is drawn again"""
    both_orders: bool = True
    """a judge sees the two answers in both orders; false: in one, which is drawn"""
    judge: str | None = None
    """what says which answer is better, where that is asked; null: the model of -m"""


class RLCDConfig(ContrastConfig):
    """Contrast of characters."""

    rescore: bool = False
    """let the judge label the two answers, as RLAIF does"""
    output: Literal["pairs", "sft"] = "pairs"
    """sft: the good answers as rows to imitate (context distillation)"""


class RLAIFConfig(ContrastConfig):
    """Two answers and a judge."""


@dataclass(frozen=True)
class _Asked:
    """One way to put a prompt to the model."""

    prompt: Prompt
    said: Said


def rlcd(work: Work) -> Built:
    """Pairs whose chosen answer was given in the good character."""
    config, prompts = work.config, work.prompts()
    characters = [
        tuple(part.strip() for part in line.split("|"))
        for line in work.templates[f"characters_{config.task}"].source.splitlines()
    ]
    which = {p.id: int(draws(config.seed, p.id).integers(len(characters))) for p in prompts}
    sides = [
        _answers(work, side, [_Asked(p, _in_character(work, p, characters[which[p.id]], i)) for p in prompts])
        for i, side in enumerate(("positive", "negative"))
    ]
    both = [p for p in prompts if all(p.id in side for side in sides)]
    found = {p.id: (sides[0][p.id], sides[1][p.id]) for p in both}
    wins = _judged(work, both, found) if config.rescore else {}
    kept = [p for p in both if p.id in wins or not config.rescore]
    rows = []
    for p in kept:
        about = {"source": "rlcd", "method": "rlcd", "task": config.task, "character": which[p.id]}
        if config.output == "sft":
            rows.append(sft_row(p.id, turns_of(p), found[p.id][0], **about))
        else:
            rows.append(_pair(p, found[p.id], wins.get(p.id), about))
    used = [which[p.id] for p in kept]
    shares = {"characters": [used.count(i) for i in range(len(characters))]}
    dropped = {
        "one of the two answers is missing": len(prompts) - len(both),
        "not judged": len(both) - len(kept),
    }
    return Built(rows, _lengths(rows) | _judgement(wins) | shares, dropped)


def rlaif(work: Work) -> Built:
    """Pairs of two answers to the plain prompt, the chosen one picked by the judge."""
    config, prompts = work.config, work.prompts()
    plain = {p.id: transcript(turns_of(p)) if config.form == "transcript" else turns_of(p) for p in prompts}
    sides = [_answers(work, side, [_Asked(p, plain[p.id]) for p in prompts]) for side in ("first", "second")]
    both = [p for p in prompts if all(p.id in side for side in sides)]
    found = {p.id: (sides[0][p.id], sides[1][p.id]) for p in both}
    different = [p for p in both if found[p.id][0] != found[p.id][1]]
    wins = _judged(work, different, found)
    about = {"source": "rlaif", "method": "rlaif", "task": config.task}
    rows = [_pair(p, found[p.id], wins[p.id], about) for p in different if p.id in wins]
    dropped = {
        "one of the two answers is missing": len(prompts) - len(both),
        "two equal answers": len(both) - len(different),
        "not judged": len(different) - len(rows),
    }
    return Built(rows, _lengths(rows) | _judgement(wins), dropped)


def _in_character(work: Work, prompt: Prompt, pair: tuple[str, ...], side: int) -> Said:
    """The prompt put to a model that plays `pair[side]`. In a transcript the turns before were given in the
    opposite character, so that the change stands out (arXiv:2307.12950, appendix)."""
    turns = turns_of(prompt)
    if work.config.form == "transcript":
        return transcript(turns, last=pair[side], earlier=pair[1 - side])
    system = [m for m in turns if m.role == "system"]
    character = work.templates["chat"].messages(character=pair[side])[0].content
    head = "\n\n".join([*(m.content for m in system), character])
    return (Message("system", head), *(m for m in turns if m.role != "system"))


def _answers(work: Work, stage: str, asked: Sequence[_Asked]) -> dict[str, str]:
    config = work.config
    parse, stop = (_continued, STOPS) if config.form == "transcript" else (_answered, ())
    how = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
    items = [Ask(a.prompt.id, Request(a.said, stop=stop, **how), parse) for a in asked]
    return work.ask(stage, items)


def _answered(completions: Sequence[Completion]) -> Parsed:
    """The answer of a chat model, which ended it itself."""
    (found,) = completions
    text = found.text.strip()
    if found.finish != "stop":
        return None, "the answer does not end"
    if any(mark in text for mark in UNWANTED):
        return None, "characters of code"
    return (text, "") if text else (None, "an empty answer")


def _continued(completions: Sequence[Completion]) -> Parsed:
    """The answer of a base model: up to the next turn; what stands before a cue of its own is dropped."""
    value, reason = _answered(completions)
    if value is None:
        return None, reason
    text = value.rpartition("Assistant:")[2].strip()
    return (text, "") if text else (None, "an empty answer")


def _judged(work: Work, prompts: Sequence[Prompt], found: dict[str, Pair]) -> dict[str, list[float]]:
    """{id: p(the first answer is better)} for each order in which the judge saw them."""
    config = work.config
    criteria = work.templates[f"criteria_{config.task}"].source.splitlines()
    items = []
    for p in prompts:
        rng = draws(config.seed + 1, p.id)
        criterion = criteria[int(rng.integers(len(criteria)))]
        orders = (False, True) if config.both_orders else (bool(rng.integers(2)),)
        for swapped in orders:
            first, second = found[p.id]
            pair = (second, first) if swapped else (first, second)
            question = Question(_label_prompt(work, p, pair, criterion), ("A", "B"))
            items.append(Choose(f"{p.id} {'swapped' if swapped else 'straight'}", question))
    chosen = work.choose("label", items, "judge")
    wins: dict[str, list[float]] = {}
    for name, (first, second) in chosen.items():
        key, _, order = name.rpartition(" ")
        wins.setdefault(key, []).append(math.exp(second if order == "swapped" else first))
    return wins


def _label_prompt(work: Work, prompt: Prompt, pair: Pair, criterion: str) -> Said:
    conversation = transcript(turns_of(prompt)).removesuffix("\n\nAssistant:").strip()
    slots = {"conversation": conversation, "first": pair[0], "second": pair[1], "criterion": criterion}
    if work.config.form == "transcript":
        return work.templates["label_text"].text(**slots)
    return work.templates["label"].messages(**slots)


def _pair(
    prompt: Prompt, answers: tuple[str, str], wins: list[float] | None, about: dict[str, Any]
) -> dict[str, Any]:
    """The row of two answers; the margin is |2p - 1| of a judge who was asked."""
    p = None if wins is None else sum(wins) / len(wins)
    better, worse = answers if p is None or p >= 0.5 else answers[::-1]
    about = about if p is None else about | {"margin": abs(2 * p - 1), "first_better": p}
    return pair_row(prompt.id, turns_of(prompt), better, worse, **about)


def _lengths(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean words of chosen and rejected answers: a method that only prefers the longer one shows here."""
    sides = [side for side in ("chosen", "rejected") if rows and side in rows[0]]
    words = {side: [len(row[side].split()) for row in rows] for side in sides}
    return {"words": {side: mean_interval(n).to_json() for side, n in words.items()}}


def _judgement(wins: dict[str, list[float]]) -> dict[str, Any]:
    """Where the judge's preference depended on the order, it was no preference of an answer."""
    both = [pair for pair in wins.values() if len(pair) == 2]
    agree = sum((a > 0.5) == (b > 0.5) for a, b in both)
    return {
        "first_better": sum(sum(w) / len(w) >= 0.5 for w in wins.values()) / len(wins) if wins else None,
        "position_consistency": agree / len(both) if both else None,
    }


RLCD = Builder(RLCDConfig, rlcd, roles=("judge",), templates="rlcd")
RLAIF = Builder(RLAIFConfig, rlaif, roles=("judge",), templates="rlcd")
