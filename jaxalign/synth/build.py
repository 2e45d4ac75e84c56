"""A build from its name to its file: opens models, runs the builder, checks and writes what it made.

OUT.jsonl                  the records
OUT.build/                 what they were made of and how
  settings.json            what the build was begun with: another one must not go on with its stages
  STAGE.jsonl, STAGE.rejects.jsonl
  rejects.jsonl            records that no training method would take, with their reasons
  report.json, README.md, sample.html
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.files import find_files
from jaxalign.data.pieces import any_records
from jaxalign.data.prompt_formats import to_prompts
from jaxalign.data.readers import hub_name
from jaxalign.data.records import RowError, UnwantedRowError
from jaxalign.errors import UserError
from jaxalign.llm.base import LLM
from jaxalign.llm.open import open_llm
from jaxalign.registry import BUILDERS
from jaxalign.synth.base import BuildConfig, Builder, Built, Work
from jaxalign.synth.card import card
from jaxalign.synth.sample import sample_page
from jaxalign.synth.templates import Templates

# A row -> (records with the faults among them, format name). Raises `RowError`, `UnwantedRowError`.
Read = Callable[[Any], tuple[list[Any], str]]

# Keys that change no record: how fast something is worked out, and what the card says of it.
ASIDE = ("llm", "retries", "max_parse_fail", "license", "source_name")


def build(
    method: str, models: Mapping[str, str | LLM], data: Any, out: Path, config: BuildConfig
) -> dict[str, Any]:
    """Runs the builder `method` into the file `out`; its report. `models`: by role, names or LLMs.

    Raises `UserError` for bad input, for a stage with too many failures, and where `out` was begun with
    something else. The same call goes on with a build that was stopped.
    """
    builder: Builder = BUILDERS[method]
    folder = out.with_name(out.name.removesuffix(".jsonl") + ".build")
    templates = Templates(builder.templates or method, config.templates)
    templates.check()
    llms = _opened(builder, models, config, folder)
    about = {
        "method": method,
        "data": digests(inputs(data, config)),
        "models": {role: llm.identity for role, llm in llms.items()},
        "settings": {k: v for k, v in config.model_dump(mode="json").items() if k not in ASIDE},
    }
    _begin(folder, about)
    work = Work(data, config, folder, llms, templates, _say)
    built = builder.run(work)
    read: Read = to_prompts if builder.prompts else any_records
    rows, faults = checked(built.rows, read)
    report = _report(method, work, built, rows, faults)
    _write_rows(folder / "rejects.jsonl", [{"reason": r, "row": dict(row)} for r, row in faults])
    for name, extra in built.beside.items():
        _write_rows(folder / name, extra)
    _write(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write_rows(out, rows)
    _write(folder / "README.md", card(report, about, config, out))
    _write(folder / "sample.html", sample_page(rows, out.name, method, config.seed, read))
    _say(f"{len(rows)} records: {out}")
    return report


def _opened(
    builder: Builder, models: Mapping[str, str | LLM], config: BuildConfig, folder: Path
) -> dict[str, LLM]:
    """The LLMs by role; one that has two roles is opened once."""
    if not builder.asks(config):
        return {}
    given = models.get("model")
    found = {"model": given} if builder.model else {}
    found |= {role: models.get(role) or getattr(config, role) or given for role in builder.roles}
    wanted = {role: name for role, name in found.items() if name is not None}
    if len(wanted) < len(found):
        raise UserError("no model is named", place="-m MODEL", remedy="name what is to answer")
    opened: dict[Any, LLM] = {}
    for name in wanted.values():
        if isinstance(name, str) and name not in opened:
            opened[name] = open_llm(name, config.llm, folder / "cache.sqlite")
    return {role: opened[name] if isinstance(name, str) else name for role, name in wanted.items()}


def inputs(data: Any, config: BuildConfig) -> list[str | Path]:
    """What -d names, one by one, and what keys such as `seed_data` do."""
    named = [] if data is None else [data] if isinstance(data, str | Path) else list(data)
    keyed = (getattr(config, key) for key in type(config).model_fields if key.endswith("_data"))
    return [*named, *(name for name in keyed if name)]


def digests(names: Sequence[str | Path]) -> dict[str, str]:
    """What the data is: files by their hash, wherever they lie, hub data sets by their name. A second file of
    the same name is `NAME (2)`."""
    found: dict[str, str] = {}
    for name in names:
        if hub_name(str(name)):
            found[str(name)] = "hub"
            continue
        for file in find_files(Path(name).expanduser()):
            same = sum(key == file.name or key.startswith(f"{file.name} (") for key in found)
            key = f"{file.name} ({same + 1})" if same else file.name
            found[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _begin(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuses to go on with stages of something else."""
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{key}: {_gap(before.get(key), about[key])}" for key in about if before.get(key) != about[key]
        ]
        if changed:
            raise UserError(
                f"it was begun with something else: {'; '.join(changed)}",
                place=str(folder),
                remedy="write to another file, or delete the folder to begin again",
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _gap(before: Any, now: Any) -> str:
    """What differs between two settings, in words."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before!r} -> {now!r}"
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return ", ".join(f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in keys)


def checked(
    rows: Sequence[Mapping[str, Any]], read: Read = any_records
) -> tuple[list[Mapping[str, Any]], list[tuple[str, Mapping[str, Any]]]]:
    """Rows that `read` makes something of, as training does, and (reason, row) of the others."""
    good, faults = [], []
    for row in rows:
        reason = _fault(row, read)
        if reason:
            faults.append((reason, row))
        else:
            good.append(row)
    return good, faults


def _fault(row: Mapping[str, Any], read: Read) -> str:
    """Why a record cannot be used, or ""."""
    try:
        parts, _ = read(dict(row))
    except (RowError, UnwantedRowError) as reason:
        return str(reason)
    reasons = [str(part) for part in parts if isinstance(part, RowError | UnwantedRowError)]
    return reasons[0] if reasons and len(reasons) == len(parts) else ""  # of many, some may be of no use


def _report(
    method: str, work: Work, built: Built, rows: Sequence[Any], faults: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """What came of it. Nothing in it depends on how often the build was stopped."""
    stages = {
        name: {
            "items": len(done.values) + sum(done.rejects.values()),
            "understood": len(done.values),
            "rejects": done.rejects,
            "attempts": done.attempts,
            "parse_failure_rate": done.parse_failure_rate,
            "prompt_tokens": done.prompt_tokens,
            "tokens": done.tokens,
        }
        for name, done in work.outcomes.items()
    }
    return {
        "method": method,
        "n_in": work.counts["in"],
        "n_out": len(rows),
        "dropped": {reason: count for reason, count in built.dropped.items() if count},
        "rejects": dict(Counter(reason for reason, _ in faults)),
        "stages": stages,
        "models": {role: {"name": llm.name, "identity": llm.identity} for role, llm in work.llms.items()},
        "templates": dict(sorted(work.templates.used.items())),
        "seed": work.config.seed,
        "metrics": dict(built.metrics),
    }


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
