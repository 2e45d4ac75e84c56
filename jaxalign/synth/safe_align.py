"""`safe_align`: safe ("blue") and harmful ("red") conversations on one question, and rows of them (SAFE-ALIGN
of arXiv:2308.09662): blue ones to imitate, blue before red as pairs, red ones as unwanted.

Conversations come with the data (`blue_conversations`, `red_conversations`), or are made: `model` answers
under a system prompt that asks for help without harm, `red`, a model that was never aligned, answers as it
does. A conversation stays if the judge calls a blue one harmless, a red one harmful.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from jaxalign.data.readers import load, to_prompts, unique_ids
from jaxalign.data.records import Message, Prompt, RowError, as_messages, check_roles, content_id
from jaxalign.llm.base import Request
from jaxalign.stats import rate_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.redteam.verdicts import parse_verdict, strip_thought
from jaxalign.synth.stage import Ask

Turns = tuple[Message, ...]
Row = dict[str, Any]
COLOURS = {"blue": "A", "red": "B"}  # and the verdict with which a conversation stays


class SafeAlignConfig(BuildConfig):
    """The keys of `jaxalign build safe_align`."""

    red: str | None = None
    """a model that was not aligned, whose harmful answers are the red ones; null is the model of -m"""
    judge: str | None = None
    """the model or endpoint that tells harm; null is the model of -m"""
    records: Literal["pairs", "sft", "labels"] = "pairs"
    """what the file holds: blue before red, blue ones to imitate, or red ones as unwanted; the other kinds
    lie in OUT.build"""
    n: int = Field(default=5, ge=1)
    """conversations of each colour on a question that has none"""
    turns: int = Field(default=2, ge=1)
    """questions of a conversation that is made: the first is the data's, the model thinks of the others"""
    temperature: float = Field(default=1.0, ge=0)
    """of conversations"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """of conversations"""
    max_tokens: int = Field(default=500, ge=1)
    """longest answer"""
    judge_tokens: int = Field(default=512, ge=1)
    """longest judgement"""


@dataclass(frozen=True)
class Talk:
    """One conversation on the question `item`; `turns` end on the assistant's."""

    item: str
    number: int
    colour: str
    question: str
    turns: Turns
    source: str = ""

    @property
    def id(self) -> str:
        """Of its requests and rows."""
        return f"{self.item}:{self.colour}-{self.number}"


@dataclass(frozen=True)
class Topic:
    """A question and the conversations that the data has on it."""

    id: str
    question: str
    talks: tuple[Talk, ...]
    source: str = ""


def build(work: Work) -> Built:
    """Rows of the kind that the key `records` names, the others beside."""
    config: SafeAlignConfig = work.config
    topics, _ = load(work.data, to_topics, max_bad_rows=config.max_bad_rows)
    topics = numbered(topics[: config.limit] if config.limit else topics)
    work.read(len(topics))
    talks = [talk for topic in topics for talk in topic.talks]
    bare = [topic for topic in topics if not topic.talks]
    for colour, role in (("blue", "model"), ("red", "red")):
        talks += made(work, bare, colour, role) if bare else []
    kept, report = checked(work, talks)
    pairs, apart = paired(kept)
    rows = {
        "pairs": pairs,
        "sft": [_row(t, messages=_plain(t.turns)) for t in kept if t.colour == "blue"],
        "labels": [_row(t, **_split(t), label=False) for t in kept if t.colour == "red"],
    }
    beside = {f"{name}.jsonl": found for name, found in rows.items() if name != config.records}
    dropped = {name: count for name, count in (report["dropped"] | apart).items() if count}
    metrics = report["metrics"] | {"records": {name: len(found) for name, found in rows.items()}}
    return Built(rows[config.records], metrics, dropped, beside)


# ----------------------------------------------------------------------------------------------- input


def to_topics(row: Any, place: str, source: str) -> tuple[list[Any], str]:
    """The question of a row, with its conversations if it has any. Raises `RowError`."""
    if not isinstance(row, dict) or not any(f"{colour}_conversations" in row for colour in COLOURS):
        prompts, name = to_prompts(row, place, source)
        return [_topic(prompt, source) for prompt in prompts], name
    question = str(row.get("question") or "").strip()
    if not question:
        raise RowError("no question")
    name = str(row.get("id") or content_id(question))
    talks = [
        Talk(name, number, colour, question, _conversation(raw), source)
        for colour in COLOURS
        for number, raw in enumerate(_several(row.get(f"{colour}_conversations")))
    ]
    if not talks:
        raise RowError("no conversations")
    return [Topic(name, question, tuple(talks), source)], "conversations"


def _topic(prompt: Prompt, source: str) -> Topic | RowError:
    turns = prompt.messages or (Message("user", str(prompt.text)),)
    if [turn.role for turn in turns] != ["user"]:
        return RowError("more than one question")
    return Topic(prompt.id, turns[0].content, (), source)


def _several(raw: Any) -> list[Any]:
    """Conversations by number, or in a list."""
    return list(raw.values()) if isinstance(raw, dict) else list(raw or [])


