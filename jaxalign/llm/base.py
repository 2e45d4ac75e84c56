"""One interface to whatever answers: a local model, an HTTP endpoint, a script in a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from jaxalign.data.records import Message

Prompt = tuple[Message, ...] | str  # turns go through the chat template, a string is continued as it stands


@dataclass(frozen=True)
class Request:
    """What is asked, and how the `n` answers to it are sampled; as `SamplingParams` has it."""

    prompt: Prompt
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One answer. finish is "stop" or "length"; tokens is its length, logp its log-probability in nats, None
    where the backend does not tell."""

    text: str
    finish: str = "stop"
    tokens: int = 0
    logp: float | None = None


@dataclass(frozen=True)
class Reply:
    """`n` completions, or the `fault` for which there are none: a prompt that is too long, a refused request.

    prompt_tokens  length of the prompt, 0 where the backend does not tell
    """

    completions: tuple[Completion, ...] = ()
    prompt_tokens: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Likelihood:
    """log p(text | prompt) in nats, summed over the text's `tokens`; what ends an answer is not counted."""

    logp: float
    tokens: int

    @property
    def nll(self) -> float:
        """Nats a token."""
        return -self.logp / self.tokens


@dataclass(frozen=True)
class Question:
    """A prompt and texts that might follow it."""

    prompt: Prompt
    options: tuple[str, ...]


class LLM(Protocol):
    """Anything that answers. Whoever has much to ask asks it at once: a backend works on all of it together.

    name      for reports
    identity  tells one model from another: weights by their hash, an endpoint by its address. No keys
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def identity(self) -> str: ...  # noqa: D102

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) in the order in which they are finished. A reply is a function of its own request:
        the seed, where the backend is deterministic, decides all draws."""
        ...

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        """The likelihood of every option after its prompt, or why that cannot be told. Raises `UserError`
        where the backend has none at all."""
        ...


Item = TypeVar("Item")


def answers(llm: LLM, requests: Sequence[Request]) -> list[Reply]:
    """All replies in the order of the requests."""
    found: dict[int, Reply] = dict(llm.stream(requests))
    return [found[i] for i in range(len(requests))]


def choice_logprobs(llm: LLM, questions: Sequence[Question]) -> list[list[float] | str]:
    """log p(option | one of the options) of every question, or why that cannot be told.

    Options are compared by log-probability where each is one token, else by log-probability a token.
    """
    return [f if isinstance(f, str) else _normalised(f) for f in llm.likelihoods(questions)]


def _normalised(found: Sequence[Likelihood]) -> list[float]:
    scores = np.array([-option.nll for option in found])
    scores = scores - scores.max()
    return (scores - np.log(np.exp(scores).sum())).tolist()
