"""One request from its body to its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.sampling.engine import Asked, Sample
from jaxalign.sampling.forced import Forced
from jaxalign.serve.errors import ApiError
from jaxalign.serve.given import Choice, Growing, Piece, Reader
from jaxalign.serve.schema import Asking
from jaxalign.serve.shapes import Json, Shape
from jaxalign.serve.worker import Event, Worker
from jaxalign.types import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request; `text` is what the answers begin with where they repeat it."""

    text: str
    tokens: list[int]
    params: SamplingParams


@dataclass
class Answering:
    """A request at work. Its choices are numbered prompt by prompt, `n` to each.

    top   alternatives to each token, None without log-probabilities
    echo  whether the prompt is repeated before the answer
    """

    worker: Worker
    reader: Reader
    shape: Shape
    asked: Asking
    prompts: list[Prompt]
    top: int | None
    echo: bool
    id: str = ""
    created: int = 0
    sampled: int = 0
    under_way: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id, self.created = self.shape.prefix + uuid.uuid4().hex, int(time.time())

    async def whole(self) -> Json:
        """The answer at once."""
        choices: dict[int, Choice] = {}
        async for index, event in self._events(streams=False):
            if isinstance(event, Sample):
                choices[index] = await self._choice(index, event)
        made = [self.shape.choice(i, choices[i]) for i in range(len(choices))]
        return self._about(self.shape.whole) | {"choices": made, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[Json]:
        """The answer in parts as it grows. With log-probabilities each choice comes in one piece at its end,
        for those are told of the whole answer."""
        count, shape = len(self.prompts) * self.asked.n, self.shape
        texts = [Growing(self.reader.tokenizer, self._prompt(i).params.stop) for i in range(count)]
        wants_usage = self.asked.stream_options.include_usage
        about = self._about(shape.chunk) | ({"usage": None} if wants_usage else {})
        early = self.top is None
        for i in range(count):
            said = shape.delta(i, self._prompt(i).text, None, None) if self.echo and early else []
            for choice in shape.opening(i) + said:
                yield about | {"choices": [choice]}
        async for index, event in self._events(streams=early):
            if isinstance(event, Sample):
                done = await self._choice(index, event)
                rest = texts[index].rest(event.text) if early else done.text
                found = shape.delta(index, rest, done.finish, done.pieces)
            else:
                found = shape.delta(index, texts[index].more(event), None, None)
            for choice in found:
                yield about | {"choices": [choice]}
        if wants_usage:
            yield about | {"choices": [], "usage": self._usage()}

    def drop(self) -> None:
        """Frees what the request holds."""
        for asked in self.under_way:
            self.worker.drop(asked)

    def _prompt(self, choice: int) -> Prompt:
        return self.prompts[choice // self.asked.n]

    async def _events(self, *, streams: bool) -> AsyncIterator[tuple[int, list[int] | Sample]]:
        """(choice, tokens so far or its sample) until every choice has its sample."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop, n = asyncio.get_running_loop(), self.asked.n
        for p, prompt in enumerate(self.prompts):
            if not prompt.params.max_tokens:  # only the prompt is looked at
                for choice in range(p * n, p * n + n):
                    yield choice, _EMPTY
                continue
            put = partial(_put, loop, queue, p)
            asked = self.worker.ask(prompt.tokens, prompt.params, put, streams=streams)
            self.under_way.append(asked)
        left = len(self.under_way) * n
        while left:
            p, event = await queue.get()
            if isinstance(event, Exception):
                raise _broken(event) from event
            sample, found = event
            left -= isinstance(found, Sample)
            yield p * n + sample, found

    async def _choice(self, index: int, sample: Sample) -> Choice:
        prompt = self._prompt(index)
        self.sampled += len(sample.tokens)
        text = prompt.text + sample.text if self.echo else sample.text
        pieces = None if self.top is None else await self._pieces(prompt, sample, self.top)
        return Choice(text, sample.finish, pieces)

    async def _pieces(self, prompt: Prompt, sample: Sample, top: int) -> tuple[Piece, ...]:
        """Alternatives, and a prompt's own tokens, are looked at by teacher forcing once the answer is there:
        the sampler's programs need know nothing of them."""
        found: Forced | None = None
        if top or self.echo:
            text = prompt.tokens + sample.tokens.tolist()
            try:
                found = await asyncio.wrap_future(self.worker.force(text))
            except Exception as error:
                raise _broken(error) from error
        pieces, start = [], 0
        if self.echo and found is not None:
            pieces, start = self.reader.of_prompt(prompt.text, prompt.tokens, found, top), len(prompt.text)
        return (*pieces, *self.reader.of_answer(sample, start, found, top))

    def _about(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def _usage(self) -> Json:
        given = sum(len(prompt.tokens) for prompt in self.prompts)
        total = given + self.sampled
        return {"prompt_tokens": given, "completion_tokens": self.sampled, "total_tokens": total}


_EMPTY = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), "length")


def _broken(error: Exception) -> ApiError:
    return ApiError(500, f"the model failed: {error!r}")


def _put(loop: Any, queue: asyncio.Queue[tuple[int, Event]], prompt: int, event: Event) -> None:
    """From the engine's thread into the server's."""
    loop.call_soon_threadsafe(queue.put_nowait, (prompt, event))


def prepare(worker: Worker, reader: Reader, shape: Shape, asked: Asking) -> Answering:
    """A request that can be answered. Raises `ApiError` 400 where it cannot."""
    top, echo = shape.top(asked), shape.echo(asked)
    prompts = [_prompt(worker, reader, shape, asked, given) for given in shape.prompts(asked)]
    if not echo and not all(prompt.params.max_tokens for prompt in prompts):
        raise ApiError(400, "max_tokens: 0 is only for the prompt's own log-probs, with echo", "max_tokens")
    return Answering(worker, reader, shape, asked, prompts, top, echo)


def _prompt(worker: Worker, reader: Reader, shape: Shape, asked: Asking, given: Any) -> Prompt:
    tokens = reader.encode(given, shape.field)
    limit = worker.engine.max_length
    room = limit - len(tokens)
    params = asked.params(shape.max_tokens(asked, max(room, 1)))
    if params.max_tokens > room:
        told = f"{len(tokens)} tokens and max_tokens {params.max_tokens} pass the limit of {limit}"
        raise ApiError(400, f"{shape.field}: {told}", shape.field, "context_length_exceeded")
    try:
        if params.max_tokens:
            worker.engine.checked(tokens, params, shape.field)
    except UserError as error:
        raise ApiError(400, str(error), shape.field) from error
    return Prompt(given if isinstance(given, str) else "", tokens, params)
