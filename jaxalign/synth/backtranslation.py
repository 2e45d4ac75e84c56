"""Instruction backtranslation (Humpback, Li et al. 2023, arXiv:2308.06259): texts are taken for answers, a
backward model writes the instructions, and the model grades the pairs; the best are learned with the seed.

With `train` the models are trained on the way, each from the same base: the backward model on the seed pairs
turned round, M_0 on the seed, M_k on the seed and the pairs that M_(k-1) selected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from pydantic import Field

from jaxalign.data.readers import read_groups, read_records, unique_ids
from jaxalign.data.records import Message, Prompt, SFTRecord
from jaxalign.errors import UserError
from jaxalign.llm.base import LLM, Completion, Request
from jaxalign.stats import mean_interval
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.curation import (
    grade,
    histogram,
    near_duplicates,
    overlap,
    selection_quality,
    text_fault,
)
from jaxalign.synth.self_instruct import phrases
from jaxalign.synth.stage import Ask, Parsed
from jaxalign.synth.training import Rows, Trainer, train_sft, training_keys
from jaxalign.synth.turns import sft_row, spelled, turns_of


class BacktranslationConfig(BuildConfig):
    """Instruction backtranslation; -d are texts, such as sections of web pages."""

    seed_data: str
    """instructions with good answers: they stand in the result, and with `train` models begin with them"""
    train: bool = False
    """train the models that grade, and where `backward` names none the backward model, from `base`; false:
    the model of -m grades, once"""
    rounds: int = Field(2, ge=1)
    """with `train`: how often all pairs are graded, each time by a model that has learned from the last
    selection"""
    base: str | None = None
    """with `train`: what every training starts from; null: the model of -m, which must be on this machine"""
    training: dict[str, Any] = Field(default_factory=dict)
    """with `train`: keys of `train sft`; batch_size and max_steps are the paper's for so many rows"""
    backward: str | None = None
    """what writes instructions; null: the model of -m, or with `train` one that is trained"""
    prompted: bool = True
    """ask the backward model by a template; false: it was trained to give an instruction for a bare text"""
    pairs: bool = False
    """-d are pairs, such as candidates.jsonl of an earlier build: grade them, and ask no backward model"""
    min_chars: int = Field(600, ge=0)
    """shortest text"""
    max_chars: int = Field(3000, ge=1)
    """longest text"""
    near_duplicate: float = Field(0.7, gt=0, le=1)
    """a text is left out if the Jaccard index of its word 5-grams with those of an earlier one is higher"""
    temperature: float = Field(0.7, ge=0)
    """spread of the draws of instructions"""
    top_p: float = Field(0.9, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    max_tokens: int = Field(256, ge=1)
    """longest instruction, in tokens"""
    min_instruction: int = Field(10, ge=1)
    """shortest instruction, in characters"""
    max_instruction: int = Field(800, ge=1)
    """longest instruction, in characters"""
    grade_temperature: float = Field(0.0, ge=0)
    """spread of the draws of grades"""
    grade_tokens: int = Field(256, ge=1)
    """longest reason and grade together, in tokens"""
    threshold: float = Field(4.5, gt=1, le=5)
    """the grade, of 1 to 5, from which a pair is selected"""
    seed_tag: str = "Answer in the style of an AI Assistant."
    """system prompt of seed rows"""
    text_tag: str = "Answer with knowledge from web search."
    """system prompt of selected pairs; a tuned model is asked with both"""
    dev_data: str | None = None
    """answers with a label, true for good ones: the report has precision and recall of every round"""


@dataclass(frozen=True)
class Pair:
    """A text and the instruction that was made for it."""

    id: str
    instruction: str
    response: str


@dataclass
class _Round:
    """What one model made of the pairs."""

    judge: str
    grades: dict[str, int]
    selected: set[str]
    dev: dict[str, int] = field(default_factory=dict)


def run(work: Work, trainer: Trainer) -> Built:
    """Pairs, rounds of grading, and the seed with what the last round selected."""
    config = work.config
    seeds, labelled = _seeds(work), _labelled(work)
    school = _School(work, trainer, [_seed_row(config, s) for s in seeds])
    dropped: Counter[str] = Counter()
    pairs = _given(work) if config.pairs else _backtranslated(work, school, seeds, dropped)
    rounds: list[_Round] = []
    for number in range(1, (config.rounds if config.train else 1) + 1):
        chosen = rounds[-1].selected if rounds else set()
        lesson = [_pair_row(config, p) for p in pairs if p.id in chosen]
        # No name is kept of a judge: it is to be gone before the next one is trained.
        rounds.append(_graded(school.graduate(number - 1, lesson), pairs, labelled, number))
    last = rounds[-1]
    dropped["not graded"] += len(pairs) - len(last.grades)
    dropped["graded too low"] += len(last.grades) - len(last.selected)
    kept = [_pair_row(config, p, score=last.grades[p.id]) for p in pairs if p.id in last.selected]
    candidates = [_pair_row(config, p, scores=[r.grades.get(p.id) for r in rounds]) for p in pairs]
    labels = {name: label for name, (_, label) in labelled.items()}
    metrics = _metrics(config, seeds, pairs, rounds, labels)
    return Built([*school.seeds, *kept], metrics, +dropped, {"candidates.jsonl": candidates})


# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class _School:
    """Where models come from: those that are there, or trained ones."""

    work: Work
    trainer: Trainer
    seeds: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not self.work.config.train:
            return
        training_keys(1, self.work.config.training)  # a mistake is to be found before any work
        if self.base.startswith(("http://", "https://")):
            raise UserError(
                "an endpoint cannot be trained",
                place=f"-m {self.base}",
                remedy="name a model on this machine (base=...), or leave train out",
            )

    @property
    def base(self) -> str:
        """Where every training starts."""
        return self.work.config.base or self.work.llms["model"].name

    def graduate(self, number: int, pairs: Rows) -> Work:
        """The work with M_number as its model, which has learned the seed and `pairs`."""
        model = self._trained(f"m{number}", [*self.seeds, *pairs], self.work.llms["model"])
        return replace(self.work, llms={**self.work.llms, "model": model})

    def backward(self, seeds: Sequence[SFTRecord]) -> tuple[LLM, bool]:
        """(what writes instructions, whether it is asked by the template)."""
        config, given = self.work.config, self.work.llms["backward"]
        if given is not self.work.llms["model"] or not config.train:
            return given, config.prompted
        rows = [_reversed(seed) for seed in seeds if len(_talk(seed)) == 2]
        if not rows:
            raise UserError(
                "no row has one question and one answer, from which the backward model could learn",
                place=f"seed_data: {config.seed_data}",
                remedy="give such rows, or name a backward model",
            )
        return self._trained("backward", rows, given), False

    def _trained(self, name: str, rows: Rows, given: LLM) -> LLM:
        config = self.work.config
        if not config.train:
            return given
        self.work.say(f"training {name} from {self.base} on {len(rows)} rows")
        return self.trainer(self.base, rows, self.work.folder / name, config.training, config.llm)


# ------------------------------------------------------------------------------------------------ pairs


def _seeds(work: Work) -> list[SFTRecord]:
    records, report = read_records(work.config.seed_data, max_bad_rows=work.config.max_bad_rows)
    for line in report.lines():
        work.say(f"seed: {line}")
    found = unique_ids([record for record in records if record.messages])
    if not found:
        raise UserError(
            "no row has messages",
            place=f"seed_data: {work.config.seed_data}",
            remedy="give instructions with answers",
        )
    return found


def _given(work: Work) -> list[Pair]:
    records, _ = read_records(work.data, max_bad_rows=work.config.max_bad_rows)
    chosen = [r for r in unique_ids(records) if len(_talk(r)) == 2][: work.config.limit or None]
    work.read(len(chosen))
    return [Pair(r.id, *(m.content for m in _talk(r))) for r in chosen]


def _backtranslated(
    work: Work, school: _School, seeds: Sequence[SFTRecord], dropped: Counter[str]
) -> list[Pair]:
    """An instruction for every text that does."""
    config, texts = work.config, _texts(work, dropped)
    writer, prompted = school.backward(seeds)
    template, items = work.templates["backward"], []
    for name, text in texts.items():
        prompt = template.messages(text=text) if prompted else (Message("user", text),)
        request = Request(
            prompt, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens
        )
        items.append(Ask(name, request, instruction))
    found = replace(work, llms={**work.llms, "backward": writer}).ask("backward", items, "backward")
    pairs = []
    for name, said in found.items():
        if not config.min_instruction <= len(said) <= config.max_instruction:
            dropped["instruction too short or too long"] += 1
        else:
            pairs.append(Pair(name, said, texts[name]))
    return pairs


def _texts(work: Work, dropped: Counter[str]) -> dict[str, str]:
    """{id: text} of those that do as answers."""
    config, navigation = work.config, phrases(work.templates["navigation"].text())
    fit = {}
    for prompt in work.prompts():
        text = turns_of(prompt)[-1].content.strip()
        reason = text_fault(text, _header(prompt), config.min_chars, config.max_chars, navigation)
        if reason:
            dropped[reason] += 1
        else:
            fit[prompt.id] = text
    names = list(fit)
    twice = {names[i] for i in near_duplicates(list(fit.values()), config.near_duplicate)}
    dropped["near duplicate"] += len(twice)
    return {name: text for name, text in fit.items() if name not in twice}


def _header(prompt: Prompt) -> str:
    """The heading under which a text stood, where its row tells."""
    meta = prompt.row.get("meta")
    for place in (prompt.row, meta if isinstance(meta, dict) else {}):
        found = place.get("header") or place.get("title")
        if isinstance(found, str):
            return found
    return ""


def instruction(completions: Sequence[Completion]) -> Parsed:
    """What the backward model asks for."""
    if completions[0].finish != "stop":
        return None, "the instruction does not end"
    text = completions[0].text.strip().removeprefix("Request:").strip()
    return (text, "") if text else (None, "no instruction")


# ------------------------------------------------------------------------------------------------ grades


def _labelled(work: Work) -> dict[str, tuple[Pair, bool]]:
    """{id: (pair, whether it is good)} of the dev set."""
    if not work.config.dev_data:
        return {}
    records, _ = read_groups(work.config.dev_data, "binary", max_bad_rows=work.config.max_bad_rows)
    return {r.id: (Pair(r.id, _text(r.prompt), _text(r.completion)), r.label) for r in records}  # type: ignore[union-attr]


def _text(turns: Any) -> str:
    return turns if isinstance(turns, str) else turns[-1].content


def _graded(
    work: Work, pairs: Sequence[Pair], labelled: Mapping[str, tuple[Pair, bool]], number: int
) -> _Round:
    """All pairs, and those of the dev set, as the model sees them."""
    items = [_asked(work, pair) for pair in pairs]
    grades = work.ask(f"grade-{number}", items)
    selected = {name for name, found in grades.items() if found >= work.config.threshold}
    dev = work.ask(f"dev-{number}", [_asked(work, pair) for pair, _ in labelled.values()]) if labelled else {}
    return _Round(work.llms["model"].identity, grades, selected, dev)


def _asked(work: Work, pair: Pair) -> Ask:
    config = work.config
    tags = f"{config.seed_tag} {config.text_tag}".strip() if config.train else ""
    prompt = work.templates["grade"].messages(
        system=tags, instruction=pair.instruction, response=pair.response
    )
    request = Request(prompt, temperature=config.grade_temperature, max_tokens=config.grade_tokens)
    return Ask(pair.id, request, grade)


# ------------------------------------------------------------------------------------------------ rows


def _talk(record: SFTRecord) -> list[Message]:
    return [m for m in record.messages or () if m.role != "system"]


def _seed_row(config: Any, seed: SFTRecord) -> dict[str, Any]:
    """The seed's turns after the tag; a system turn of its own follows the tag."""
    own = [m.content.strip() for m in seed.messages or () if m.role == "system"]
    turns = [Message("system", "\n\n".join([config.seed_tag, *own])), *_talk(seed)]
    meta = {"source": "seed", "method": "backtranslation"}
    return {"id": f"seed-{seed.id}", "messages": spelled(turns), "meta": meta}


def _pair_row(config: Any, pair: Pair, **meta: Any) -> dict[str, Any]:
    turns = [Message("system", config.text_tag), Message("user", pair.instruction)]
    return sft_row(pair.id, turns, pair.response, source="text", method="backtranslation", **meta)


def _reversed(seed: SFTRecord) -> dict[str, Any]:
    """What the backward model learns: the answer, then what it answers."""
    question, answer = _talk(seed)
    return sft_row(seed.id, [Message("user", answer.content)], question.content, source="seed")


def _metrics(
    config: Any,
    seeds: Sequence[SFTRecord],
    pairs: Sequence[Pair],
    rounds: Sequence[_Round],
    labels: Mapping[str, bool],
) -> dict[str, Any]:
    chosen = [pair for pair in pairs if pair.id in rounds[-1].selected]
    about = []
    for found in rounds:
        row = {
            "judge": found.judge,
            "graded": len(found.grades),
            "not_graded": len(pairs) - len(found.grades),
            "grades": histogram(found.grades),
            "selected": len(found.selected),
        }
        about.append(row | (selection_quality(found.dev, labels, config.threshold) if labels else {}))
    before = [r.selected for r in rounds]
    return {
        "seed_rows": len(seeds),
        "pairs": len(pairs),
        "rounds": about,
        "overlaps": [overlap(a, b) for a, b in pairwise(before)],
        "words": {
            "seed_instructions": _words([_talk(s)[0].content for s in seeds]),
            "seed_answers": _words([_talk(s)[-1].content for s in seeds]),
            "selected_instructions": _words([p.instruction for p in chosen]),
            "selected_answers": _words([p.response for p in chosen]),
        },
    }


def _words(texts: Sequence[str]) -> dict[str, Any]:
    return mean_interval([len(text.split()) for text in texts]).to_json()


BUILDER = Builder(BacktranslationConfig, partial(run, trainer=train_sft), roles=("backward",))
