"""The card of a data set: a README.md with the front matter that the hub reads, then counts and provenance.

It is a function of the build alone: it says nothing of the time, nor of how often the build was stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxalign.synth.base import BuildConfig

# The hub's names of sizes, each with the number of records below which it holds.
SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)


def card(report: Mapping[str, Any], about: Mapping[str, Any], config: BuildConfig, out: Path) -> str:
    """The card of the records in the file `out`, which is written already. `report` and `about` are those of
    the build: report.json and settings.json."""
    name = out.name.removesuffix(".jsonl")
    command = f"jaxalign build {report['method']}"
    parts = [
        f"---\n{yaml.safe_dump(_front(report, config, out), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(name)}",
        f"{report['n_out']} records in `{out.name}`, made by `{command}`; `sample.html` shows some.",
        "## Counts",
        _counts(report),
        "## Provenance",
        _provenance(report, about, config),
        *(["## Stages", _stages(report["stages"])] if report["stages"] else []),
        "## Metrics",
        _json(report["metrics"]),
        "## Settings",
        _json(about["settings"]),
    ]
    return "\n\n".join(parts) + "\n"


def _front(report: Mapping[str, Any], config: BuildConfig, out: Path) -> dict[str, Any]:
    """What the hub reads once both files lie side by side: https://huggingface.co/docs/hub/datasets-cards"""
    count = report["n_out"]
    split = {"name": "train", "num_bytes": out.stat().st_size, "num_examples": count}
    return {
        "license": config.license,
        "pretty_name": out.name.removesuffix(".jsonl"),
        "size_categories": [next((size for limit, size in SIZES if count < limit), "n>1B")],
        **({"source_datasets": [config.source_name]} if config.source_name else {}),
        "tags": ["jaxalign", report["method"]],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": out.name}]}],
        "dataset_info": {"splits": [split]},
    }


def _counts(report: Mapping[str, Any]) -> str:
    left_out = [
        *((f"dropped: {reason}", n) for reason, n in report["dropped"].items()),
        *((f"rejected: {reason}", n) for reason, n in report["rejects"].items()),
    ]
    rows = [("items read", report["n_in"]), *left_out, ("records written", report["n_out"])]
    return _table(("what", "count"), rows)


def _provenance(report: Mapping[str, Any], about: Mapping[str, Any], config: BuildConfig) -> str:
    tables = [
        (("input", "sha256"), about["data"].items()),
        (("model", "name", "identity"), [(r, m["name"], m["identity"]) for r, m in report["models"].items()]),
        (("template", "sha256, first digits"), report["templates"].items()),
    ]
    lines = [
        f"- source: {_plain(config.source_name) or 'not named'}",
        f"- licence: {_plain(config.license)}",
        f"- seed: {report['seed']}",
    ]
    return "\n\n".join(["\n".join(lines), *(_table(head, list(rows)) for head, rows in tables if rows)])


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """What was asked, and what of it could be used."""
    rows = [
        (
            name,
            done["items"],
            done["understood"],
            "; ".join(f"{n} x {reason}" for reason, n in done["rejects"].items()) or "none",
            f"{100 * done['parse_failure_rate']:.1f} %",
            done["prompt_tokens"],
            done["tokens"],
        )
        for name, done in stages.items()
    ]
    head = ("stage", "items", "understood", "rejects", "parse failures", "prompt tokens", "tokens")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Text in which nothing is markup and nothing ends a line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(str(value).split()))


def _json(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}json\n{text}\n{fence}"
