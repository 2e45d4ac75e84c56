"""Clients that go away, engines that fail, and the end."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.sampling.engine import Sample
from jaxalign.serve import run
from jaxalign.serve.app import make_app
from jaxalign.serve.settings import ServeConfig
from jaxalign.serve.worker import Worker
from jaxalign.types import SamplingParams
from tests.serve.rig import CHAT, chat, engine, service

PARAMS = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=200)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


@pytest.fixture
def worker() -> Any:
    made = Worker(engine(slots=2))
    made.start()
    yield made
    made.close()
    assert not made._thread.is_alive()


def test_requests_of_several_threads_are_all_answered(worker: Worker) -> None:
    events: Queue[Any] = Queue()
    prompts = [[i + 1] * (i + 1) for i in range(6)]
    threads = [threading.Thread(target=worker.ask, args=(p, PARAMS, events.put)) for p in prompts]
    for thread in threads:
        thread.start()
    found = sorted(events.get(timeout=60)[1].tokens.tolist() for _ in prompts)
    assert found == sorted(s[0].tokens.tolist() for s in engine().generate(prompts, PARAMS))
    wait_for(lambda: worker.under_way == 0)


def test_tokens_so_far_go_to_those_who_stream(worker: Worker) -> None:
    streamed, whole = Queue[Any](), Queue[Any]()
    worker.ask([1, 2], PARAMS, streamed.put, streams=True)
    worker.ask([1, 2], PARAMS, whole.put)
    index, tokens = streamed.get(timeout=60)
    _, sample = streamed.get(timeout=60)
    assert (index, tokens) == (0, sample.tokens[:4].tolist())
    assert whole.get(timeout=60)[1].tokens.tolist() == sample.tokens.tolist()
    assert whole.empty()


class Fragile:
    """An engine that breaks over a prompt of 13, with everybody who is in it."""

    def serve(self, feed: Any, watch: Any) -> Any:
        while (asked := feed(True)) is not None:
            if any(one.prompt == [13] for one in asked):
                raise MemoryError("no room")
            for one in asked:
                yield one.number, 0, f"sample of {one.prompt}"


def test_what_an_engine_fails_with_is_told_and_the_next_is_answered(capsys: Any) -> None:
    worker, events = Worker(Fragile()), Queue[Any]()  # type: ignore[arg-type]
    worker.start()
    for prompt in ([1], [13], [2]):
        worker.ask(prompt, PARAMS, events.put)
        found = events.get(timeout=60)
        assert isinstance(found, MemoryError) if prompt == [13] else found == (0, f"sample of {prompt}")
    assert worker.under_way == 0
    worker.close()
    assert "no room" in capsys.readouterr().err


def test_texts_that_cannot_be_looked_at_are_told_too(worker: Worker, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("jaxalign.serve.worker.forced", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.force([1, 2]).result(timeout=60)
    monkeypatch.undo()
    assert worker.force([1, 2]).result(timeout=60).logp.shape == (2,)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_closing_drops_what_is_under_way() -> None:
    worker, events = Worker(engine(slots=2)), Queue[Any]()
    worker.start()
    for _ in range(5):
        worker.ask([1, 2], LONG, events.put, streams=True)
    events.get(timeout=60)
    worker.close()
    assert not worker._thread.is_alive()
    assert not any(isinstance(event, tuple) and isinstance(event[1], Sample) for event in list(events.queue))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(stream: bool) -> None:
    pytest.importorskip("starlette", reason="needs the extra serve")
    found = service(of=engine(slots=2))
    sent: list[Any] = []

    async def client() -> None:
        gone = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps(chat(max_tokens=200, stream=stream)).encode()}]

        async def receive() -> Any:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        asking = asyncio.ensure_future(make_app(found)(scope, receive, send))
        while not found.worker.under_way:
            await asyncio.sleep(0.005)
        gone.set()
        await asking

    tokens: list[int] = []
    watch, finished = found.worker._watch, found.worker._finished
    found.worker._watch = lambda n, i, t: (tokens.append(len(t)), watch(n, i, t))[1]  # type: ignore
    found.worker._finished = lambda n, i, s: (tokens.append(-1), finished(n, i, s))[1]  # type: ignore
    found.worker.start()
    asyncio.run(client())
    assert found.worker.under_way == 0
    found.worker.close()
    assert -1 not in tokens  # nobody sampled to the end of it
    assert max(tokens, default=0) < 200
    assert not any(b'"finish_reason": "length"' in message.get("body", b"") for message in sent)


def test_a_missing_key_and_a_taken_port_are_told_before_the_model_is_loaded(monkeypatch: Any) -> None:
    for library in ("starlette", "uvicorn"):
        pytest.importorskip(library, reason="needs the extra serve")
    monkeypatch.setattr(run, "load_engine", lambda *given: pytest.fail("a model was loaded"))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not in the environment"):
        run.serve("m", ServeConfig(api_key_env="NO_SUCH_KEY", port=0))
    with run._listen(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot listen there"):
            run.serve("m", ServeConfig(port=port))


@pytest.mark.parametrize("missing", ["starlette.applications", "uvicorn"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch: Any, missing: str) -> None:
    pytest.importorskip("starlette", reason="needs the extra serve")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"is not installed\n  pip install 'jaxalign\[serve\]'"):
        run.serve("m", ServeConfig())
