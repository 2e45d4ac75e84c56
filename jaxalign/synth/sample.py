"""A page of records to look at: some of them, drawn by the seed, to search and to filter."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.pieces import Exchange, any_records, exchange, noted
from jaxalign.data.preferences import Text
from jaxalign.data.records import RowError, UnwantedRowError
from jaxalign.pages.page import environment

TEMPLATES = Path(__file__).parent / "page"
SHOWN = 200  # records of a page
SHOWN_OF_A_ROW = 4  # of a row that holds many, such as a tree
TONES = {"chosen": "good", "wanted": "good", "rejected": "bad", "unwanted": "bad"}
BY = ("source", "method")  # what the page filters by


def sample_page(
    rows: Sequence[Mapping[str, Any]], name: str, method: str, seed: int, read: Any = any_records
) -> str:
    """The page, a function of the rows and the seed; it loads nothing and escapes every text. `read` makes
    records of a row."""
    shown = [_shown(i, dict(rows[i]), read) for i in drawn(len(rows), seed)]
    choices = {key: sorted(Counter(each[key] for each in shown).items()) for key in BY}
    values = {"name": name, "method": method, "seed": seed, "total": len(rows)}
    page = environment(TEMPLATES).get_template("sample.html")
    return page.render(**values, records=shown, choices=choices) + "\n"


def drawn(count: int, seed: int, most: int = SHOWN) -> list[int]:
    """Indices of at most so many of `count` rows, in their order."""
    return sorted(random.Random(seed).sample(range(count), min(count, most)))


def _shown(index: int, row: dict[str, Any], read: Any) -> dict[str, Any]:
    parts, kind = read(row)
    records = [part for part in parts if not isinstance(part, RowError | UnwantedRowError)]
    meta = row.get("meta")
    values = meta if isinstance(meta, dict) else {}
    return {
        "number": index + 1,
        "id": row.get("id"),
        "kind": kind,
        "exchanges": [_texts(exchange(record)) for record in records[:SHOWN_OF_A_ROW]],
        "more": max(0, len(records) - SHOWN_OF_A_ROW),
        "meta": {key: value if isinstance(value, str) else _json(value) for key, value in values.items()},
        **{key: noted(row, key) or "" for key in BY},
    }


def _texts(found: Exchange) -> dict[str, Any]:
    answers = [
        {
            "role": answer.role,
            "tone": TONES.get(answer.role, "plain"),
            "score": None if answer.score is None else f"{answer.score:g}",
            "turns": _turns(answer.content, ""),
        }
        for answer in found.answers
    ]
    return {"prompt": [turn for turn in _turns(found.prompt, "text") if turn["text"]], "answers": answers}


def _turns(content: Text, plain: str) -> list[dict[str, str]]:
    """Turns with who says them; of one answer alone that needs no word."""
    if isinstance(content, str):
        return [{"who": plain, "text": content}]
    alone = not plain and len(content) == 1
    return [{"who": "" if alone else turn.role, "text": turn.content} for turn in content]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
