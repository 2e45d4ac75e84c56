"""An OpenAI-compatible endpoint: turns go to /chat/completions, plain strings to /completions."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity

from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Likelihood, Question, Reply, Request
from jaxalign.llm.keys import KEY, hidden, key_for, variables, without
from jaxalign.llm.limits import Limits, PauseError, StoppedError
from jaxalign.llm.openai import (
    PLAIN,
    NoLikelihoodsError,
    UnreadableError,
    echo_body,
    next_token_body,
    read_echo,
    read_next_token,
    read_reply,
    sampling_body,
    tokens_used,
)
from jaxalign.llm.settings import HttpConfig

PASSING = (408, 425, 429)  # and all from 500 on
BUSY = (429, 503)  # never the fault of the one request
UNUSABLE = (400, 422)  # what endpoints say to a key of the body that they do not know
SHOWN, TOLD = 80, 300  # letters of a body, and of an endpoint's own message, that a fault shows
GO_ON = "run the same command again later: it goes on where it stopped"

T = TypeVar("T")


class PassingError(Exception):
    """A failure that may pass. status: 0 without an answer; after: seconds that the endpoint asks to wait."""

    def __init__(self, text: str, status: int = 0, after: float | None = None) -> None:
        self.status, self.after = status, after
        super().__init__(text)


class RefusedError(Exception):
    """A request that will not be answered, and why."""

    def __init__(self, text: str, status: int = 0) -> None:
        self.status = status
        super().__init__(text)


@dataclass(frozen=True)
class Endpoint:
    """One address and the key that opens it. `variable` is where the key comes from, "" without a key."""

    url: str
    model: str
    config: HttpConfig
    client: httpx.Client = field(repr=False)
    limits: Limits = field(repr=False)
    key: str = field(repr=False, default="")
    variable: str = ""

    def ask(self, path: str, body: Any, read: Callable[[Any], T], stop: threading.Event) -> T:
        """What `read` makes of the answer; repeated as long as that helps and `stop` is not set.

        Raises `RefusedError`, `PauseError`, `StoppedError`, `UserError` and what `read` raises.
        """
        answered = [self.limits.answered]  # when it began, and after each failure
        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.config.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=partial(_wait, longest=self.config.max_wait),
            retry=tenacity.retry_if_exception_type(PassingError),
            after=lambda state: answered.append(self.limits.answered),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return tries(self._once, path, body, read, stop)
        except PassingError as error:
            if stop.is_set():
                raise StoppedError from None
            # Others had answers since the last failure but one: it is this request that fails.
            alive = self.limits.answered > answered[-2] and error.status not in BUSY
            if alive or 200 <= error.status < 300:
                raise RefusedError(str(error)) from None
            patience = "llm.http.retries, max_wait and timeout say how long to wait for it"
            raise PauseError(f"no usable answer: {error}", f"{GO_ON}; {patience}") from None

    def _once(self, path: str, body: Any, read: Callable[[Any], T], stop: threading.Event) -> T:
        self.limits.admit(stop)
        try:
            response = self.client.post(self.url + path, content=json.dumps(body))
        except httpx.RequestError as error:
            raise PassingError(hidden(f"{type(error).__name__}: {error}", self.key)) from None
        if response.status_code >= 300:
            self._refused(response, path)
        shown = " ".join(hidden(response.text, self.key).split())[:SHOWN]
        try:
            answer = without(json.loads(response.content), self.key)
        except ValueError:  # of the JSON or of its encoding
            raise PassingError(f"an answer that is not JSON: {shown!r}", response.status_code) from None
        self._note(answer)
        try:
            return read(answer)
        except UnreadableError as error:
            raise PassingError(f"{error}: {shown!r}", response.status_code) from None

    def _note(self, answer: Any) -> None:
        used = tokens_used(answer)
        self.limits.note(sum(used or ()))
        if used is None and self.config.max_tokens_total and isinstance(answer, dict) and "choices" in answer:
            raise UserError(
                "the endpoint does not tell how many tokens it used, so max_tokens_total cannot be kept",
                place=self.url,
                remedy="set llm.http.max_requests in its place",
            )

    def _refused(self, response: httpx.Response, path: str) -> None:
        """Raises what an answer that is none means."""
        status = response.status_code
        said = _message(hidden(response.text, self.key)) or response.reason_phrase
        text = f"{status}: {hidden(said, self.key)[:TOLD]}"
        if status in PASSING or status >= 500:
            after = _retry_after(response.headers.get("retry-after", ""), datetime.now(UTC))
            raise PassingError(text, status, after)
        if status < 400:
            target = hidden(response.headers.get("location", "nowhere"), self.key)
            raise UserError(f"it redirects to {target}", place=self.url, remedy="name that address")
        if status in ENDS:
            cause, remedy = ENDS[status](self, path)
            raise UserError(f"{cause} ({text})", place=self.url, remedy=remedy)
        self.limits.note(0)
        raise RefusedError(text, status)


def _unauthorised(endpoint: Endpoint, path: str) -> tuple[str, str]:
    if endpoint.variable:
        cause = f"it refuses the key in {endpoint.variable}"
        return cause, f"set {endpoint.variable} to a key of this endpoint"
    known = " or ".join(variables(urlsplit(endpoint.url).hostname or ""))
    return "it wants a key and there is none", f"put the key into the environment variable {known}"


def _unpaid(endpoint: Endpoint, path: str) -> tuple[str, str]:
    return "it wants to be paid", f"add to the account's credit, then {GO_ON}"


def _forbidden(endpoint: Endpoint, path: str) -> tuple[str, str]:
    key = f"the key in {endpoint.variable}" if endpoint.variable else f"a request without a key ({KEY})"
    return f"{key} may not use {endpoint.model!r}", "take another key, or a model that it may use"


def _missing(endpoint: Endpoint, path: str) -> tuple[str, str]:
    remedy = "check the address, which mostly ends in /v1, and the name after '#'"
    if path == PLAIN:
        remedy += "; plain strings need /completions, which not every endpoint has: ask with turns"
    return f"there is no {path} or no model {endpoint.model!r}", remedy


# Answers that every other request would get too.
ENDS: dict[int, Callable[[Endpoint, str], tuple[str, str]]] = {
    401: _unauthorised,
    402: _unpaid,
    403: _forbidden,
    404: _missing,
}


def _wait(state: tenacity.RetryCallState, longest: float) -> float:
    """Seconds before the next try: what the endpoint asks for, else 1, 2, 4... and up to a second more."""
    error = state.outcome.exception() if state.outcome else None
    after = error.after if isinstance(error, PassingError) else None
    if after is None:
        return tenacity.wait_exponential_jitter(initial=1, max=longest, jitter=1)(state)
    return min(after, longest)


def _retry_after(value: str, now: datetime) -> float | None:
    """Seconds, of a header that holds seconds or a date; None where it holds neither."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())


