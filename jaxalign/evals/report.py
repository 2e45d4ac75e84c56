"""The before-and-after report: one self-contained HTML page, and its data as JSON beside it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxalign.evals.base import TEMPLATES
from jaxalign.pages.charts import Chart, Series, line_chart
from jaxalign.pages.page import environment, write_files

STATUSES = {"fixed": "fixed", "broke": "broke", "failing": "still failing", "kept": "passed both"}
_STATUS = {(False, True): "fixed", (True, False): "broke", (False, False): "failing", (True, True): "kept"}


def write_report(folder: str | Path, data: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into `folder` and return the path of the page.

    `data` is JSON with these keys; all but those marked ? are required, and a missing one is a `KeyError` or
    jinja2's `UndefinedError`:

        title, summary, model, created           strings
        style      {name, about, labels [str], example, rules {name: what it asks}}
        measures   [{name, about, before: Rate, after: Rate, paired: Paired}]  the first one is the headline
        preferences  {about, measures}: of the second training, `before` is the first one's result
        items      [{id, topic, question, reference, before, after, preferred}]
                   the last three are {text, passed, failed [rule names], fact: true | false}
        metrics    [{step, loss?, eval_loss?, learning_rate?, tokens_per_sec?}]  rows of metrics.jsonl
        config, versions, machine                {name: value}
        phases     [{name, seconds}]
        commands   [{about, command}]
        notes      [str]

    Rate and Paired are `to_json()` of the classes in `jaxalign.stats`. The page loads nothing: its
    style, script and charts are in it, and every text is escaped.
    """
    page = render(data)
    return write_files(Path(folder), data, page)


def render(data: Mapping[str, Any]) -> str:
    """The page as text; `data` as in `write_report`."""
    env = environment(TEMPLATES)
    env.filters.update(labelled=labelled)
    items = [_item(item) for item in data["items"]]
    counts = Counter(item["status"] for item in items)
    return env.get_template("report.html").render(
        {**data, "items": items},
        statuses={name: (text, counts[name]) for name, text in STATUSES.items()},
        charts=charts(data["metrics"]),
        total_seconds=sum(phase["seconds"] for phase in data["phases"]),
        flat_config=dict(_flat(data["config"])),
    )


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Loss, learning rate and speed over the steps of `metrics`; a chart without numbers has no lines."""

    def points_of(name: str) -> list[tuple[float, float | None]]:
        return [(row["step"], row[name]) for row in metrics if name in row]

    return [
        line_chart(
            "Loss",
            [
                Series("training", "train", points_of("loss")),
                Series("held out", "eval", points_of("eval_loss"), dots=True),
            ],
        ),
        line_chart("Learning rate", [Series("at the end", "train", points_of("learning_rate"))], zero=True),
        line_chart(
            "Tokens per second", [Series("at the end", "train", points_of("tokens_per_sec"))], zero=True
        ),
    ]


def word_diff(before: str, after: str) -> list[tuple[str, str]]:
    """How to turn `before` into `after`: ("same" | "del" | "ins", text) runs; white space goes with its word.

    A common run without any word of four letters or more, between two changes, counts as changed: a diff that
    hangs on every `the` cannot be read.
    """
    first, second = (re.findall(r"\S+\s+", f"{text} ") for text in (before, after))
    matcher = difflib.SequenceMatcher(
        None, [w.strip() for w in first], [w.strip() for w in second], autojunk=False
    )
    edits: list[tuple[str, str]] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        old, new = first[i:j], second[k:m]
        inside = min(i, k) > 0 and j < len(first) and m < len(second)
        if tag == "equal" and not (inside and max(len(word.strip()) for word in new) < 4):
            edits.append(("same", "".join(new)))
        else:
            edits += [("del", "".join(old)), ("ins", "".join(new))]
    return list(_joined(edits))


def _joined(edits: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Between two runs of `same`, all deletions in one run and all insertions in the next."""
    for same, group in groupby(edits, key=lambda edit: edit[0] == "same"):
        runs = list(group)
        for tag in ["same"] if same else ["del", "ins"]:
            text = "".join(part for name, part in runs if name == tag)
            if text:
                yield tag, text


def labelled(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    """The lines of `text` as (label, rest): the label and its colon where the line opens with one."""
    lines = []
    for line in text.split("\n"):
        label = next((f"{name}:" for name in labels if line.startswith(f"{name}:")), "")
        lines.append((label, line[len(label) :]))
    return lines


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    before, after = item["before"], item["after"]
    status = _STATUS[bool(before["passed"]), bool(after["passed"])]
    return {**item, "status": status, "diff": word_diff(before["text"], after["text"])}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
