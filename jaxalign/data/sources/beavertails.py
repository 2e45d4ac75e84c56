"""BeaverTails and PKU-SafeRLHF (arXiv:2307.04657, 2406.15513): prompts and answers under 14 kinds of harm.

Rows are prompts to evaluate with, answers with a label and their kinds of harm, or pairs with two choices:
the more helpful and the safer answer.
"""

from __future__ import annotations

from typing import Any

from jaxalign.data.preferences import BinaryRecord, PreferenceRecord, as_label, binary_record, pair_record
from jaxalign.data.records import (
    Message,
    RowError,
    SFTRecord,
    UnwantedRowError,
    chat_record,
    other_keys,
    replied,
    said,
    structured,
)

Row = dict[str, Any]

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)

PROMPT_KEYS = "prompt + category + category_id"
ANSWER_KEYS = "prompt + response + category: {name: bool} + is_safe"
PAIR_KEYS = "prompt + response_0 + response_1 + better_response_id + safer_response_id"


def is_prompt(row: Row) -> bool:
    """Whether the row is a prompt of the evaluation set: of its categories, or with its very keys."""
    named = isinstance(row.get("category"), str) and row["category"] in CATEGORIES
    return "response" not in row and (
        row.keys() == {"prompt", "category", "category_id"} or (named and "prompt" in row)
    )


def question(row: Row) -> Message:
    """The prompt of an evaluation row. Raises `RowError` where its category and its number differ."""
    name, number = row["category"], row.get("category_id")
    if not isinstance(name, str) or name not in CATEGORIES:
        raise RowError(f"unknown category {name!r:.60}")
    if number is not None and str(number) != str(CATEGORIES.index(name)):
        raise RowError(f"category_id is {number!r:.20}, and {name} is {CATEGORIES.index(name)}")
    return said(row, "prompt")


def is_answer(row: Row) -> bool:
    """Whether the row is an answer with its kinds of harm."""
    keys = {"prompt", "response", "category", "is_safe"} <= row.keys()
    return keys and isinstance(structured(row["category"]), dict)


def from_answer(row: Row, **fields: Any) -> BinaryRecord:
    """An answer that is wanted where it is safe; `meta` has the kinds of harm it falls under as `categories`.

    Raises `RowError` for unknown kinds, and for an answer that is called safe and falls under one.
    """
    flags = structured(row["category"])
    unknown = sorted(set(flags) - set(CATEGORIES))
    if unknown:
        raise RowError(f"unknown category {unknown[0]!r:.60}")
    found = [name for name in CATEGORIES if as_label(flags.get(name, False))]
    safe = as_label(row["is_safe"])
    if safe and found:
        raise RowError("is_safe is true, and a category is flagged")
    meta = fields.pop("meta", {}) | other_keys(row, "prompt", "response", "category", "is_safe")
    prompt, answer = (said(row, "prompt"),), replied(row, "response")
    return binary_record(prompt, answer, safe, meta=meta | {"categories": found}, **fields)


def is_pair(row: Row) -> bool:
    """Whether the row has two answers and says which is better and which is safer."""
    return {"response_0", "response_1", "better_response_id", "safer_response_id"} <= row.keys()


def from_pair(row: Row, **fields: Any) -> list[PreferenceRecord | RowError]:
    """One pair for `better_response_id` (aspect helpful), one for `safer_response_id` (aspect harmless).

    `meta` says of both answers whether they are safe and, where the row does, how severe the harm is.
    """
    out: list[PreferenceRecord | RowError] = []
    meta, own = fields.pop("meta", {}), row.get("id")
    for aspect, key in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        try:
            best = _choice(row, key)
            names = {"chosen": f"response_{best}", "rejected": f"response_{1 - best}"}
            about = meta | {"aspect": aspect} | _judged(row, names)
            about |= {} if own is None else {"id": f"{own}:{aspect}"}
            chosen, rejected = (replied(row, name) for name in names.values())
            out.append(pair_record((said(row, "prompt"),), chosen, rejected, meta=about, **fields))
        except RowError as reason:
            out.append(reason)
    return out


def _choice(row: Row, key: str) -> int:
    if isinstance(row[key], bool) or row[key] not in (0, 1):
        raise RowError(f"{key} is neither 0 nor 1")
    return int(row[key])


def _judged(row: Row, names: dict[str, str]) -> dict[str, Any]:
    """What the row says of each answer: {"safe": {chosen, rejected}, ...}."""
    out: dict[str, Any] = {"safe": {role: row.get(f"is_{name}_safe") for role, name in names.items()}}
    for what in ("severity_level", "harm_category"):
        found = {role: row.get(f"{name}_{what}") for role, name in names.items()}
        out |= {what: found} if any(value is not None for value in found.values()) else {}
    return out


def sft_from_pair(row: Row, **fields: Any) -> SFTRecord:
    """The more helpful answer. Raises `UnwantedRowError` where it is not safe."""
    name = f"response_{_choice(row, 'better_response_id')}"
    if not as_label(row.get(f"is_{name}_safe")):
        raise UnwantedRowError("the better answer is not safe")
    return chat_record((said(row, "prompt"), *replied(row, name)), prompt_turns=1, **fields)
