"""Builders run over scripts, in a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxalign import api
from jaxalign.llm.scripted import Scorer, Script, ScriptedLLM


def write_prompts(path: Path, texts: list[str]) -> Path:
    """A file of single questions."""
    rows = [{"id": f"q{i}", "messages": [{"role": "user", "content": t}]} for i, t in enumerate(texts)]
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(
    folder: Path, method: str, data: Any, script: Script, scorer: Scorer | None = None, **keys: Any
) -> tuple[list[Any], dict[str, Any], ScriptedLLM]:
    """(rows, report, the script that was asked) of one build; `models` in `keys` are those by role."""
    llm = ScriptedLLM(script, scorer)
    out = folder / "out.jsonl"
    report = api.build(method, llm, data, out, **keys)
    return read_rows(out), report, llm
