"""A model behind an HTTP address, until somebody stops it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

from jaxalign.errors import UserError
from jaxalign.extras import optional
from jaxalign.sampling.load import load_engine
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.serve.app import Service, make_app, starlette
from jaxalign.serve.given import Reader
from jaxalign.serve.settings import ServeConfig
from jaxalign.serve.worker import Worker

_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(model: str, config: ServeConfig) -> None:
    """Serves `model` until SIGTERM or Ctrl-C, which let answers under way come to their end.

    Raises `UserError` where starlette or uvicorn is missing, the key is not in the environment, the address
    is taken, or the model cannot be loaded.
    """
    starlette("applications")
    uvicorn = optional("uvicorn", "uvicorn", extra="serve", place="serve")
    key, listening = _key(config), _listen(config)
    with listening:
        service = _service(model, config, key)
        address = f"http://{_bracketed(config.host)}:{listening.getsockname()[1]}/v1"
        print(f"serving {service.name} at {address}", file=sys.stderr, flush=True)
        options = {"log_level": "warning", "timeout_graceful_shutdown": config.grace}
        server = uvicorn.Server(uvicorn.Config(make_app(service), **options))
        _until_stopped(server, listening)
    print("stopped", file=sys.stderr, flush=True)


def _until_stopped(server: Any, listening: socket.socket) -> None:
    """uvicorn raises the signal again that it has stopped for: here that is no failure."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _service(model: str, config: ServeConfig, key: str) -> Service:
    settings = GenerateConfig(batch_size=config.batch_size, dtype=config.dtype, mesh=config.mesh)
    engine, tokenizer, _ = load_engine(model, settings)
    engine.steps = config.steps
    engine.together = 1  # prompts come one by one: to fill them up to eight would keep everybody waiting
    engine.max_length = min(config.max_length or engine.max_length, engine.max_length)
    return Service(config.name or model, Worker(engine), Reader(tokenizer), key)


def _key(config: ServeConfig) -> str:
    if not config.api_key_env:
        if config.host not in _LOCAL:
            told = "anyone who reaches it may use it: set api_key_env to ask for a key"
            print(f"warning: {config.host} is open to other machines, {told}", file=sys.stderr)
        return ""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        remedy = f"export {config.api_key_env}=KEY, or leave api_key_env out"
        raise UserError(f"{config.api_key_env} is not in the environment", place="api_key_env", remedy=remedy)
    return key


def _listen(config: ServeConfig) -> socket.socket:
    """Before the model is loaded: an address that is taken is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        place, remedy = f"{config.host}:{config.port}", "name another with host=... or port=..."
        raise UserError(
            f"cannot listen there: {error.strerror or error}", place=place, remedy=remedy
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
