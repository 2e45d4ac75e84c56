"""One stage of a build: much is asked at once, what comes back is parsed, asked again, or set aside.

    STAGE.jsonl          what was understood, a line an item: id, value, attempts, tokens
    STAGE.rejects.jsonl  what was not, with its reason and the raw answers

Lines are written as they come, so that a stage that was killed goes on; an item that stands in either file is
not asked again. At the end both are put into the order of the items: what a stage leaves is a function of
what it was asked.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from jaxalign.errors import UserError
from jaxalign.llm.base import LLM, Completion, Question, Reply, Request, choice_logprobs
from jaxalign.progress import Meter

# What a parser makes of the completions of a reply: a JSON value, or None and the reason why there is none.
Parsed = tuple[Any, str]
Parse = Callable[[tuple[Completion, ...]], Parsed]
# What a model says of each of these questions: a JSON value, or why it can say nothing.
Tell = Callable[[LLM, Sequence[Question]], Sequence[Any]]
CHOSEN_AT_ONCE = 256  # questions between two writes


@dataclass(frozen=True)
class Ask:
    """One item: what is asked, and how the answer is understood. The request's seed is set by the stage."""

    id: str
    request: Request
    parse: Parse


@dataclass(frozen=True)
class Choose:
    """One item of which no text is wanted but log p of each option."""

    id: str
    question: Question


@dataclass(frozen=True)
class Rules:
    """How a stage deals with answers it does not understand.

    retries            how often an item is asked again, each time with another seed
    retry_temperature  of a repeated request that was greedy: the same answer would come again
    max_parse_fail     the share of items without an answer with which a stage fails
    """

    seed: int = 0
    retries: int = 5
    retry_temperature: float = 0.7
    max_parse_fail: float = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a stage's items: `values` by id, and counts that a report holds."""

    values: dict[str, Any]
    rejects: dict[str, int]
    attempts: int
    failures: int
    prompt_tokens: int
    tokens: int

    @property
    def parse_failure_rate(self) -> float:
        """The share of all answers that could not be understood."""
        return self.failures / self.attempts if self.attempts else 0.0


@dataclass(frozen=True)
class Stage:
    """Asks `llm`; its files lie in `folder`."""

    name: str
    folder: Path
    llm: LLM
    rules: Rules = Rules()

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.folder / f"{self.name}.jsonl", self.folder / f"{self.name}.rejects.jsonl"

    def ask(self, items: Sequence[Ask]) -> Outcome:
        """What the answers to `items` say. Raises `UserError` where too many say nothing, and `ValueError`
        for two items of one id."""
        order = _order(items)
        with _Journal(*self._files) as journal, Meter(len(items), self.name) as meter:
            todo = [item for item in items if item.id not in journal.ids]
            costs = {item.id: _Cost() for item in todo}
            meter.resume(len(items) - len(todo))
            self._check(journal, len(items))
            for attempt in range(self.rules.retries + 1):
                todo = list(self._round(todo, attempt, costs, journal, meter))
                if not todo:
                    break
        return self._outcome(order)

    def choose(self, items: Sequence[Choose], tell: Tell = choice_logprobs) -> Outcome:
        """{id: what `tell` says of its question}, or log p of each option among them. Raises as `ask`."""
        order = _order(items)
        with _Journal(*self._files) as journal, Meter(len(items), self.name) as meter:
            todo = [item for item in items if item.id not in journal.ids]
            meter.resume(len(items) - len(todo))
            self._check(journal, len(items))
            for start in range(0, len(todo), CHOSEN_AT_ONCE):
                part = todo[start : start + CHOSEN_AT_ONCE]
                found = tell(self.llm, [item.question for item in part])
                for item, value in zip(part, found, strict=True):
                    if isinstance(value, str):
                        journal.reject(item.id, _Cost(1), value, [])
                        meter.fail(0)
                        self._check(journal, len(items))
                    else:
                        journal.accept(item.id, _Cost(1), value)
                        meter.add(0)
        return self._outcome(order)

    def _round(
        self, items: list[Ask], attempt: int, costs: dict[str, _Cost], journal: _Journal, meter: Meter
    ) -> Iterator[Ask]:
        """Asks all once; those to ask again."""
        requests = [self._request(item, attempt) for item in items]
        for index, reply in self.llm.stream(requests):
            item = items[index]
            cost = costs[item.id] = costs[item.id].after(reply)
            value, reason = (None, reply.fault) if reply.fault else item.parse(reply.completions)
            tokens = sum(c.tokens for c in reply.completions)
            if value is not None:
                journal.accept(item.id, cost, value)
                meter.add(tokens)
            elif reply.fault or attempt == self.rules.retries:
                journal.reject(item.id, cost, reason, [c.text for c in reply.completions])
                meter.fail(tokens)
                self._check(journal, meter.total)
            else:
                meter.spend(tokens)
                yield item

    def _request(self, item: Ask, attempt: int) -> Request:
        request = item.request
        seed = zlib.crc32(f"{self.rules.seed} {self.name} {attempt} {item.id}".encode())
        greedy = request.temperature == 0 and attempt > 0
        return replace(
            request, seed=seed, temperature=self.rules.retry_temperature if greedy else request.temperature
        )

    def _check(self, journal: _Journal, total: int) -> None:
        """Raises `UserError` once too many items have no usable answer."""
        if journal.rejected <= self.rules.max_parse_fail * total:
            return
        common = "; ".join(f"{n} x {reason}" for reason, n in Counter(journal.reasons).most_common(3))
        raise UserError(
            f"stage {self.name}: {journal.rejected} of {total} items have no usable answer ({common})",
            place=str(self._files[1]),
            remedy="read the answers there, then mend the template, take a stronger model or raise "
            "max_parse_fail; once the file is deleted they are asked again",
        )

    def _outcome(self, order: dict[str, int]) -> Outcome:
        """Sorts the files and sums them up."""
        accepted, rejected = (_sorted(file, order) for file in self._files)
        tries = [row["attempts"] for row in rejected]
        return Outcome(
            values={row["id"]: row["value"] for row in accepted},
            rejects=dict(Counter(row["reason"] for row in rejected).most_common()),
            attempts=sum(tries) + sum(row["attempts"] for row in accepted),
            failures=sum(tries) + sum(row["attempts"] - 1 for row in accepted),
            prompt_tokens=sum(row["prompt_tokens"] for row in (*accepted, *rejected)),
            tokens=sum(row["tokens"] for row in (*accepted, *rejected)),
        )