def _message(text: str) -> str:
    """What an error body says, in one line."""
    try:
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
    except ValueError:
        found = text
    words = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return " ".join(words.split())


@dataclass(frozen=True)
class HttpLLM:
    """An endpoint as an LLM. Its budgets hold for as long as it is open."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        """Its address and the model."""
        return self.identity

    @property
    def identity(self) -> str:
        """Its address and the model; the address has no credentials."""
        return f"{self.endpoint.url}#{self.endpoint.model}"

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Replies as they finish. What the endpoint refuses is a fault. Closing the iterator early drops
        what is not yet sent.

        Raises `UserError` where no request can be answered, after all replies that came: with status 75
        where the same call may succeed later.
        """
        jobs = [partial(self._reply, request) for request in requests]
        return self._finished(jobs, "{} of {} requests were answered, and their answers kept")

    def likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood] | str]:
        """After turns, of options that are one token each; after a plain string, of any text. Raises as
        `stream` does, and for an endpoint that tells no log-probs."""
        jobs = [partial(self._likelihoods, question) for question in questions]
        found = dict(self._finished(jobs, "{} of these {} questions were answered, and will be asked again"))
        return [found[i] for i in range(len(questions))]

    def _finished(self, jobs: Sequence[Callable[[threading.Event], T]], kept: str) -> Iterator[tuple[int, T]]:
        """(index, result) as the jobs finish. The first exception ends all once what is under way is here."""
        stop, done = threading.Event(), 0
        pool = ThreadPoolExecutor(self.endpoint.config.concurrency, "llm")
        futures: dict[Future[T], int] = {pool.submit(_ending, job, stop): i for i, job in enumerate(jobs)}
        failure: PauseError | UserError | None = None
        try:
            for future in as_completed(futures):
                try:
                    found = future.result()
                except (CancelledError, StoppedError):
                    continue
                except (PauseError, UserError) as error:
                    failure = failure or error
                    for waiting in futures:
                        waiting.cancel()
                    continue
                done += 1
                yield futures.pop(future), found
            if isinstance(failure, PauseError):
                cause = f"{failure.cause}; {kept.format(done, len(jobs))}"
                raise UserError(cause, place=self.endpoint.url, remedy=failure.remedy, status=75)
            if failure:
                raise failure
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, request: Request, stop: threading.Event) -> Reply:
        """Asks again, with other seeds, where fewer choices come than wanted, and one by one where several
        at a time are refused."""
        done: list[Completion] = []
        prompt_tokens, width = 0, request.n
        while len(done) < request.n:
            n = min(width, request.n - len(done))
            path, body = sampling_body(request, self.endpoint.model, n, request.seed + len(done))
            try:
                part = self.endpoint.ask(path, body, read_reply, stop)
            except RefusedError as error:
                if n == 1 or error.status not in UNUSABLE:
                    return Reply(fault=str(error))
                width = 1
                continue
            if part.fault:
                return part
            done += part.completions
            prompt_tokens = prompt_tokens or part.prompt_tokens
        return Reply(tuple(done[: request.n]), prompt_tokens)

    def _likelihoods(self, question: Question, stop: threading.Event) -> list[Likelihood] | str:
        try:
            return self._scored(question, stop)
        except RefusedError as error:
            if error.status not in UNUSABLE or not re.search("echo|logprob|max_tokens", str(error)):
                return str(error)
            cause = f"it refuses to tell log-probs ({error})"
        except NoLikelihoodsError as error:
            cause = str(error)
        plain = isinstance(question.prompt, str)
        other = "ask with turns, or take a model on this machine" if plain else "take a model on this machine"
        raise UserError(f"likelihoods: {cause}", place=self.endpoint.url, remedy=other)

    def _scored(self, question: Question, stop: threading.Event) -> list[Likelihood] | str:
        model = self.endpoint.model
        if not isinstance(question.prompt, str):
            path, body = next_token_body(question.prompt, model)
            return self.endpoint.ask(path, body, partial(read_next_token, options=question.options), stop)
        found = []
        for option in question.options:
            path, body = echo_body(question.prompt + option, model)
            read = partial(read_echo, question=question, option=option)
            part = self.endpoint.ask(path, body, read, stop)
            if isinstance(part, str):
                return part
            found.append(part)
        return found


