"""A server of a tiny random model: its vocabulary is that of the toy tokenizer."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jax

from jaxalign.data.chat import Tokenizer
from jaxalign.sampling.engine import Engine
from jaxalign.serve.app import Service, make_app
from jaxalign.serve.given import Reader
from jaxalign.serve.worker import Worker
from tests.data.toy import toy
from tests.tiny import tiny_config, tiny_model

LIMIT = 256
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@cache
def parts() -> tuple[Any, Any, Tokenizer]:
    """(model, base, tokenizer)."""
    tokenizer = toy()
    model = tiny_model(config=tiny_config(max_positions=LIMIT, vocab_size=tokenizer.vocab_size))
    return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0))[1]), tokenizer


def engine(slots: int = 8) -> Engine:
    model, base, tokenizer = parts()
    stops = tokenizer.stop_tokens
    return Engine(model, base, decode=tokenizer.decode, stop_tokens=stops, slots=slots, steps=4, together=1)


def service(key: str = "", of: Engine | None = None) -> Service:
    return Service("tiny", Worker(of or engine()), Reader(parts()[2]), key)


def app(key: str = "") -> Any:
    return make_app(service(key))


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    turns = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 12} | fields


def text(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12} | fields


def events(body: str) -> list[dict[str, Any]]:
    """The parts of a stream, which ends as it should."""
    *parts, done, after = body.split("\n\n")
    assert (done, after) == ("data: [DONE]", "")
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]
