"""Prompts grown from a few seeds: Self-Instruct (Wang et al. 2022, arXiv:2212.10560) and the topic-guided
questions of SELF-ALIGN (Sun et al. 2023, arXiv:2305.03047), which are in `topics`.

A round asks for many lists of tasks at once, each continued from its own draw of examples. A task that is too
like a seed or an earlier task is left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Request
from jaxalign.stats import mean_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.stage import Ask, Parsed
from jaxalign.synth.topics import TopicsConfig, grow_topics, led, prompt_of
from jaxalign.synth.turns import draws, turns_of
from jaxalign.text_stats import RougePool, distinct_n

SEEDS = Path(__file__).parent / "seeds" / "self_instruct.jsonl"
MIN_WORDS, MAX_WORDS = 4, 150
_TASK = re.compile(r"(\d+)\.\s*Instruction:\s*(.+?)\s*\n\s*\1\.\s*Input:\s*(.*)", re.DOTALL)
_NO_INPUT = re.compile(r"[<({\[]?no ?input[>)}\]]?\.?", re.IGNORECASE)  # small models copy it loosely


class SelfInstructConfig(BuildConfig):
    """Self-Instruct and topic-guided questions. Without -d it starts from seeds of its own."""

    count: int = Field(100, ge=0)
    """so many tasks are wanted, the seeds not counted; 0 leaves only topic-guided questions"""
    rounds: int = Field(20, ge=1)
    """rounds at most; they end sooner with enough tasks, or after a round that brought none"""
    requests: int = Field(16, ge=1)
    """lists of tasks that a round asks for"""
    exemplars: int = Field(5, ge=1)
    """tasks that a list begins with"""
    grown: int = Field(0, ge=0)
    """how many of these come from earlier rounds, once there are so many; the others are seeds"""
    tasks_per_list: int = Field(20, ge=2)
    """length of a list that is asked for, its examples included"""
    rouge: float = Field(0.7, ge=0, le=1)
    """a task is left out if its ROUGE-L with a seed or an earlier task is higher"""
    chat: bool = False
    """ask through the chat template; false: the list is continued as plain text, as base models do"""
    temperature: float = Field(1.0, ge=0)
    """spread of the draws"""
    top_p: float = Field(0.98, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    max_tokens: int = Field(1024, ge=1)
    """longest list of tasks, in tokens"""
    topics: TopicsConfig | None = TopicsConfig()
    """topic-guided questions that test where knowledge ends; null: none"""


@dataclass(frozen=True)
class Task:
    """What is asked, and what it is asked of, which may be empty."""

    instruction: str
    input: str = ""

    @property
    def prompt(self) -> str:
        """As a user would write it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass
class _Pool:
    """Seeds and what grew of them. `likeness`: of each task that was kept, ROUGE-L with the most like one."""

    seeds: list[Task]
    media: re.Pattern[str]
    limit: float
    kept: dict[str, Task] = field(default_factory=dict)
    likeness: list[float] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rouge: RougePool = field(default_factory=RougePool)

    def offer(self, name: str, task: Task) -> None:
        """Takes a task that passes every filter."""
        reason = fault(task.instruction, self.media)
        likeness = 0.0 if reason else self.rouge.nearest(task.instruction)
        if likeness > self.limit:
            reason = "like another task"
        if reason:
            self.dropped[reason] += 1
            return
        self.rouge.add(task.instruction)
        self.kept[name] = task
        self.likeness.append(likeness)


def run(work: Work) -> Built:
    """Tasks, then topic-guided questions."""
    config = work.config
    pool = _seeded(work)
    for number in range(1, config.rounds + 1):
        before = len(pool.kept)
        if before >= config.count:
            break
        _round(work, pool, number)
        if len(pool.kept) == before:
            work.say(f"round {number} brought no new task")
            break
    if len(pool.kept) < config.count:
        work.say(f"{len(pool.kept)} of {config.count} tasks: raise rounds or requests for more")
    names = list(pool.kept)[: config.count]
    rows = [row(name, pool.kept[name].prompt, "self_instruct") for name in names]
    if config.topics is None:
        return Built(rows, _metrics(pool, names), +pool.dropped)
    found = grow_topics(work, config.topics, config.chat)
    asked = [row(q.id, q.question, "tgrt", type=q.type, topic=q.topic) for q in found.questions]
    return Built(
        [*rows, *asked], _metrics(pool, names) | {"topics": found.metrics}, pool.dropped + found.dropped
    )


def _seeded(work: Work) -> _Pool:
    found = (work if work.data else replace(work, data=SEEDS)).prompts()
    seeds = [task_of(prompt) for prompt in found]
    if len(seeds) < work.config.exemplars:
        raise UserError(
            f"{len(seeds)} seeds, and every list begins with {work.config.exemplars}",
            place="exemplars",
            remedy="give more seeds (-d), or begin with fewer",
        )
    pool = _Pool(seeds, phrases(work.templates["media_words"].text()), work.config.rouge)
    for seed in seeds:
        pool.rouge.add(seed.instruction)
    return pool


