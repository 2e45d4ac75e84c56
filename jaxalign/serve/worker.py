"""The one thread that uses the model: all clients' requests share its engine."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

from jaxalign.sampling.engine import Asked, Engine, Sample
from jaxalign.sampling.forced import Forced, forced
from jaxalign.types import SamplingParams

FORCED_TOKENS = 4096  # about as many are looked at between two rounds of sampling

# (sample index, all of its tokens so far), (sample index, the finished sample), or why there will be none.
Event = tuple[int, list[int]] | tuple[int, Sample] | Exception
Put = Callable[[Event], object]


@dataclass
class _Ticket:
    """A request under way, and where its events go. `left` samples are still to come."""

    asked: Asked
    put: Put
    streams: bool
    left: int


class Worker:
    """An engine at work on whatever comes, until `close`. All methods may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open = True
        self._change = threading.Condition()
        self._came: list[Asked] = []
        self._texts: list[tuple[list[int], Future[Forced]]] = []
        self._tickets: dict[int, _Ticket] = {}
        self._numbers = count()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def close(self) -> None:
        """Drops what is under way and waits until the thread has ended."""
        with self._change:
            self._open = False
            for ticket in self._tickets.values():
                ticket.asked.dropped = True
            for _, future in self._texts:
                future.cancel()
            self._change.notify()
        self._thread.join()

    @property
    def under_way(self) -> int:
        """Requests that are running or waiting."""
        return len(self._tickets)

    def ask(self, prompt: list[int], params: SamplingParams, put: Put, *, streams: bool = False) -> Asked:
        """Starts a request that `Engine.checked` has passed. `put` gets its events, in the engine's thread;
        tokens so far only where it `streams`."""
        asked = Asked(next(self._numbers), prompt, params)
        with self._change:
            self._tickets[asked.number] = _Ticket(asked, put, streams, params.n)
            self._came.append(asked)
            self._change.notify()
        return asked

    def drop(self, asked: Asked) -> None:
        """Nobody waits for the rest of it any more."""
        with self._change:
            asked.dropped = True
            self._tickets.pop(asked.number, None)

    def force(self, text: list[int]) -> Future[Forced]:
        """What the model makes of the tokens of a text, one or more."""
        future: Future[Forced] = Future()
        with self._change:
            self._texts.append((text, future))
            self._change.notify()
        return future

    def _work(self) -> None:
        while True:
            try:
                for number, index, sample in self.engine.serve(self._feed, self._watch):
                    self._finished(number, index, sample)
                return
            except Exception as error:  # such as too little memory: those who were in it are told
                traceback.print_exc()
                self._fail(error)

    def _feed(self, idle: bool) -> list[Asked] | None:
        """A `Feed`; given texts are looked at here, between two rounds."""
        with self._change:
            while idle and self._open and not (self._came or self._texts):
                self._change.wait()
            came, self._came = [asked for asked in self._came if not asked.dropped], []
            texts = self._some_texts()
            if not (self._open or came or texts):
                return None
        if texts:
            self._force(texts)
        return came

    def _some_texts(self) -> list[tuple[list[int], Future[Forced]]]:
        taken, longest = 0, 0
        for text, _ in self._texts:
            longest = max(longest, len(text))
            if taken and longest * (taken + 1) > FORCED_TOKENS:
                break
            taken += 1
        texts, self._texts = self._texts[:taken], self._texts[taken:]
        return [(text, future) for text, future in texts if future.set_running_or_notify_cancel()]

    def _force(self, texts: list[tuple[list[int], Future[Forced]]]) -> None:
        try:
            found = forced(self.engine, [text for text, _ in texts])
        except Exception as error:
            traceback.print_exc()
            for _, future in texts:
                future.set_exception(error)
            return
        for (_, future), one in zip(texts, found, strict=True):
            future.set_result(one)

    def _watch(self, number: int, index: int, tokens: list[int]) -> None:
        ticket = self._tickets.get(number)
        if ticket is not None and ticket.streams:
            ticket.put((index, list(tokens)))

    def _finished(self, number: int, index: int, sample: Sample) -> None:
        with self._change:
            ticket = self._tickets.get(number)
            if ticket is None:
                return
            ticket.left -= 1
            if not ticket.left:
                del self._tickets[number]
        ticket.put((index, sample))

    def _fail(self, error: Exception) -> None:
        with self._change:
            tickets, self._tickets = list(self._tickets.values()), {}
            self._came = []
        for ticket in tickets:
            ticket.put(error)
