"""What a set of weight files holds, as one hash: how a checkpoint or an adapter recognises its base model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def cache_folder() -> Path:
    """`JAXALIGN_CACHE`, or `~/.cache/jaxalign`."""
    return Path(os.environ.get("JAXALIGN_CACHE") or Path.home() / ".cache" / "jaxalign").expanduser()


def content_hash(files: Sequence[Path]) -> str:
    """sha256 over the sha256 of every file's bytes, in the given order; 64 hex digits.

    All bytes count. A file's hash is remembered in the cache folder under its path, size and modification
    time, so a large model is read once and not again.
    """
    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
        digests = list(pool.map(_file_hash, files))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def adapter_hash(folder: Path | None) -> str:
    """`content_hash` of an adapter's configuration and weights; "" where there is no adapter."""
    files = sorted(folder.glob("adapter_*")) if folder else []
    return content_hash(files) if files else ""


def _file_hash(file: Path) -> str:
    file = file.resolve()
    status = file.stat()
    key = {"path": str(file), "size": status.st_size, "modified": status.st_mtime_ns}
    name = hashlib.sha256(str(file).encode()).hexdigest()[:32]
    note = cache_folder() / "hashes" / f"{name}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or the note is unreadable: hash the file itself
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _remember(note, json.dumps({"key": key, "sha256": digest}))
    return digest


def _remember(note: Path, text: str) -> None:
    """Write whole or not at all; a cache that cannot be written only costs time."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, note)
    except OSError:
        return