def _ending(job: Callable[[threading.Event], T], stop: threading.Event) -> T:
    """Runs a job; where it ends the call, nothing is sent from then on, however late the caller looks."""
    try:
        return job(stop)
    except (PauseError, UserError):
        stop.set()
        raise


def open_http(name: str, config: HttpConfig) -> HttpLLM:
    """The endpoint `http(s)://host[:port]/v1#model`; nothing is sent yet. Raises `UserError` for an address
    that is no such, or that holds what should be secret."""
    url, host, model = _address(name)
    variable, key = key_for(host)
    client = httpx.Client(
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        timeout=config.timeout,
        limits=httpx.Limits(max_connections=config.concurrency),
    )
    llm = HttpLLM(Endpoint(url, model, config, client, Limits(config), key, variable))
    weakref.finalize(llm, client.close)
    return llm


def _address(name: str) -> tuple[str, str, str]:
    """URL, host and model. Messages never show an address that may hold a password."""
    url, _, model = name.partition("#")
    remedy = "name it http(s)://host/v1#model"
    if "@" in url or "?" in url:
        cause = "an address with a user, a password or a query: it would stand in reports"
        raise UserError(cause, remedy=f"{remedy} and put the key into {KEY}")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, it raises where it is no number
    except ValueError:
        raise UserError("the address of an endpoint cannot be read", remedy=remedy) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise UserError(f"{name!r} names no endpoint with a model", remedy=remedy)
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}", parts.hostname, model
