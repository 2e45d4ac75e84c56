"""An LLM from the word that names it."""

from __future__ import annotations

from pathlib import Path

from jaxalign.llm.base import LLM
from jaxalign.llm.settings import LLMConfig


def open_llm(name: str, config: LLMConfig, cache: Path | None = None) -> LLM:
    """`http(s)://host/v1#model` is an endpoint, anything else a model on this machine. What an endpoint has
    answered is kept in the file `cache`, so that nothing is paid for twice.

    Raises `UserError` where it cannot be opened.
    """
    if name.startswith(("http://", "https://")):
        from jaxalign.llm.cache import Cached
        from jaxalign.llm.http import open_http

        endpoint = open_http(name, config.http)
        return endpoint if cache is None else Cached(endpoint, cache)
    from jaxalign.llm.local import load_local

    return load_local(name, config)
