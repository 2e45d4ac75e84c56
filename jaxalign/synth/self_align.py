"""Principle-driven self-alignment (SELF-ALIGN, Sun et al. 2023, arXiv:2305.03047).

engrave  a base model answers by sixteen principles and five worked conversations, with a thought before each
         answer. The rows hold neither: what is trained on them has the principles engraved.
verbose  the engraved model answers once more, asked to be thorough; rows have short system prompts instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from jaxalign.data.readers import read_records
from jaxalign.data.records import Message, Prompt, SFTRecord
from jaxalign.llm.base import Completion, Request
from jaxalign.llm.base import Prompt as Asked
from jaxalign.stats import mean_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.self_align_filters import (
    Draft,
    Filter,
    cut,
    long_or_ended,
    not_at_start,
    not_empty,
    refine,
    renamed,
    thought,
    unrepeated,
    without,
    without_line,
)
from jaxalign.synth.self_instruct import phrases
from jaxalign.synth.stage import Ask, Parsed
from jaxalign.synth.topics import prompt_of
from jaxalign.synth.turns import draws, sft_row, spelled, transcript, turns_of
from jaxalign.text_stats import distinct_n

USER_CUE = "### User"


class SelfAlignConfig(BuildConfig):
    """Principle-driven self-alignment; -d are prompts, such as `self_instruct` makes."""

    stage: Literal["engrave", "verbose"] = "engrave"
    """engrave: a base model answers by principles; verbose: the model tuned on that answers at length"""
    codename: str = Field("Tamsin", min_length=1)
    """the assistant's name in prompts; no row holds it"""
    persona: str = Field("Assistant", min_length=1)
    """what stands in its place in answers"""
    chat: bool = False
    """engrave: ask through the chat template; false: the conversations are continued as plain text, as base
    models do"""
    temperature: float | None = Field(None, ge=0)
    """spread of the draws; null: 0.5 to engrave, 0.3 for verbose"""
    top_p: float | None = Field(None, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; null: 0.95 to engrave, 0.7 for
    verbose"""
    max_tokens: int | None = Field(None, ge=1)
    """longest reply, thought and answer together; null: 256 to engrave, 512 for verbose"""
    identity: Path | None = None
    """rows in which the assistant tells about itself, added to the result as they are"""


@dataclass(frozen=True)
class _Stage:
    """How one of the two stages asks, what it keeps of a reply, and the system turn of its rows."""

    temperature: float
    top_p: float
    max_tokens: int
    ask: Callable[[Work, str], Asked]
    filters: Callable[[Work], list[Filter]]
    system: Callable[[Work, str], str]


def run(work: Work) -> Built:
    """Asks everything at once, filters, and writes the answers as if nothing had been said before them."""
    config, prompts = work.config, work.prompts()
    stage = _STAGES[config.stage]
    own = {p.id: _question(p) for p in prompts}
    items = [Ask(name, _request(work, stage, text), _reply) for name, text in own.items()]
    replies = work.ask(config.stage, items)
    filters, kept, dropped = stage.filters(work), {}, Counter[str]()
    for name, reply in replies.items():
        found = refine(Draft(own[name], reply["text"], reply["ended"]), filters)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            kept[name] = found
    rows = [_row(work, stage, p, kept[p.id]) for p in prompts if p.id in kept]
    extra = _identity(work) if config.identity else []
    metrics = _metrics([p for p in prompts if p.id in kept], kept) | {"identity_rows": len(extra)}
    return Built([*rows, *extra], metrics, dropped)


def _question(prompt: Prompt) -> str:
    """What the user says; of several turns, the conversation."""
    turns = turns_of(prompt)
    if len(turns) == 1:
        return turns[0].content.strip()
    return transcript(turns).removesuffix("Assistant:").strip()


def _request(work: Work, stage: _Stage, question: str) -> Request:
    given = {key: getattr(work.config, key) for key in ("temperature", "top_p", "max_tokens")}
    return Request(
        stage.ask(work, question),
        **{key: getattr(stage, key) if value is None else value for key, value in given.items()},
    )


def _reply(completions: Sequence[Completion]) -> Parsed:
    """Any reply that says something: what is wrong with it is for the filters to say, and to count."""
    text = completions[0].text.strip()
    return (
        ({"text": text, "ended": completions[0].finish == "stop"}, "") if text else (None, "an empty reply")
    )


def identity_of(codename: str) -> str:
    """The sentence with which every thought begins."""
    return f"I am {codename}, an AI assistant."


def _ask_by_principles(work: Work, question: str) -> Asked:
    name = work.config.codename
    principles = work.templates["principles"].text(name=name)
    values = {"name": name, "principles": principles, "identity": identity_of(name), "question": question}
    return prompt_of(work.templates["align"], work.config.chat, **values)


def _ask_at_length(work: Work, question: str) -> Asked:
    return work.templates["verbose"].messages(name=work.config.codename, question=question)


def _engraving(work: Work) -> list[Filter]:
    name = work.config.codename
    listed = {n: phrases(work.templates[n].text()) for n in ("leak_words", "auto_replies", "apologies")}
    return [
        thought(identity_of(name), f"### {name}"),
        cut(USER_CUE),
        unrepeated,
        without("a word of the worked conversations", listed["leak_words"]),
        without("an automatic reply", listed["auto_replies"]),
        not_at_start("an apology", listed["apologies"]),
        renamed(name, work.config.persona),
        not_empty,
    ]


def _lengthening(work: Work) -> list[Filter]:
    listed = {n: phrases(work.templates[n].text()) for n in ("footers", "canned_ethics")}
    return [
        unrepeated,
        long_or_ended,
        without_line("the footer of an encyclopedia", listed["footers"]),
        without("a canned paragraph", listed["canned_ethics"]),
        renamed(work.config.codename, work.config.persona),
        not_empty,
    ]


def _deployed(work: Work, name: str) -> str:
    """One of the system prompts, at random."""
    lines = work.templates["deployment"].text().splitlines()
    return lines[draws(work.config.seed, name).integers(len(lines))]


_STAGES = {
    "engrave": _Stage(0.5, 0.95, 256, _ask_by_principles, _engraving, lambda work, name: ""),
    "verbose": _Stage(0.3, 0.7, 512, _ask_at_length, _lengthening, _deployed),
}


def _row(work: Work, stage: _Stage, prompt: Prompt, draft: Draft) -> dict[str, Any]:
    """The user's turns and the answer; of the principles no more than their numbers, in `meta`."""
    system = stage.system(work, prompt.id)
    turns = [m for m in turns_of(prompt) if m.role != "system" or not system]
    about = {"source": _source(prompt), "method": "self_align", "stage": work.config.stage}
    if draft.principles:
        about["principles"] = list(draft.principles)
    return sft_row(prompt.id, [*([Message("system", system)] if system else []), *turns], draft.text, **about)


def _source(prompt: Prompt) -> str:
    """How the prompt was made, or where it is from."""
    meta = prompt.row.get("meta")
    said = meta if isinstance(meta, dict) else {}
    return str(
        said.get("method") if said.get("source") == "self_instruct" else said.get("source") or "prompts"
    )


def _identity(work: Work) -> list[dict[str, Any]]:
    records, report = read_records(work.config.identity, max_bad_rows=work.config.max_bad_rows)
    for line in report.lines():
        work.say(f"identity: {line}")
    return [_as_row(record) for record in records if record.messages]


def _as_row(record: SFTRecord) -> dict[str, Any]:
    about = {"source": "identity", "method": "self_align"}
    return {"id": f"identity-{record.id}", "messages": spelled(record.messages or ()), "meta": about}


def _metrics(prompts: Sequence[Prompt], kept: dict[str, Draft]) -> dict[str, Any]:
    answers = {name: draft.text for name, draft in kept.items()}
    used: dict[str, Counter[int]] = defaultdict(Counter)
    for prompt in prompts:
        used[_source(prompt)].update(kept[prompt.id].principles)
    before = [(p, earlier) for p in prompts if (earlier := _earlier(p))]
    growth = [len(answers[p.id].split()) / len(earlier.split()) for p, earlier in before]
    return {
        "kept_per_source": dict(Counter(_source(p) for p in prompts)),
        "principles": {s: {str(n): count[n] for n in sorted(count)} for s, count in used.items() if count},
        "prompt_words": mean_interval([len(_question(p).split()) for p in prompts]).to_json(),
        "answer_words": mean_interval([len(text.split()) for text in answers.values()]).to_json(),
        "growth_over_given_answers": mean_interval(growth).to_json(),
        "distinct_2": distinct_n(answers.values(), 2),
    }


def _earlier(prompt: Prompt) -> str:
    """The answer that the row has already, such as one of stage engrave."""
    turns = prompt.row.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    return str(last.get("content") or "").strip() if last.get("role") == "assistant" else ""


BUILDER = Builder(SelfAlignConfig, run)
