"""The kinds of rewards: rules that can be verified, a lexicon, a model, and any Python function."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from jaxalign.data.preferences import ScoredRecord, scored_record
from jaxalign.data.records import Message
from jaxalign.data.tokenize import Truncation, tokenize_groups
from jaxalign.errors import UserError
from jaxalign.extras import optional
from jaxalign.rl.rewards import FUNCTIONS, Answer, RewardConfig
from jaxalign.train.reward_model import RewardModel, load_reward_model

Values = Sequence[float | None]


class Length(RewardConfig):
    """1 for an answer of `least` to `most` words; outside it falls to 0 at none and at twice `most`."""

    least: int = Field(0, ge=0)
    """words from which an answer is long enough"""
    most: int | None = Field(None, ge=1)
    """words up to which it is short enough; null is any number"""

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """The share of `least` that is there, or what is left of `most` once it is passed."""
        return [self._value(len(answer.text.split())) for answer in answers]

    def _value(self, words: int) -> float:
        if words < self.least:
            return words / self.least
        if self.most is None or words <= self.most:
            return 1.0
        return max(0.0, 2.0 - words / self.most)


class Pattern(RewardConfig):
    """1 where the regular expression is found in the answer, else 0."""

    pattern: re.Pattern[str]
    """a regular expression in Python's form; (?i) at its start ignores case"""
    whole: bool = False
    """the answer as a whole must match, white space around it aside"""

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """1 or 0."""
        look = self.pattern.fullmatch if self.whole else self.pattern.search
        return [float(look(answer.text.strip()) is not None) for answer in answers]


class Exact(RewardConfig):
    """1 where the answer is the one that its row names, else 0; none where the row names none."""

    key: str = "answer"
    """key of the row that holds the right answer"""
    extract: re.Pattern[str] | None = None
    """what to compare of the sampled answer: the first group of the last place where this is found"""

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """1, 0 or None. Case, white space and a full stop at the end do not count."""
        return [self._value(answer) for answer in answers]

    def _value(self, answer: Answer) -> float | None:
        wanted, text = answer.prompt.row.get(self.key), answer.text
        if wanted is None:
            return None
        if self.extract is not None:
            found = list(self.extract.finditer(text))
            if not found:
                return 0.0
            text = found[-1].group(1) if self.extract.groups else found[-1].group()
        return float(_plain(text) == _plain(str(wanted)))


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


class JsonSchema(RewardConfig):
    """1 for an answer that is JSON of the schema, else 0. Needs the extra `rewards`."""

    schema_file: Path | None = None
    """a JSON Schema; null takes any JSON object"""

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """1 or 0; a fence of three backticks around the JSON does not count."""
        return [float(self._valid(answer.text)) for answer in answers]

    @cached_property
    def _validator(self) -> Any:
        validators = optional("jsonschema.validators", "jsonschema", extra="rewards", place="rewards")
        schema = {"type": "object"}
        if self.schema_file is not None:
            try:
                schema = json.loads(self.schema_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(str(error), place=str(self.schema_file), remedy="name a JSON file") from error
        return validators.validator_for(schema)(schema)

    def _valid(self, text: str) -> bool:
        fenced = re.fullmatch(r"\s*```(?:json)?\n(.*?)```\s*", text, re.DOTALL)
        try:
            value = json.loads(fenced.group(1) if fenced else text)
        except ValueError:
            return False
        return self._validator.is_valid(value)


class Sentiment(RewardConfig):
    """Polarity of the words of an answer by TextBlob's lexicon, -1 to 1. Needs the extra `rewards`."""

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """0 where no word has a polarity."""
        blob = optional("textblob", "textblob", extra="rewards", place="rewards").TextBlob
        return [float(blob(answer.text).sentiment.polarity) for answer in answers]


class Python(RewardConfig):
    """A function of yours: `function(completions, prompts=..., **columns)` returns a number for each.

    `completions` and `prompts` are lists of text (of a chat its last user turn), `columns` the other keys of
    the rows, a list each: what TRL gives to a reward function.
    """

    function: str
    """`module:name`, the module found from the working directory too"""

    @field_validator("function")
    @classmethod
    def _there(cls, value: str) -> str:
        _load(value)
        return value

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """What the function returns."""
        rows = [answer.prompt.row for answer in answers]
        names = {name for row in rows for name in row} - {"completions", "prompts"}
        columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
        prompts = [_asked(answer) for answer in answers]
        return _load(self.function)([answer.text for answer in answers], prompts=prompts, **columns)


def _asked(answer: Answer) -> str:
    messages = answer.prompt.messages
    return answer.prompt.text or "" if messages is None else messages[-1].content


def _load(name: str) -> Callable[..., Any]:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{name!r} is not module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} is not a function")
    return found


class RewardModelReward(RewardConfig):
    """The score of a reward model that `jaxalign train reward` made; of a cost model with weight < 0."""

    model: str
    """what `-m` takes: the folder of such a run"""
    max_length: int = Field(1024, ge=2)
    """longest prompt and answer in its tokens"""
    truncation: Truncation = "keep_start"
    """what happens to an answer over max_length"""
    batch_size: int = Field(16, ge=1)
    """answers of one pass"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of matrix products"""

    @cached_property
    def _scorer(self) -> RewardModel:
        return load_reward_model(self.model, self.dtype)

    def __call__(self, answers: Sequence[Answer]) -> Values:
        """None for an empty answer, and for one whose prompt leaves it no room."""
        records = [_record(i, answer) for i, answer in enumerate(answers) if answer.text.strip()]
        scorer = self._scorer
        groups, _ = tokenize_groups(records, scorer.tokenizer, self.max_length, self.truncation)
        found = scorer.scores(groups, rows=self.batch_size, max_length=self.max_length)
        values: list[float | None] = [None] * len(answers)
        for group, scores in zip(groups, found, strict=True):
            values[int(group.id)] = float(scores[0])
        return values


def _record(index: int, answer: Answer) -> ScoredRecord:
    """The answer with its prompt as a row; its id is its place."""
    prompt = answer.prompt
    if prompt.messages is None:
        return scored_record(prompt.text or "", [answer.text], [0.0], meta={"id": str(index)})
    turns = (Message("assistant", answer.text),)
    return scored_record(prompt.messages, [turns], [0.0], meta={"id": str(index)})
