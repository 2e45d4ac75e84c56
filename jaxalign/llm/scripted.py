"""An LLM that is a function: what tests and dry runs put in a model's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxalign.data.records import Message
from jaxalign.llm.base import Completion, Likelihood, Question, Reply, Request

# (request, number of the answer, random numbers of that answer alone) -> the answer's text
Script = Callable[[Request, int, np.random.Generator], str]
# (prompt, option) -> log p(option | prompt) in nats
Scorer = Callable[[tuple[Message, ...] | str, str], float]


@dataclass
class ScriptedLLM:
    """Answers by `script` and judges options by `scorer`. A word is a token. `asked` are all requests so far.

    An answer ends with "length" where it has more words than `max_tokens`; then it is cut.
    """

    script: Script
    scorer: Scorer | None = None
    name: str = "script"
    identity: str = "script"
    asked: list[Request] = field(default_factory=list)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Replies in the order of the requests."""
        for index, request in enumerate(requests):
            self.asked.append(request)
            texts = [self._text(request, i) for i in range(request.n)]
            yield index, Reply(tuple(texts), _words(request.prompt))

    def _text(self, request: Request, number: int) -> Completion:
        text = self.script(request, number, np.random.default_rng([request.seed, number]))
        for stop in request.stop:
            text = text.split(stop)[0]
        words = len(text.split())
        if words > request.max_tokens:
            return Completion(" ".join(text.split()[: request.max_tokens]), "length", request.max_tokens)
        return Completion(text, "stop", words)

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        """By `scorer`; a script without one tells nothing."""
        if self.scorer is None:
            return ["the script has no scorer"] * len(questions)
        return [
            [Likelihood(self.scorer(q.prompt, option), max(1, len(option.split()))) for option in q.options]
            for q in questions
        ]


def _words(prompt: tuple[Message, ...] | str) -> int:
    text = prompt if isinstance(prompt, str) else " ".join(m.content for m in prompt)
    return len(text.split())
