"""Worker that finds a model by the name a user would type, with the package's own `resolve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.protocol import Channel
from jaxalign.models.source import resolve


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Answers the setup with the path of `job["model"]`: its `.gguf`, or its folder."""
    found = resolve(job["model"])
    channel.reply(path=str((found.gguf or found.folder).resolve()))
    channel.receive()
