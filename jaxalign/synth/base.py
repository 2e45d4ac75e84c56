"""What a builder is: its keys, its work over LLMs, and what it hands back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.readers import read_prompts, unique_ids
from jaxalign.data.records import Prompt
from jaxalign.llm.base import LLM, Likelihood, Question
from jaxalign.llm.settings import LLMConfig
from jaxalign.synth.stage import Ask, Choose, Outcome, Rules, Stage
from jaxalign.synth.templates import Templates


class BuildConfig(Config):
    """What all builders have in common."""

    seed: int = Field(default=0, ge=0)
    """a build is a function of seed, data, models and keys"""
    limit: int = Field(default=0, ge=0)
    """use the first so many rows of the data; 0 is all"""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """stop when more than this share of the data's rows cannot be used"""
    retries: int = Field(default=5, ge=0)
    """how often an answer that is not understood is asked for again, with another seed"""
    retry_temperature: float = Field(default=0.7, gt=0)
    """temperature of a repeated request that was greedy"""
    max_parse_fail: float = Field(default=0.2, ge=0, le=1)
    """a stage fails once this share of its items has no usable answer"""
    templates: Path | None = None
    """a folder of your own prompts, NAME.txt, in place of those of the same name"""
    license: str = "unknown"
    """the licence of the records, as the data set's card names it"""
    source_name: str = ""
    """what the data was made from, a data set's name or address, for the card"""
    llm: LLMConfig = LLMConfig()
    """how models answer"""

    @property
    def rules(self) -> Rules:
        """Those of every stage."""
        return Rules(self.seed, self.retries, self.retry_temperature, self.max_parse_fail)


@dataclass(frozen=True)
class Built:
    """What a builder hands back.

    rows     records in canonical form, as they stand in the file
    metrics  what its report says of them: JSON
    dropped  {reason: how many items were left out}
    beside   {file name: rows} of further files of records, such as ties
    """

    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    beside: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a builder works with.

    data       what -d names: files, folders or hub data sets
    config     of the builder's class
    folder     where stages keep their files
    llms       by role: `model`, and the builder's other roles
    templates  of the builder's name
    say        tells the user
    outcomes   of the stages so far, by name
    """

    data: Any
    config: Any
    folder: Path
    llms: Mapping[str, LLM]
    templates: Templates
    say: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def ask(self, stage: str, items: Sequence[Ask], role: str = "model") -> dict[str, Any]:
        """{id: what the answer says} of the items whose answer was understood, asked all at once.

        Raises `UserError` where too many were not.
        """
        return self._kept(stage, self._stage(stage, role).ask(items))

    def choose(self, stage: str, items: Sequence[Choose], role: str = "model") -> dict[str, list[float]]:
        """{id: log p of each option among the options}."""
        return self._kept(stage, self._stage(stage, role).choose(items))

    def likelihoods(
        self, stage: str, items: Sequence[Choose], role: str = "model"
    ) -> dict[str, list[Likelihood]]:
        """{id: the likelihood of each option}; an option that is too long has none, nor has its item."""
        found = self._kept(stage, self._stage(stage, role).choose(items, _spelled))
        return {name: [Likelihood(*option) for option in options] for name, options in found.items()}

    def _stage(self, name: str, role: str) -> Stage:
        return Stage(name, self.folder, self.llms[role], self.config.rules)

    def _kept(self, stage: str, outcome: Outcome) -> dict[str, Any]:
        if stage in self.outcomes:
            raise ValueError(f"two stages are called {stage!r}")
        self.outcomes[stage] = outcome
        return outcome.values

    def read(self, count: int) -> None:
        """Notes that so many items were read: `n_in` of the report."""
        self.counts["in"] += count

    def prompts(self) -> list[Prompt]:
        """The prompts of the data, as many as `limit` allows, each with an id of its own; counted as read."""
        found, report = read_prompts(self.data, max_bad_rows=self.config.max_bad_rows)
        for line in report.lines():
            self.say(line)
        found = unique_ids(found)[: self.config.limit or None]
        self.read(len(found))
        return found


def _spelled(llm: LLM, questions: Sequence[Question]) -> list[list[list[float]] | str]:
    """Likelihoods as they stand in a file."""
    found = llm.likelihoods(questions)
    return [each if isinstance(each, str) else [[o.logp, o.tokens] for o in each] for each in found]


@dataclass(frozen=True)
class Builder:
    """One entry of the registry's `BUILDERS`.

    config     the class of its keys, a `BuildConfig`
    run        does the work
    roles      keys that name an LLM; where one is null, it is the model of -m
    model      whether -m is needed
    asks       whether anything is asked of a model with these keys
    templates  the folder of its prompts, or "" for that of its name
    data       whether -d is needed
    prompts    its rows are prompts to answer, not records to learn
    """

    config: type[BuildConfig]
    run: Callable[[Work], Built]
    roles: tuple[str, ...] = ()
    model: bool = True
    asks: Callable[[Any], bool] = lambda config: True
    templates: str = ""
    data: bool = True
    prompts: bool = False