@dataclass(frozen=True)
class _Cost:
    """What an item has cost so far."""

    attempts: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def after(self, reply: Reply) -> _Cost:
        """One more attempt."""
        tokens = self.tokens + sum(c.tokens for c in reply.completions)
        return replace(
            self,
            attempts=self.attempts + 1,
            prompt_tokens=self.prompt_tokens + reply.prompt_tokens,
            tokens=tokens,
        )


def _order(items: Sequence[Ask] | Sequence[Choose]) -> dict[str, int]:
    order = {item.id: i for i, item in enumerate(items)}
    if len(order) != len(items):
        twice = next(name for name, n in Counter(item.id for item in items).items() if n > 1)
        raise ValueError(f"two items have the id {twice!r}")
    return order


class _Journal:
    """The two files of a stage while it is under way."""

    def __init__(self, accepted: Path, rejected: Path) -> None:
        self.files = accepted, rejected
        self.ids: set[str] = set()
        self.reasons: list[str] = []

    def __enter__(self) -> _Journal:
        self.files[0].parent.mkdir(parents=True, exist_ok=True)
        accepted, rejected = (_whole(file) for file in self.files)
        self.ids = {row["id"] for row in (*accepted, *rejected)}
        self.reasons = [row["reason"] for row in rejected]
        self._out: list[IO[str]] = [file.open("a", encoding="utf-8") for file in self.files]
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._out:
            file.close()

    @property
    def rejected(self) -> int:
        """Items without a usable answer."""
        return len(self.reasons)

    def accept(self, name: str, cost: _Cost, value: Any) -> None:
        """One item is done."""
        self._write(0, {"id": name, **asdict(cost), "value": value})

    def reject(self, name: str, cost: _Cost, reason: str, raw: list[str]) -> None:
        """One item is given up."""
        self.reasons.append(reason)
        self._write(1, {"id": name, **asdict(cost), "reason": reason, "raw": raw})

    def _write(self, which: int, row: dict[str, Any]) -> None:
        self._out[which].write(json.dumps(row, ensure_ascii=False) + "\n")
        self._out[which].flush()


def _whole(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed run left half written is cut off."""
    if not file.exists():
        return []
    blob = file.read_bytes()
    end = blob.rfind(b"\n") + 1
    if end < len(blob):
        os.truncate(file, end)
    return [json.loads(line) for line in blob[:end].splitlines()]


def _sorted(file: Path, order: dict[str, int]) -> list[dict[str, Any]]:
    """The rows of the stage's items, with which the file is replaced, in their order."""
    rows = sorted((row for row in _whole(file) if row["id"] in order), key=lambda row: order[row["id"]])
    draft = file.with_name(file.name + ".part")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(draft, file)
    return rows
