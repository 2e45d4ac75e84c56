"""FFT (arXiv:2311.18580): questions on factuality, fairness and toxicity, as its repository holds them.

`joined` adds to every row `part`, `task`, `file`, `case` (its number in the file, from 0) and an id. Part and
task show in the row itself, but not in the files on fairness: these differ in their names alone,
GROUP_TASK_IDENTITY and GROUP_Identity_Preference, and get `group`, `identity` and `gold`, or `identities`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from jaxalign.data.files import Rows
from jaxalign.data.records import Mended, RowError

Row = dict[str, Any]

KEYS = "query, and statement|ground_label|state"
GROUPS = ("gender", "race", "religion")
# What the files on decisions call an identity, and those on preferences.
ALIASES = {"african indian": "american indian"}

# task -> {ground_label: what is to be answered}. Credit, Low and no disease stand so in the prompts' own
# examples; High and the grades of a disease are read as their opposites.
GOLD = {
    "credit": {"1": 1, "2": 0},
    "criminal": {"Low": 0, "High": 1},
    "disease": {"0": 0, "1": 1, "2": 1, "3": 1, "4": 1},
}

_YES_NO = re.compile(r"\byes\b.*\bno\b", re.IGNORECASE | re.DOTALL)


def joined(rows: Rows) -> Rows:
    """The rows, those of FFT with what their file and their keys say of them."""
    seen: Counter[str] = Counter()
    for place, row in rows:
        file = place.rpartition(":")[0]
        if isinstance(row, Mended):
            yield place, row
            continue
        case = seen[file]
        seen[file] += 1
        try:
            yield place, _described(row, Path(file).name.split(".")[0], case)
        except RowError as reason:
            yield place, reason


def _described(row: Any, file: str, case: int) -> Any:
    """The row with what is known of it; a row of another set as it is."""
    kind = None if isinstance(row, dict) and is_case(row) else _kind(row)
    if kind is None:
        return row
    part, task = kind
    about: Row = {"id": f"{file}:{case}", "part": part, "task": task, "file": file, "case": case}
    if task == "decision":
        about |= _decision(row, file)
    elif task == "preference":
        about |= _preference(row, file)
    return about | row


def _kind(row: Any) -> tuple[str, str] | None:
    """(part, task) by the row's keys, or None for a row of another set."""
    query = row.get("query") if isinstance(row, dict) else None
    if not isinstance(query, str):
        return None
    if {"Class", "Sub-class", "statement"} <= row.keys():
        return "factuality", "counterfact"
    if {"type", "statement"} <= row.keys():
        return "factuality", "yes_no" if _YES_NO.search(query) else "open"
    if {"key", "ground_label"} <= row.keys():
        return "fairness", "decision"
    if "state" in row and "[MASK]" in str(row["state"]):
        return "fairness", "preference"
    return ("toxicity", "toxicity") if row.keys() == {"query"} and "unaligned" in query.lower() else None


def named(identity: str) -> str:
    """One spelling of an identity: lower case, under one name."""
    return ALIASES.get(identity.strip().lower(), identity.strip().lower())


def _decision(row: Row, file: str) -> Row:
    """Group, task, identity and answer of a decision. Raises `RowError`."""
    found = re.fullmatch(r"([A-Za-z]+)_([A-Za-z]+)_(.+)", file)
    group, task = (found[1].lower(), found[2].lower()) if found else ("", "")
    if found is None or group not in GROUPS or task not in GOLD:
        raise RowError("the file's name does not say group, task and identity (as Gender_Credit_female does)")
    identity = named(found[3])
    if named(str(row["key"])) != identity:
        raise RowError("key is not the identity in the file's name")
    label = str(row["ground_label"])
    if label not in GOLD[task]:
        raise RowError(f"unknown ground_label {label!r:.20} of {task}")
    return {"task": task, "group": group, "identity": identity, "gold": GOLD[task][label]}


def _preference(row: Row, file: str) -> Row:
    """Group and identities of a sentence with a blank. Raises `RowError`."""
    group = file.lower().removesuffix("_identity_preference")
    if group not in GROUPS:
        raise RowError("the file's name does not say the group (as Gender_Identity_Preference does)")
    listed = re.search(r"\[('[^\]]*')\]", row["query"])
    if listed is None:
        raise RowError("no list of identities in the query")
    return {"group": group, "identities": [named(name) for name in re.findall(r"'([^']*)'", listed[1])]}


def is_case(row: Row) -> bool:
    """Whether `joined` has found the row to be one of FFT."""
    return {"query", "part", "task", "file", "case"} <= row.keys()
