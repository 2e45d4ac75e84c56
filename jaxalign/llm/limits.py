"""How fast and how much an endpoint may be asked: a pace, a budget, and a counter of what it has answered."""

from __future__ import annotations

import threading
import time

from jaxalign.llm.settings import HttpConfig


class PauseError(Exception):
    """The run must end for now, and may go on later: a spent budget, an endpoint that is down."""

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause, self.remedy = cause, remedy
        super().__init__(cause)


class StoppedError(Exception):
    """The call ended while its work was waiting."""


class Limits:
    """Shared by all threads that ask one endpoint, for as long as it is open.

    sent      requests, repeated ones among them
    tokens    of all prompts and answers so far
    answered  requests that the endpoint has dealt with
    """

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._pause = 60.0 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = 0.0  # when the next request may go out
        self._lock = threading.Lock()
        self.sent = self.tokens = self.answered = 0

    def admit(self, stop: threading.Event) -> None:
        """Waits for the turn of one more request and counts it. Raises `PauseError` where a budget is spent,
        and `StoppedError` once `stop` is set."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._pause
        if stop.wait(max(0.0, turn - time.monotonic())):
            raise StoppedError
        with self._lock:
            self._check()
            self.sent += 1

    def _check(self) -> None:
        spent = {
            "max_requests": (self.sent, self._config.max_requests, "requests"),
            "max_tokens_total": (self.tokens, self._config.max_tokens_total, "tokens"),
        }
        for key, (used, budget, unit) in spent.items():
            if budget and used >= budget:
                raise PauseError(
                    f"the budget {key} is spent: {used} {unit} of {budget}",
                    f"run the same command again, which goes on with a new budget, or raise llm.http.{key}",
                )

    def note(self, tokens: int) -> None:
        """One request was answered."""
        with self._lock:
            self.answered += 1
            self.tokens += tokens
