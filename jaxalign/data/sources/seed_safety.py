"""Safety pairs in three languages (github.com/BinFuPKU/LLM-Alignment): a good and a bad answer to each
question, under a taxonomy of 5 and 33 classes, with the verdicts of a panel of judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.data.preferences import PreferenceRecord, pair_record
from jaxalign.data.records import Message, RowError, as_text

LANGUAGES = ("zh", "tra", "en")
WEIGHTS = {"4B": 1, "7B": 2, "14B": 4, "14B_4K": 8, "72B": 16}  # of the panel's judges in the difficulty
RIGHT = "1\n2"  # a judge that names the good answer, shown first and then second


def difficulty_mask(panel: Mapping[str, Any], weights: Mapping[str, int] = WEIGHTS) -> int:
    """Sum of the weights of the judges that did not find the good answer in both orders; 0 is easy.

    panel    {judge: what it said in the two orders, "1\\n2" where both are right}; anything else is wrong
    weights  {judge: weight}; powers of two make the sum a bit mask

    Raises `RowError` for a judge that is not on the panel.
    """
    for judge in weights:
        if panel.get(judge) is None:
            raise RowError(f"no verdict of judge {judge}")
    return sum(weight for judge, weight in weights.items() if str(panel[judge]).strip() != RIGHT)


def panel_of(row: Mapping[str, Any], language: str) -> dict[str, Any]:
    """{judge: verdict} of a row's answers in one language; judges without a verdict are left out."""
    found = {judge: row.get(f"QWEN15_{judge}_choice_{language}") for judge in WEIGHTS}
    return {judge: verdict for judge, verdict in found.items() if verdict is not None}


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has a question and both answers in the first language."""
    return {"Question_zh", "good_response_zh", "bad_response_zh"} <= row.keys()


def from_row(row: dict[str, Any], **fields: Any) -> list[PreferenceRecord | RowError]:
    """A pair for every language; `meta` holds the language, both classes, the difficulty (0 easy to 31), the
    panel's verdicts, the probabilities that each answer is safe and what kinds of answers they are. The
    languages of a row are one family."""
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
                "panel": panel_of(row, language),
                "type": row.get("type"),
                "chosen_type": row.get("pos_type"),
                "rejected_type": row.get("neg_type"),
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
