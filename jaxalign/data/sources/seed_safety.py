"""Safety pairs in three languages (github.com/BinFuPKU/LLM-Alignment): a good and a bad answer to each
question, under a taxonomy of 5 and 33 classes, with the verdicts of a panel of judges."""

from __future__ import annotations

from typing import Any

from jaxalign.data.preferences import PreferenceRecord, pair_record
from jaxalign.data.records import Message, RowError, as_text

LANGUAGES = ("zh", "tra", "en")


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has a question and both answers in the first language."""
    return {"Question_zh", "good_response_zh", "bad_response_zh"} <= row.keys()


def from_row(row: dict[str, Any], **fields: Any) -> list[PreferenceRecord | RowError]:
    """A pair for every language; `meta` holds the language, both classes, the difficulty (0 easy to 31) and
    the probabilities that each answer is safe. The languages of a row are one family."""
    name = str(row.get("ID") or row.get("QGB_MD5") or "")
    out: list[PreferenceRecord | RowError] = []
    meta = fields.pop("meta", {})
    for language in LANGUAGES:
        keys = [f"{what}_{language}" for what in ("Question", "good_response", "bad_response")]
        texts = [as_text(row.get(key), key) for key in keys]
        about = (
            meta
            | {
                "language": language,
                "L1": row.get("L1"),
                "L2": row.get("L2"),
                "difficulty": row.get(f"{language}_difficulty"),
                "safe": {
                    role: row.get(f"{key}_bert_safe_probs")
                    for role, key in (("chosen", keys[1]), ("rejected", keys[2]))
                },
            }
            | ({"id": f"{name}:{language}"} if name else {})
        )
        good, bad = ((Message("assistant", text),) for text in texts[1:])
        try:
            prompt = (Message("user", texts[0]),)
            out.append(pair_record(prompt, good, bad, family=name, meta=about, **fields))
        except RowError as reason:
            out.append(reason)
    return out
