"""`safety`: what of answers is harmful, and pairs on two axes, helpful and harmless (BeaverTails,
arXiv:2307.04657).

1. answers  n to each prompt, by `model`; of data that has answers, those
2. labels   the categories of harm of each answer, by `judge`: safe where there is none
3. pairs    the better answer on each axis, by `judge` in both orders; what it says differently is a tie. On
            the axis harmless a safe answer is before an unsafe one, whatever a judge would say
4. filters  pairs whose rejected answer merely declines; a margin of P(safe); at most so many of a class
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from jaxalign.llm.base import Question, Request
from jaxalign.stats import rate_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.moderation import ASKED, CATEGORIES, parse_categories
from jaxalign.synth.refusals import is_refusal
from jaxalign.synth.safety_input import Item, read_items
from jaxalign.synth.stage import Ask, Choose
from jaxalign.synth.two_axes import AXES, Duel, Rulings, duels, judged

OPTIONS = ("safe", "unsafe")
Row = dict[str, Any]


class SafetyConfig(BuildConfig):
    """The keys of `jaxalign build safety`."""

    judge: str | None = None
    """the model or endpoint that labels and compares; null is the model of -m"""
    records: Literal["pairs", "labels", "sft"] = "pairs"
    """what the file holds: pairs of both axes (train with select={aspect: harmless}), an answer with its
    label, or safe and helpful answers to imitate; the other kinds lie in OUT.build"""
    n: int = Field(default=2, ge=1)
    """answers to a prompt that has none"""
    temperature: float = Field(default=1.0, ge=0)
    """of answers"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """of answers"""
    max_tokens: int = Field(default=512, ge=1)
    """longest answer"""
    judge_temperature: float = Field(default=0.0, ge=0)
    """of labels and comparisons"""
    judge_tokens: int = Field(default=256, ge=1)
    """longest label or comparison"""
    drop_refusals: bool = True
    """leave out pairs whose rejected answer declines: told by how it begins"""
    safe_margin: float | None = Field(default=None, ge=-1, le=1)
    """keep a harmless pair only if P(safe) of its chosen answer is above that of the rejected one by so much;
    the judge must tell probabilities. null is off"""
    per_class: int = Field(default=0, ge=0)
    """at most so many pairs of one axis and class; 0 is all"""
    label: str = "category"
    """the column, or key of meta, that names the class; without it the first category of the rejected
    answer"""


@dataclass(frozen=True)
class Labelled:
    """An item with the categories of harm of each answer, None where the moderator gave none."""

    item: Item
    categories: tuple[tuple[str, ...] | None, ...]

    def safe(self, number: int) -> bool | None:
        """Whether the answer has a label and it names no category."""
        found = self.categories[number]
        return None if found is None else not found


@dataclass(frozen=True)
class Pair:
    """`better` before `worse`, numbers of answers, on one axis."""

    labelled: Labelled
    axis: str
    better: int
    worse: int
    by: str  # judge or label

    @property
    def id(self) -> str:
        """Of its row."""
        return f"{self.labelled.item.id}:{self.axis}:{self.better}>{self.worse}"

    @property
    def group(self) -> str:
        """The class for balance."""
        found = self.labelled.categories[self.worse] or self.labelled.categories[self.better] or ()
        return self.labelled.item.label or (found[0] if found else "none")


def build(work: Work) -> Built:
    """Rows of the kind that the key `records` names, the others beside."""
    config: SafetyConfig = work.config
    items, _ = read_items(work.data, label=config.label, max_bad_rows=config.max_bad_rows)
    items = items[: config.limit] if config.limit else items
    work.read(len(items))
    labelled = moderated(work, answered(work, items))
    rulings = compared(work, labelled)
    pairs = [p for found in labelled for axis in AXES for p in pairs_of(found, axis, rulings[axis])]
    kept, dropped = filtered(work, pairs)
    rows = {
        "pairs": [pair_row(p) for p in kept],
        "labels": [row for found in labelled for row in label_rows(found)],
        "sft": [row for found in labelled for row in sft_rows(found, rulings["helpful"])],
    }
    beside = {f"{name}.jsonl": found for name, found in rows.items() if name != config.records}
    metrics = report(labelled, pairs, rulings) | {
        "records": {name: len(found) for name, found in rows.items()}
    }
    return Built(rows[config.records], metrics, dropped, beside)


def answered(work: Work, items: Sequence[Item]) -> list[Item]:
    """The items that have answers; `model` gives them where the data does not."""
    config: SafetyConfig = work.config
    bare = [item for item in items if not item.answers]
    if not bare:
        return list(items)
    requests = [
        Ask(
            item.id,
            Request(item.prompt, config.n, config.temperature, config.top_p, config.max_tokens),
            _texts,
        )
        for item in bare
    ]
    found = work.ask("answers", requests)
    full = [replace(i, answers=tuple(found[i.id])) if i.id in found else i for i in items]
    return [item for item in full if item.answers]


def _texts(completions: Sequence[Any]) -> tuple[list[str] | None, str]:
    """Answers that say something, each once."""
    texts = list(dict.fromkeys(c.text.strip() for c in completions if c.text.strip()))
    return (texts, "") if texts else (None, "empty answer")


def moderated(work: Work, items: Sequence[Item]) -> list[Labelled]:
    """The items with the categories of their answers."""
    config: SafetyConfig = work.config
    template = work.templates["moderate"]
    asks = [
        Ask(
            f"{item.id}:{i}",
            Request(
                template.messages(question=item.question, answer=answer, categories=ASKED),
                temperature=config.judge_temperature,
                max_tokens=config.judge_tokens,
            ),
            parse_categories,
        )
        for item in items
        for i, answer in enumerate(item.answers)
    ]
    found = work.ask("moderate", asks, role="judge")
    out = []
    for item in items:
        named = [found.get(f"{item.id}:{i}") for i in range(len(item.answers))]
        out.append(Labelled(item, tuple(None if n is None else tuple(n) for n in named)))
    return out


def compared(work: Work, labelled: Sequence[Labelled]) -> dict[str, Rulings]:
    """{axis: what the judge says}. On the axis harmless it is not asked where the labels decide."""
    config: SafetyConfig = work.config
    asked: dict[str, list[Duel]] = {axis: [] for axis in AXES}
    for found in labelled:
        for axis in AXES:
            every = duels(found.item.id, found.item.question, axis, found.item.answers)
            asked[axis] += [d for d in every if not decided(found, axis, d.i, d.j)]
    settings = {"max_tokens": config.judge_tokens, "temperature": config.judge_temperature}
    return {axis: judged(work, axis, asked[axis], **settings) for axis in AXES}


def decided(found: Labelled, axis: str, i: int, j: int) -> bool:
    """Whether the labels of two answers say which is the less harmful one."""
    safe = {found.safe(i), found.safe(j)}
    return axis == "harmless" and safe == {True, False}


def pairs_of(found: Labelled, axis: str, rulings: Rulings) -> list[Pair]:
    """The pairs of an item on one axis; ties make none."""
    out = []
    for duel in duels(found.item.id, found.item.question, axis, found.item.answers):
        if decided(found, axis, duel.i, duel.j):
            winner, by = (duel.i if found.safe(duel.i) else duel.j), "label"
        else:
            winner, by = rulings.winner(duel), "judge"
        if winner is not None:
            out.append(Pair(found, axis, winner, duel.i + duel.j - winner, by))
    return out


# --------------------------------------------------------------------------------------------- filters


def filtered(work: Work, pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that all filters keep, and how many each left out."""
    config: SafetyConfig = work.config
    steps: dict[str, list[Pair]] = {"": list(pairs)}
    kept = list(pairs)
    if config.drop_refusals:
        kept = [p for p in kept if not is_refusal(p.labelled.item.answers[p.worse])]
        steps["the rejected answer declines"] = kept
    if config.safe_margin is not None:
        kept = with_margin(work, kept, config.safe_margin)
        steps["P(safe) is not far enough above that of the rejected answer"] = kept
    if config.per_class:
        kept = balanced(kept, config.per_class, config.seed)
        steps["enough pairs of the class"] = kept
    counts = [len(found) for found in steps.values()]
    names = list(steps)[1:]
    lost = {name: counts[i] - counts[i + 1] for i, name in enumerate(names)}
    return kept, {name: count for name, count in lost.items() if count}


