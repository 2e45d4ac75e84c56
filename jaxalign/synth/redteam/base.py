"""What an attack is: a function from a question to the turns in which it is put, perhaps in rounds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxalign.data.records import Message
from jaxalign.synth.templates import Templates

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Case:
    """One question. `prepared` is what an attack had a helper make of it, such as its translation."""

    id: str
    question: str
    category: str = ""
    canary: str = ""
    prepared: str = ""


@dataclass(frozen=True)
class Decoding:
    """How the subject samples in place of what the run says; None leaves that as it is."""

    temperature: float | None = None
    top_p: float | None = None

    @property
    def label(self) -> str:
        """In words: `temperature 0.7, top_p 0.9`."""
        parts = (("temperature", self.temperature), ("top_p", self.top_p))
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)


@dataclass(frozen=True)
class Try:
    """One way to put a case.

    messages  turns. A user's turn that no assistant's turn follows is asked; where there are several, they
              are asked one after another, with the subject's answers between them
    label     tells the tries of one attack apart
    """

    messages: Turns
    label: str = ""
    decoding: Decoding = Decoding()


@dataclass(frozen=True)
class Tried:
    """What came of a try.

    verdict  A: no success, B: success, N: there is no verdict, for the `reason`
    talk     the turns up to its last answer, without what a defence adds
    score    higher is nearer to success, for searches
    round    0 for the first
    queries  requests to the subject
    """

    attack: str
    case: Case
    label: str
    verdict: str
    talk: Turns = ()
    answer: str = ""
    reason: str = ""
    score: float = 0.0
    round: int = 0
    queries: int = 0
    refused: bool = False


Apply = Callable[[Case, np.random.Generator], Turns]
# (case, what came of its earlier tries, rng) -> tries of the next round; none: it is over
Tries = Callable[[Case, Sequence[Tried], np.random.Generator], Sequence[Try]]


@dataclass(frozen=True)
class Attack:
    """One attack.

    tries    of the next round. `rng` is made anew of seed, attack and case each time
    prepare  the template by which a helper prepares each question (`Case.prepared`), if any
    restore  the template by which a helper turns the answer back, if any
    values   what templates of the helper may name besides the question
    canary   success is the case's canary in the answer, and not what the judge says
    """

    name: str
    tries: Tries
    prepare: str = ""
    restore: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    canary: bool = False

    def apply(self, case: Case, rng: np.random.Generator) -> Turns:
        """The messages of its first try."""
        return self.tries(case, (), rng)[0].messages


def once(apply: Apply, decodings: Sequence[Decoding] = (Decoding(),)) -> Tries:
    """The same messages under every decoding, in one round."""

    def tries(case: Case, past: Sequence[Tried], rng: np.random.Generator) -> Sequence[Try]:
        if past:
            return ()
        messages = apply(case, rng)
        return [Try(messages, decoding.label, decoding) for decoding in decodings]

    return tries


class AttackKeys(Protocol):
    """The keys that attacks read."""

    @property
    def examples(self) -> int: ...  # noqa: D102
    @property
    def pieces(self) -> int: ...  # noqa: D102
    @property
    def language(self) -> str: ...  # noqa: D102
    @property
    def sweep_temperature(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def sweep_top_p(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def search_rounds(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Setup:
    """What an attack is made of: its registry name, the wording, and the keys."""

    name: str
    wording: Templates
    keys: AttackKeys


def randomness(seed: int, attack: str, case: Case) -> np.random.Generator:
    """Random numbers of one attack on one case: a function of the seed and their names."""
    return np.random.default_rng([seed, zlib.crc32(f"{attack} {case.id}".encode())])


def canary(seed: int, name: str) -> str:
    """A string that nobody writes by chance."""
    return f"<canary:{zlib.crc32(f'{seed} canary {name}'.encode()):08x}>"