def task_of(prompt: Prompt) -> Task:
    """A seed: `instruction` with `input` or the first of `instances`, else what the user says last."""
    given = prompt.row
    if isinstance(given.get("instruction"), str):
        first = next(iter(given.get("instances") or []), {})
        return Task(given["instruction"].strip(), str(given.get("input") or first.get("input") or "").strip())
    return Task(turns_of(prompt)[-1].content.strip())


def _round(work: Work, pool: _Pool, number: int) -> None:
    """Asks for all lists of a round at once, and offers what they hold to the pool in their order."""
    config, template = work.config, work.templates["tasks"]
    items = []
    for k in range(config.requests):
        shown = _exemplars(config, pool, f"{number} {k}")
        prompt = prompt_of(
            template, config.chat, tasks=shown, total=max(config.tasks_per_list, len(shown) + 1)
        )
        request = Request(
            prompt, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens
        )
        items.append(Ask(f"{number}-{k}", request, partial(parse_tasks, first=len(shown) + 1)))
    found = work.ask(f"tasks-{number}", items)
    for name, value in found.items():
        pool.dropped["malformed task"] += value["malformed"]
        for j, task in enumerate(value["tasks"]):
            pool.offer(f"self_instruct-{name}-{j}", Task(**task))


def _exemplars(config: Any, pool: _Pool, name: str) -> list[Task]:
    """The tasks that a list begins with, in random order."""
    rng, kept = draws(config.seed, name), list(pool.kept.values())
    grown = min(config.grown, config.exemplars) if len(kept) >= config.grown else 0
    shown = [pool.seeds[i] for i in rng.choice(len(pool.seeds), config.exemplars - grown, replace=False)]
    if grown:
        shown += [kept[i] for i in rng.choice(len(kept), grown, replace=False)]
    return [shown[i] for i in rng.permutation(len(shown))]


def parse_tasks(completions: Sequence[Completion], first: int) -> Parsed:
    """{tasks, malformed} of a list that goes on at number `first`. What a full reply cut off is left out."""
    text = led(completions[0].text, f"{first}. Instruction:")
    parts = text.split("###")
    if completions[0].finish != "stop":
        parts = parts[:-1]
    parts = [part.strip() for part in parts if part.strip()]
    found = [match for part in parts if (match := _TASK.fullmatch(part))]
    if not found:
        return None, "no task"
    tasks = [
        {"instruction": m[2], "input": "" if _NO_INPUT.fullmatch(m[3].strip()) else m[3].strip()}
        for m in found
    ]
    return {"tasks": tasks, "malformed": len(parts) - len(found)}, ""


def phrases(text: str) -> re.Pattern[str]:
    """What finds any of the words and phrases of a template, one a line."""
    listed = sorted((re.escape(line.strip()) for line in text.splitlines() if line.strip()), key=len)
    return re.compile(rf"(?<!\w)(?:{'|'.join(reversed(listed))})(?!\w)" if listed else r"(?!)", re.IGNORECASE)


def fault(instruction: str, media: re.Pattern[str]) -> str:
    """Why an instruction is left out, or nothing (arXiv:2212.10560 section 2.2 and its code)."""
    return next((reason for reason, holds in _FAULTS if holds(instruction, media)), "")


_FAULTS: tuple[tuple[str, Callable[[str, re.Pattern[str]], Any]], ...] = (
    ("too short", lambda text, _: len(text.split()) < MIN_WORDS),
    ("too long", lambda text, _: len(text.split()) > MAX_WORDS),
    ("needs more than text", lambda text, media: media.search(text)),
    ("begins with punctuation", lambda text, _: text[0] in string.punctuation),
    ("begins with no ASCII letter", lambda text, _: not text[0].isascii()),
)


def row(name: str, text: str, method: str, **meta: Any) -> dict[str, Any]:
    """A prompt as it stands in the file."""
    about = {"source": "self_instruct", "method": method, **meta}
    return {"id": name, "messages": [{"role": "user", "content": text}], "meta": about}


def _metrics(pool: _Pool, names: Sequence[str]) -> dict[str, Any]:
    tasks = [pool.kept[name] for name in names]
    instructions = [task.instruction for task in tasks]
    return {
        "tasks": len(tasks),
        "with_input": sum(1 for task in tasks if task.input),
        "words": mean_interval([len(text.split()) for text in instructions]).to_json(),
        "distinct_2": distinct_n(instructions, 2),
        "nearest_rouge_l": mean_interval(pool.likeness[: len(tasks)]).to_json(),
    }


BUILDER = Builder(SelfInstructConfig, run, data=False, prompts=True)