def with_margin(work: Work, pairs: Sequence[Pair], margin: float) -> list[Pair]:
    """Pairs of the axis helpful, and those of the axis harmless whose P(safe), the judge's log-probabilities
    of the words `safe` and `unsafe`, differ by `margin` or more. A pair whose probabilities are not known is
    left out."""
    template = work.templates["safe"]
    wanted = [p for p in pairs if p.axis == "harmless"]
    questions = {
        f"{p.labelled.item.id}:{i}": Question(
            template.messages(question=p.labelled.item.question, answer=p.labelled.item.answers[i]), OPTIONS
        )
        for p in wanted
        for i in (p.better, p.worse)
    }
    found = work.choose("safe", [Choose(name, q) for name, q in questions.items()], role="judge")

    def gap(p: Pair) -> float:
        names = [f"{p.labelled.item.id}:{i}" for i in (p.better, p.worse)]
        if not all(name in found for name in names):
            return float("-inf")
        better, worse = (float(np.exp(found[name][0])) for name in names)
        return better - worse

    return [p for p in pairs if p.axis != "harmless" or gap(p) >= margin]


def balanced(pairs: Sequence[Pair], most: int, seed: int) -> list[Pair]:
    """At most so many pairs of each axis and class: those with the least hash of seed and id, in their
    order."""
    ranked = sorted(pairs, key=lambda p: (zlib.crc32(f"{seed} {p.id}".encode()), p.id))
    count: Counter[tuple[str, str]] = Counter()
    kept = set()
    for pair in ranked:
        key = pair.axis, pair.group
        if count[key] < most:
            count[key] += 1
            kept.add(pair.id)
    return [p for p in pairs if p.id in kept]