def _conversation(raw: Any) -> Turns:
    """Its turns up to the last of the assistant, without thoughts. Raises `RowError`."""
    turns = tuple(
        Message(m.role, strip_thought(m.content)) if m.role == "assistant" else m for m in as_messages(raw)
    )
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    return check_roles(turns[: last + 1])


def numbered(topics: Sequence[Topic]) -> list[Topic]:
    """The topics with an id each, which their conversations share."""
    return [
        replace(topic, talks=tuple(replace(talk, item=topic.id) for talk in topic.talks))
        for topic in unique_ids(list(topics))
    ]


# ------------------------------------------------------------------------------------------------ made


def made(work: Work, topics: Sequence[Topic], colour: str, role: str) -> list[Talk]:
    """`n` conversations on each question, turn by turn; a conversation that stops early is left out."""
    config: SafeAlignConfig = work.config
    talks = [
        Talk(topic.id, number, colour, topic.question, (Message("user", topic.question),), topic.source)
        for topic in topics
        for number in range(config.n)
    ]
    for turn in range(config.turns):
        if turn:
            template = work.templates["follow_up"]
            asks = {t.id: template.messages(turns=t.turns) for t in talks}
            talks = _longer(work, f"{colour}.question-{turn + 1}", talks, asks, "user", "model")
        system = work.templates["blue"].messages() if colour == "blue" else ()
        asks = {t.id: (*system, *t.turns) for t in talks}
        talks = _longer(work, f"{colour}.answer-{turn + 1}", talks, asks, "assistant", role)
    return talks


def _longer(
    work: Work, stage: str, talks: Sequence[Talk], asks: Mapping[str, Turns], speaker: str, role: str
) -> list[Talk]:
    """The conversations with one turn more, of all at once."""
    config: SafeAlignConfig = work.config
    items = [
        Ask(name, Request(prompt, 1, config.temperature, config.top_p, config.max_tokens), _said)
        for name, prompt in asks.items()
    ]
    found = work.ask(stage, items, role=role)
    return [replace(t, turns=(*t.turns, Message(speaker, found[t.id]))) for t in talks if t.id in found]


def _said(completions: Sequence[Any]) -> tuple[str | None, str]:
    text = strip_thought(completions[0].text).strip()
    return (text, "") if text else (None, "empty answer")


# ---------------------------------------------------------------------------------------------- judged


def checked(work: Work, talks: Sequence[Talk]) -> tuple[list[Talk], Row]:
    """The conversations that are what their colour says, and the counts of the others."""
    config: SafeAlignConfig = work.config
    template = work.templates["judge"]
    items = [
        Ask(
            talk.id,
            Request(
                template.messages(question=talk.question, answer=_answers(talk)),
                temperature=0.0,
                max_tokens=config.judge_tokens,
            ),
            parse_verdict,
        )
        for talk in talks
    ]
    found = work.ask("judge", items, role="judge")
    kept = [t for t in talks if found.get(t.id) == COLOURS[t.colour]]
    count = Counter((t.colour, found.get(t.id, "N")) for t in talks)
    rates = {
        f"{colour}_harmful": rate_interval(
            count[colour, "B"], count[colour, "A"] + count[colour, "B"]
        ).to_json()
        for colour in COLOURS
    }
    lost = {
        "a blue conversation is harmful": count["blue", "B"],
        "a red conversation is harmless": count["red", "A"],
        "no verdict": count["blue", "N"] + count["red", "N"],
    }
    return kept, {"metrics": rates, "dropped": lost}


def _answers(talk: Talk) -> str:
    """All that the assistant says."""
    return "\n\n".join(turn.content for turn in talk.turns if turn.role == "assistant")


# ------------------------------------------------------------------------------------------------ rows


def paired(talks: Sequence[Talk]) -> tuple[list[Row], dict[str, int]]:
    """PREF of the k-th blue and the k-th red conversation on a question, where both begin alike."""
    by = {(t.item, t.colour, t.number): t for t in talks}
    rows, lost = [], 0
    for blue in (t for t in talks if t.colour == "blue"):
        red = by.get((blue.item, "red", blue.number))
        if red is None:
            continue
        chosen, rejected = _split(blue), _split(red)
        if chosen["prompt"] != rejected["prompt"]:
            lost += 1
            continue
        answers = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
        row = _row(blue, prompt=chosen["prompt"], **answers)
        row["meta"] |= {"margin": None, "aspect": "harmless", "safe": {"chosen": True, "rejected": False}}
        rows.append(row | {"id": f"{blue.item}:{blue.number}"})
    return rows, {"blue and red begin differently": lost}


def _split(talk: Talk) -> Row:
    """The turns before the first answer, and those from it on."""
    first = next(i for i, turn in enumerate(talk.turns) if turn.role == "assistant")
    return {"prompt": _plain(talk.turns[:first]), "completion": _plain(talk.turns[first:])}


def _plain(turns: Turns) -> list[Row]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _row(talk: Talk, **fields: Any) -> Row:
    about = {"source": talk.source, "method": "safe_align", "colour": talk.colour, "prompt_id": talk.item}
    return {"id": talk.id, **fields, "meta": about}


BUILDER = Builder(SafeAlignConfig, build, roles=("red", "judge"))
