"""An endpoint on this machine that answers as a script says, request by request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request; `number` counts them from 0 as they arrive."""

    number: int
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def text(self) -> str:
        """The last turn, or the plain prompt."""
        return self.body["messages"][-1]["content"] if "messages" in self.body else self.body["prompt"]


@dataclass(frozen=True)
class Answer:
    """What goes back after `delay` seconds; `broken` closes the connection in its place."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    broken: bool = False


Script = Callable[[Call], Answer]


@dataclass
class Fake:
    """A running endpoint. `script` may be changed; `most` is how many requests were under way at once."""

    url: str
    script: Script
    calls: list[Call] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        """What -m takes."""
        return f"{self.url}/v1#toy"

    @property
    def asked(self) -> list[str]:
        """The prompts so far."""
        return [call.text for call in self.calls]


def said(*texts: str, call: Call | None = None, finish: str = "stop", tokens: int = 0) -> Answer:
    """A sound answer in the form of the call's path; ten tokens of prompt, a token a word."""
    plain = call is not None and not call.path.endswith("/chat/completions")
    choices = [
        {"index": i, "finish_reason": finish}
        | ({"text": text} if plain else {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]
    tokens = tokens or sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    return Answer({"object": "x", "choices": choices, "usage": usage})


def echo(call: Call) -> Answer:
    """Says the prompt again, with the seed."""
    return said(f"{call.text} {call.body['seed']}", call=call)


def refused(status: int, message: str, **headers: str) -> Answer:
    """An error in OpenAI's form; `Retry_After` is a header."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer({"error": {"message": message, "type": "x"}}, status, names)


def in_turn(answers: Sequence[Answer], then: Script = echo) -> Script:
    """The first requests get `answers`, all others what `then` says."""
    return lambda call: answers[call.number] if call.number < len(answers) else then(call)


@contextmanager
def serving(script: Script = echo) -> Iterator[Fake]:
    """A server in a thread of its own, until the block ends."""
    fake = Fake("", script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body leave together
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            with fake.lock:
                fake.running += 1
                fake.most = max(fake.most, fake.running)
                blob = self.rfile.read(int(self.headers["Content-Length"]))
                call = Call(len(fake.calls), self.path, dict(self.headers), json.loads(blob))
                fake.calls.append(call)
            answer = fake.script(call)
            fake.over.wait(answer.delay) if answer.delay else None
            with fake.lock:
                fake.running -= 1
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            if answer.broken:
                self.close_connection = True
                return
            raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone away is none of our errors."""

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
