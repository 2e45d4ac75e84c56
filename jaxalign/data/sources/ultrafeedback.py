"""UltraFeedback (arXiv:2310.01377): answers of several models to an instruction, judged in four aspects."""

from __future__ import annotations

from typing import Any

from jaxalign.data.preferences import ScoredRecord, as_number, scored_record
from jaxalign.data.records import RowError, is_turns, other_keys, replied, said, structured

KEYS = "instruction + completions: [{response, ...}]"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has an instruction and answers that are objects."""
    given = structured(row.get("completions"))
    return "instruction" in row and is_turns(given) and any("response" in c for c in given)


def from_row(row: dict[str, Any], **fields: Any) -> ScoredRecord:
    """An answer's score is the mean of its ratings ("N/A" left out), else `overall_score`; `meta` has the
    ratings as `aspects`, the `models`, and what else the row says."""
    given = structured(row["completions"])
    rated = [_ratings(c) for c in given]
    scores = [
        sum(r.values()) / len(r) if r else c.get("overall_score") for c, r in zip(given, rated, strict=True)
    ]
    names = sorted({name for ratings in rated for name in ratings})
    meta = fields.pop("meta", {}) | other_keys(row, "instruction", "completions", "models", "source")
    meta |= {"aspects": {n: [r.get(n) for r in rated] for n in names}}
    models = [c.get("model") for c in given]
    meta |= {"models": models} if any(models) else {}
    meta |= {"set": row["source"]} if row.get("source") else {}
    try:
        answers = tuple(replied(c, "response") for c in given)
    except RowError:
        raise RowError("an answer without a response") from None
    return scored_record((said(row, "instruction"),), answers, scores, meta=meta, **fields)


def _ratings(completion: dict[str, Any]) -> dict[str, float]:
    """{aspect: rating} of one judged answer."""
    found = completion.get("annotations") or {}
    ratings = {name: aspect.get("Rating") for name, aspect in found.items() if isinstance(aspect, dict)}
    return {n: as_number(r, f"the {n} rating") for n, r in ratings.items() if r not in (None, "N/A")}
