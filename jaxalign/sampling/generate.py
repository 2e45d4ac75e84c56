"""Answers to a file of prompts, row by row as they finish, and again from where it stopped."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxalign.data.chat import Tokenizer
from jaxalign.data.readers import read_prompts
from jaxalign.data.records import Message, Prompt
from jaxalign.errors import UserError
from jaxalign.progress import Meter
from jaxalign.sampling.engine import Engine, Sample
from jaxalign.sampling.load import load_engine
from jaxalign.sampling.settings import GenerateConfig


@dataclass(frozen=True)
class GenerateReport:
    """What became of the rows of one file. `rejects` counts unanswered rows by reason."""

    rows: int
    answered: int
    resumed: int
    rejects: dict[str, int]
    tokens: int
    seconds: float


def generate(model: str, data: str | Path, out: Path, config: GenerateConfig) -> GenerateReport:
    """Answer every row of `data` into the JSONL file `out`.

    A row keeps all its keys and gets `completion` (the first answer's text) and `completions`, each with
    `text`, `tokens`, `finish` and `logp`, the answer's log-probability in nats. Rows are appended as they
    finish and put into the order of `data` at the end. Rows that `out` holds already are skipped.

    Raises `UserError` for bad input, or when `out` was begun with another model or other settings.
    """
    prompts, report = read_prompts(data)
    for line in report.lines():
        _say(line)
    found = answer_file(model, prompts, out, config)
    unread = {reason: n[0] for reason, n in report.rejects.items()}
    return replace(found, rejects={**unread, **found.rejects})


def answer_file(
    model: str, prompts: Sequence[Prompt], out: Path, config: GenerateConfig, *, ids: bool = False
) -> GenerateReport:
    """`generate` for prompts that were read already. A file that holds all answers needs no model. `ids` adds
    the token ids of every completion, for whoever needs the very tokens: text may be cut into others."""
    about = {"model": model, **config.model_dump(mode="json"), **({"ids": True} if ids else {})}
    _check_same(out, about)
    done = _finished(out)
    if all(prompt.id in done for prompt in prompts):
        return GenerateReport(len(prompts), 0, len(done), {}, 0, 0.0)
    engine, tokenizer, base_hash = load_engine(model, config)
    _check_same(out, about | {"sha256": base_hash})
    _remember(out, about | {"sha256": base_hash})
    todo, rejects = _encode(engine, tokenizer, [p for p in prompts if p.id not in done], config)
    start, tokens = time.monotonic(), 0
    with out.open("a", encoding="utf-8") as file, Meter(len(todo), "answering") as meter:
        for prompt, samples in _answers(engine, todo, config):
            file.write(json.dumps(_row(prompt, samples, ids), ensure_ascii=False) + "\n")
            file.flush()
            count = sum(len(s.tokens) for s in samples)
            tokens += count
            meter.add(count)
    _sort(out, [p.id for p in prompts])
    seconds = time.monotonic() - start
    found = GenerateReport(len(prompts), len(todo), len(done), rejects, tokens, seconds)
    _say(_summary(found, out))
    return found


def answer_questions(
    model: str, questions: Sequence[str], *, temperature: float = 0.0, max_tokens: int = 256
) -> list[str]:
    """One answer to each single user turn, in their order."""
    config = GenerateConfig(temperature=temperature, max_tokens=max_tokens)
    engine, tokenizer, _ = load_engine(model, config)
    prompts = [tokenizer.encode_prompt((Message("user", question),)) for question in questions]
    return [samples[0].text for samples in engine.generate(prompts, config.params())]


def _encode(
    engine: Engine, tokenizer: Tokenizer, prompts: list[Prompt], config: GenerateConfig
) -> tuple[list[tuple[Prompt, list[int]]], dict[str, int]]:
    """Prompts with their tokens; those that leave no room for an answer are counted and shown."""
    found, rejects = [], {}
    room = engine.max_length - config.max_tokens
    for prompt in prompts:
        text = prompt.text if prompt.messages is None else prompt.messages
        assert text is not None, "a prompt has messages or text"
        tokens = tokenizer.encode_prompt(text)
        if len(tokens) > room:
            reason = f"longer than {room} tokens"
            rejects[reason] = rejects.get(reason, 0) + 1
            _say(f"{prompt.place}: {len(tokens)} tokens, {reason}: not answered")
        else:
            found.append((prompt, tokens))
    return found, rejects


def _answers(
    engine: Engine, todo: list[tuple[Prompt, list[int]]], config: GenerateConfig
) -> Iterator[tuple[Prompt, list[Sample]]]:
    """(prompt, its n samples) as soon as the last of them is there."""
    params = [config.params(zlib.crc32(prompt.id.encode())) for prompt, _ in todo]
    parts: dict[int, dict[int, Sample]] = {}
    for request, index, sample in engine.stream([tokens for _, tokens in todo], params):
        part = parts.setdefault(request, {})
        part[index] = sample
        if len(part) == config.n:
            del parts[request]
            yield todo[request][0], [part[i] for i in range(config.n)]


def _row(prompt: Prompt, samples: list[Sample], ids: bool) -> dict[str, Any]:
    completions = [
        {"text": s.text, "tokens": len(s.tokens), "finish": s.finish, "logp": round(float(s.logp.sum()), 4)}
        for s in samples
    ]
    if ids:
        completions = [{**row, "ids": s.tokens.tolist()} for row, s in zip(completions, samples, strict=True)]
    return {**prompt.row, "id": prompt.id, "completion": samples[0].text, "completions": completions}


def _settings_of(out: Path) -> Path:
    return out.with_name(out.name + ".settings.json")


def _check_same(out: Path, about: dict[str, Any]) -> None:
    """Refuses to go on with something else than `out` was made with."""
    place = _settings_of(out)
    if out.exists() and place.exists():
        before = json.loads(place.read_text(encoding="utf-8"))
        ignored = {"batch_size", "mesh"}
        changed = [k for k in about if k not in ignored and before.get(k) != about[k]]
        if changed:
            told = ", ".join(f"{k} {before.get(k)!r} -> {about[k]!r}" for k in changed)
            remedy = "write to another file, or delete this one to begin again"
            raise UserError(f"it was begun with other settings: {told}", place=str(out), remedy=remedy)
    elif out.exists() and out.stat().st_size:
        raise UserError("the file exists and was not made by generate", place=str(out), remedy="name another")


def _remember(out: Path, about: dict[str, Any]) -> None:
    """Notes beside `out` what it is made with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _settings_of(out).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _finished(out: Path) -> set[str]:
    """Ids that the file holds. A last line that a killed run left half written is cut off."""
    if not out.exists():
        return set()
    blob = out.read_bytes()
    whole = blob.rfind(b"\n") + 1
    if whole < len(blob):
        os.truncate(out, whole)
    return {json.loads(line)["id"] for line in blob[:whole].splitlines()}


def _sort(out: Path, order: list[str]) -> None:
    """Put the rows into the order of the input, at once or not at all."""
    place = {name: i for i, name in enumerate(order)}
    lines = out.read_text(encoding="utf-8").splitlines()
    lines.sort(key=lambda line: place.get(json.loads(line)["id"], len(place)))
    beside = out.with_name(out.name + ".part")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(out)


def _summary(r: GenerateReport, out: Path) -> str:
    rate = f", {r.tokens / r.seconds:.0f} tokens/s" if r.answered else ""
    resumed = f", {r.resumed} were there already" if r.resumed else ""
    dropped = "".join(f", {n} not answered: {reason}" for reason, n in r.rejects.items())
    return f"{r.answered} of {r.rows} rows answered{resumed}{dropped}{rate}: {out}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