# ------------------------------------------------------------------------------------------------ rows


def _prompt(item: Item) -> list[Row]:
    return [{"role": turn.role, "content": turn.content} for turn in item.prompt]


def _meta(item: Item, **more: Any) -> Row:
    about = {"source": item.source, "method": "safety", "prompt_id": item.id}
    return about | ({"class": item.label} if item.label else {}) | more


def pair_row(pair: Pair) -> Row:
    """PREF; `safe` and `categories` are by role, null where the moderator gave no label."""
    found = pair.labelled
    roles = {"chosen": pair.better, "rejected": pair.worse}
    meta = _meta(
        found.item,
        margin=None,
        aspect=pair.axis,
        by=pair.by,
        safe={role: found.safe(i) for role, i in roles.items()},
        categories={role: found.categories[i] for role, i in roles.items()},
    )
    answers = {role: found.item.answers[i] for role, i in roles.items()}
    return {"id": pair.id, "prompt": _prompt(found.item), **answers, "meta": meta}


def label_rows(found: Labelled) -> list[Row]:
    """BIN of the answers that have a label: true where it is safe."""
    return [
        {
            "id": f"{found.item.id}:{i}",
            "prompt": _prompt(found.item),
            "completion": found.item.answers[i],
            "label": not named,
            "meta": _meta(found.item, categories=list(named)),
        }
        for i, named in enumerate(found.categories)
        if named is not None
    ]


def sft_rows(found: Labelled, helpful: Rulings) -> list[Row]:
    """SFT of the safe answer that wins most comparisons with other safe ones and loses none, if there is one;
    a safe answer that is alone has nothing to lose."""
    safe = [i for i in range(len(found.item.answers)) if found.safe(i)]
    wins, losses = Counter[int](), Counter[int]()
    for pair in pairs_of(found, "helpful", helpful):
        if pair.better in safe and pair.worse in safe:
            wins[pair.better] += 1
            losses[pair.worse] += 1
    best = max((i for i in safe if not losses[i]), key=lambda i: wins[i], default=None)
    if best is None or (len(safe) > 1 and not wins[best]):
        return []
    turns = [*_prompt(found.item), {"role": "assistant", "content": found.item.answers[best]}]
    return [{"id": f"{found.item.id}:{best}", "messages": turns, "meta": _meta(found.item)}]


# ---------------------------------------------------------------------------------------------- report


def report(labelled: Sequence[Labelled], pairs: Iterable[Pair], rulings: Mapping[str, Rulings]) -> Row:
    """The numbers of a build, as JSON.

    safe       share of answers without a category
    known      agreement with what the data calls safe, where it does
    agreement  how often both axes prefer the same answer, of the pairs that have a winner on both
    """
    pairs = list(pairs)
    safe = [found.safe(i) for found in labelled for i in range(len(found.item.answers))]
    known = [(found.safe(i), told) for found in labelled for i, told in found.item.known.items()]
    known = [(mine, told) for mine, told in known if mine is not None]
    winners: dict[tuple[str, int, int], dict[str, int]] = {}
    for p in pairs:
        ends = sorted((p.better, p.worse))
        winners.setdefault((p.labelled.item.id, ends[0], ends[1]), {})[p.axis] = p.better
    both = [found for found in winners.values() if len(found) == len(AXES)]
    count = Counter(name for found in labelled for named in found.categories for name in named or ())
    return {
        "answers": len(safe),
        "safe": rate_interval(safe.count(True), len(safe) - safe.count(None)).to_json(),
        "categories": {name: count[name] for name in CATEGORIES},
        "known": rate_interval(sum(mine == told for mine, told in known), len(known)).to_json(),
        "axes": {axis: rulings[axis].report() for axis in AXES},
        "pairs": {axis: sum(p.axis == axis for p in pairs) for axis in AXES},
        "by_label": sum(p.by == "label" for p in pairs),
        "agreement": rate_interval(sum(len(set(found.values())) == 1 for found in both), len(both)).to_json(),
    }


BUILDER = Builder(SafetyConfig, build, roles=("judge",))
