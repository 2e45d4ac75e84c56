"""What an LLM has answered, kept in one SQLite file: the same request to the same model is asked once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.llm.base import LLM, Completion, Likelihood, Question, Reply, Request

FORM = 1  # of the values; another one never meets the keys of this one
WAIT = 60.0  # seconds to wait for another process that writes
ASKED_AT_ONCE = 64  # questions between two writes


@dataclass(frozen=True)
class Cached:
    """An LLM in front of which stands a file. Faults are not kept, nor are questions that could not be told.

    Keys are the sha256 of the LLM's identity and the whole request, seed and all: a reply is a function of
    its request, so two equal requests of one call are asked once. Several processes may share the file.
    """

    llm: LLM
    file: Path

    @property
    def name(self) -> str:
        """That of the LLM."""
        return self.llm.name

    @property
    def identity(self) -> str:
        """That of the LLM: what it says is not changed."""
        return self.llm.identity

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """What is kept first, then the LLM's replies as they finish. Raises as the LLM does, and `UserError`
        for a file that cannot be used."""
        with self._open() as kept:
            places: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                key = self._key(request)
                reply = kept.get(key, _reply)
                if reply is None:
                    places.setdefault(key, []).append(index)
                else:
                    yield index, reply
            keys = list(places)
            answered = self.llm.stream([requests[places[key][0]] for key in keys]) if keys else iter(())
            try:
                for at, reply in answered:
                    if not reply.fault:
                        kept.put(keys[at], asdict(reply))
                    yield from ((index, reply) for index in places[keys[at]])
            finally:
                if isinstance(answered, Generator):
                    answered.close()

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        """As the LLM tells them. Raises as `stream` does."""
        with self._open() as kept:
            asked = {self._key(question): question for question in questions}
            found: dict[str, list[Likelihood] | str] = {}
            for key in asked:
                known = kept.get(key, _likelihoods)
                if known is not None:
                    found[key] = known
            missing = [key for key in asked if key not in found]
            for start in range(0, len(missing), ASKED_AT_ONCE):
                part = missing[start : start + ASKED_AT_ONCE]
                told = self.llm.likelihoods([asked[key] for key in part])
                for key, value in zip(part, told, strict=True):
                    found[key] = value
                    if not isinstance(value, str):
                        kept.put(key, [asdict(likelihood) for likelihood in value])
        return [found[self._key(question)] for question in questions]

    def _key(self, asked: Request | Question) -> str:
        parts = [FORM, self.identity, type(asked).__name__, asdict(asked)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _open(self) -> Iterator[_Kept]:
        with _readable(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
        with closing(connection):
            with _readable(self.file):
                connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)")
            yield _Kept(self.file, connection)


@dataclass(frozen=True)
class _Kept:
    """The open file."""

    file: Path
    connection: sqlite3.Connection

    def get(self, key: str, read: Any) -> Any:
        """What `read` makes of the value, None where there is none."""
        with _readable(self.file):
            rows = self.connection.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchall()
            return read(json.loads(rows[0][0])) if rows else None

    def put(self, key: str, value: Any) -> None:
        """Keeps a value; where another process was first, its value stays."""
        with _readable(self.file):
            self.connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(value)))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Says what is wrong with the file, and what helps."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        remedy = "see that its folder can be written and has room, and that no other program holds the file"
        raise UserError(f"the cache cannot be used: {error}", place=str(file), remedy=remedy) from error
    except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
        remedy = "delete the file; what it held will be asked again"
        raise UserError(f"the cache is damaged: {error}", place=str(file), remedy=remedy) from error


def _reply(value: Any) -> Reply:
    completions = tuple(Completion(**completion) for completion in value["completions"])
    return Reply(completions, value["prompt_tokens"])


def _likelihoods(value: Any) -> list[Likelihood]:
    return [Likelihood(**likelihood) for likelihood in value]
