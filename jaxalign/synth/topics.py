"""Topic-guided red-teaming self-instruct (TGRT, Sun et al. 2023, arXiv:2305.03047): for twenty kinds of
question that a model is likely to get wrong, topics are grown, and for each topic a question.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from jaxalign.config import Config
from jaxalign.llm.base import Completion, Prompt, Request
from jaxalign.synth.stage import Ask, Parsed
from jaxalign.synth.templates import Template
from jaxalign.synth.turns import draws
from jaxalign.text_stats import distinct_n

if TYPE_CHECKING:
    from jaxalign.synth.base import Work

SEEDS = Path(__file__).parent / "seeds" / "topics.jsonl"
SHOWN, WANTED = 5, 10  # topics that a list begins with, and that are asked for
SMALL_POOL = 10  # of a smaller pool only one topic is shown
HINTS = 5  # questions of one request, and examples before them
_LINE = re.compile(r"^\s*(\d+)\.\s*(.*?)\s*$")


class TopicsConfig(Config):
    """Topic-guided questions."""

    rounds: int = Field(default=5, ge=1)
    """rounds in which every kind of question is asked for ten more topics"""
    question_rounds: int = Field(default=2, ge=1)
    """rounds in which topics without a question are given one"""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """of the questions: draw from the likeliest tokens whose probabilities add up to this"""
    topic_tokens: int = Field(default=128, ge=1)
    """longest list of topics, in tokens"""
    question_tokens: int = Field(default=384, ge=1)
    """longest list of questions, in tokens"""


@dataclass(frozen=True)
class Hint:
    """A kind of question and its topic, and the question, once there is one."""

    type: str
    topic: str
    question: str = ""

    @property
    def id(self) -> str:
        """Of its row."""
        return f"tgrt-{self.type}-{self.topic}".replace(" ", "_")


@dataclass(frozen=True)
class Grown:
    """What came of it."""

    questions: list[Hint]
    metrics: dict[str, Any]
    dropped: Counter[str]


def prompt_of(template: Template, chat: bool, **values: Any) -> Prompt:
    """Turns for a chat model, or text that a base model continues."""
    return template.messages(**values) if chat else template.text(**values)


def led(text: str, lead: str) -> str:
    """The reply with the `lead` that its prompt ended in, whether or not it repeats it."""
    return text.lstrip() if text.lstrip().startswith(lead) else f"{lead} {text.lstrip()}"


def grow_topics(work: Work, config: TopicsConfig, chat: bool) -> Grown:
    """Topics of every kind, as many of each, then a question for each topic."""
    seeds = [Hint(**json.loads(line)) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    dropped: Counter[str] = Counter()
    topics = {seed.type: [seed.topic] for seed in seeds}
    for number in range(1, config.rounds + 1):
        topics = balanced(_more(work, config, chat, topics, number, dropped))
    known = {(seed.type, seed.topic) for seed in seeds}
    hints = [Hint(t, topic) for t, found in topics.items() for topic in found if (t, topic) not in known]
    asked: dict[tuple[str, str], str] = {}
    for number in range(1, config.question_rounds + 1):
        todo = [hint for hint in hints if (hint.type, hint.topic) not in asked]
        if not todo:
            break
        asked |= _questions(work, config, chat, seeds, todo, number, dropped)
    questions = [Hint(h.type, h.topic, asked[h.type, h.topic]) for h in hints if (h.type, h.topic) in asked]
    return Grown(questions, _metrics(topics, hints, questions), dropped)


def _more(
    work: Work,
    config: TopicsConfig,
    chat: bool,
    topics: Mapping[str, list[str]],
    number: int,
    dropped: Counter[str],
) -> dict[str, list[str]]:
    """One round: ten more topics of every kind."""
    template, items = work.templates["topics"], []
    for kind, pool in topics.items():
        rng = draws(work.config.seed, f"topics {number} {kind}")
        some = SHOWN if len(pool) >= SMALL_POOL else 1
        shown = [pool[i] for i in rng.choice(len(pool), some, replace=False)]
        prompt = prompt_of(template, chat, type=kind, topics=shown, total=len(shown) + WANTED)
        request = Request(
            prompt,
            temperature=work.config.temperature,
            top_p=work.config.top_p,
            max_tokens=config.topic_tokens,
        )
        items.append(Ask(kind, request, partial(parse_topics, first=len(shown) + 1)))
    found = work.ask(f"topics-{number}", items)
    grown = {}
    for kind, pool in topics.items():
        said = found.get(kind, {"topics": [], "refused": 0})
        dropped["not a topic"] += said["refused"]
        grown[kind] = unlike([*pool, *said["topics"]])
        dropped["a topic twice"] += len(pool) + len(said["topics"]) - len(grown[kind])
    return grown


def parse_topics(completions: Sequence[Completion], first: int) -> Parsed:
    """{topics, refused} of a numbered list that goes on at `first`; a list ends where its numbers do."""
    lines = led(completions[0].text, f"{first}.").splitlines()
    if completions[0].finish != "stop":
        lines = lines[:-1]
    found, refused = [], 0
    for number, line in enumerate((line for line in lines if line.strip()), start=first):
        match = _LINE.match(line)
        if not match or int(match[1]) != number:
            break
        if is_topic(match[2]):
            found.append(match[2])
        else:
            refused += 1
    return ({"topics": found, "refused": refused}, "") if found else (None, "no topic")


def is_topic(text: str) -> bool:
    """One to three words, a capital at the start, no punctuation at the end."""
    return 0 < len(text.split()) <= 3 and text[0].isupper() and text[-1].isalnum()


def unlike(topics: Sequence[str]) -> list[str]:
    """Each topic once, capitals and small letters being the same."""
    found: dict[str, str] = {}
    for topic in topics:
        found.setdefault(topic.lower(), topic)
    return list(found.values())


def balanced(topics: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """As many topics of every kind as the smallest has."""
    least = min(map(len, topics.values()))
    return {kind: found[:least] for kind, found in topics.items()}


def _questions(
    work: Work,
    config: TopicsConfig,
    chat: bool,
    seeds: Sequence[Hint],
    hints: Sequence[Hint],
    number: int,
    dropped: Counter[str],
) -> dict[tuple[str, str], str]:
    """One round: {(kind, topic): question} of the hints whose line was as it had to be."""
    template, items, groups = work.templates["questions"], [], {}
    order = draws(work.config.seed, f"questions {number}").permutation(len(hints))
    for start in range(0, len(hints), HINTS):
        name = f"{number}-{start // HINTS}"
        group = groups[name] = [hints[i] for i in order[start : start + HINTS]]
        rng = draws(work.config.seed, f"examples {name}")
        shown = [seeds[i] for i in rng.choice(len(seeds), HINTS, replace=False)]
        values = {"seeds": [asdict(s) for s in shown], "hints": [asdict(h) for h in [*shown, *group]]}
        request = Request(
            prompt_of(template, chat, **values),
            temperature=work.config.temperature,
            top_p=config.top_p,
            max_tokens=config.question_tokens,
        )
        items.append(Ask(name, request, partial(parse_questions, hints=group, first=HINTS + 1)))
    found = work.ask(f"questions-{number}", items)
    asked = {}
    for name, lines in found.items():
        dropped["question off its topic"] += lines.count(None)
        pairs = zip(groups[name], lines, strict=True)
        asked |= {(hint.type, hint.topic): line for hint, line in pairs if line}
    return asked


def parse_questions(completions: Sequence[Completion], hints: Sequence[Hint], first: int) -> Parsed:
    """The question of each hint, None where no line begins with exactly its number, kind and topic."""
    lines = completions[0].text.splitlines()
    if completions[0].finish != "stop":
        lines = lines[:-1]
    found: list[str | None] = []
    for number, hint in enumerate(hints, start=first):
        prefix = f"{number}. type: {hint.type}, topic: {hint.topic}, instruction: "
        said = (
            line.strip().removeprefix(prefix).strip() for line in lines if line.strip().startswith(prefix)
        )
        found.append(next(said, "") or None)
    return (found, "") if any(found) else (None, "no line begins as it has to")


def _metrics(
    topics: Mapping[str, list[str]], hints: Sequence[Hint], questions: Sequence[Hint]
) -> dict[str, Any]:
    counts = Counter(question.type for question in questions)
    return {
        "types": len(topics),
        "topics_per_type": min(map(len, topics.values())),
        "questions": len(questions),
        "topics_with_a_question": len(questions) / len(hints) if hints else None,
        "questions_per_type": {kind: counts[kind] for kind in topics},
        "distinct_2": distinct_n([question.question for question in questions], 2),
    }
