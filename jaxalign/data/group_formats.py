"""Recognisers of rows that compare or judge answers, and how each becomes the kind that a loss learns from.

As in `formats`: `GROUP_FORMATS` is tried from the top. `CONVERSIONS` then leads from what a row is to what
is asked for: a ranked list gives pairs, a pair gives two labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.convert import best_to_sft, pair_to_binary, scored_to_binary, scored_to_pairs
from jaxalign.data.formats import FORMATS, LABELS, Format, Row, find_format, split_answers
from jaxalign.data.preferences import (
    BinaryRecord,
    GroupRecord,
    PreferenceRecord,
    ScoredRecord,
    as_number,
    binary_record,
    pair_record,
    scored_record,
)
from jaxalign.data.records import RowError, UnwantedRowError, structured
from jaxalign.data.sources import (
    beavertails,
    fake_alignment,
    flames,
    harmfulqa,
    hh,
    oasst,
    seed_safety,
    sparse_feedback,
    ultrafeedback,
)

Part = GroupRecord | RowError | UnwantedRowError

# Keys under which published pairs keep the scores of the chosen and the rejected answer.
SCORE_KEYS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def margin_of(row: Row) -> float | None:
    """The row's `margin`, or the gap of its two scores, or None."""
    for place in (row, row.get("meta")):
        if isinstance(place, dict) and place.get("margin") is not None:
            return as_number(place["margin"], "the margin")
    for high, low in SCORE_KEYS:
        if row.get(high) is not None and row.get(low) is not None:
            return as_number(row[high], high) - as_number(row[low], low)
    return None


def from_pair(row: Row, **fields: Any) -> PreferenceRecord:
    """`chosen` and `rejected`, with a prompt or with the same turns before both."""
    prompt, (chosen, rejected) = split_answers(row, {key: row[key] for key in ("chosen", "rejected")})
    return pair_record(prompt, chosen, rejected, margin=margin_of(row), **fields)


def from_labelled(row: Row, **fields: Any) -> BinaryRecord:
    """An answer with a `label` (true: wanted): `prompt` and `completion`, or messages that end on it."""
    label = next(row[key] for key in LABELS if key in row)
    answer = next((row[key] for key in ("completion", "response") if key in row), None)
    if answer is None:
        turns = row["messages"] if "messages" in row else row["conversations"]
        prompt, (answer,) = split_answers({"system": row.get("system")}, {"the answer": turns})
    else:
        prompt, (answer,) = split_answers(row, {"the answer": answer})
    return binary_record(prompt, answer, label, **fields)


def from_scored(row: Row, **fields: Any) -> ScoredRecord:
    """`completions` or `responses`, and as many `scores`."""
    answers = structured(row["completions"] if "completions" in row else row["responses"])
    if not isinstance(answers, list) or not answers:
        raise RowError("no answers")
    prompt, found = split_answers(row, {f"answer {i}": a for i, a in enumerate(answers, start=1)})
    return scored_record(prompt, found, structured(row["scores"]), **fields)


def _has_answers(row: Row) -> bool:
    return "completions" in row or "responses" in row


GROUP_FORMATS: tuple[Format, ...] = (
    Format("seed safety", "Question_zh + good_response_zh + ...", seed_safety.matches, seed_safety.from_row),
    Format("tree", "message_tree_id + prompt with replies", oasst.is_tree, oasst.from_tree),
    Format(
        "ranking",
        "instruction + output1 + output2 + ranking",
        sparse_feedback.is_ranking,
        sparse_feedback.from_ranking,
    ),
    Format("sentences", "{prompt: {sentences}}", sparse_feedback.is_ranked, sparse_feedback.from_ranked),
    Format("pku", beavertails.PAIR_KEYS, beavertails.is_pair, beavertails.from_pair),
    Format("beavertails", beavertails.ANSWER_KEYS, beavertails.is_answer, beavertails.from_answer),
    Format("flames", flames.ANSWER_KEYS, flames.is_answer, flames.from_answer),
    Format("fake alignment", fake_alignment.KEYS, fake_alignment.matches, fake_alignment.from_row),
    Format("harmfulqa", harmfulqa.KEYS, harmfulqa.is_conversations, harmfulqa.from_conversations, mixed=True),
    Format("red team", hh.ATTACK_KEYS, hh.is_attack, hh.from_attack),
    Format(
        "preference",
        "conversations|messages|prompt + chosen + rejected",
        lambda row: "chosen" in row and "rejected" in row,
        from_pair,
    ),
    Format("ultrafeedback", ultrafeedback.KEYS, ultrafeedback.matches, ultrafeedback.from_row),
    Format(
        "scored",
        "prompt|messages + completions|responses + scores",
        lambda row: _has_answers(row) and "scores" in row,
        from_scored,
    ),
    Format(
        "labelled",
        "messages|conversations|prompt + completion|response, and label",
        lambda row: (
            any(key in row for key in LABELS)
            and any(key in row for key in ("messages", "conversations", "completion", "response"))
        ),
        from_labelled,
    ),
)


@dataclass(frozen=True)
class GroupOptions:
    """How rows become groups.

    pairs      which pairs a list of scored answers gives (`convert.POLICIES`)
    best       of how many of the best answers of a list; None: all
    threshold  the score from which an answer counts as wanted, where labels are made of scores
    select     {key of a record's meta: value}: others are left out, such as {"aspect": "harmless"}
    seed       of random pairs
    """

    pairs: str = "all_pairs"
    best: int | None = None
    threshold: float | None = None
    select: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def _lists_to_pairs(record: ScoredRecord, options: GroupOptions) -> Sequence[Part]:
    return scored_to_pairs(record, options.pairs, seed=options.seed, best=options.best)


def _lists_to_binary(record: ScoredRecord, options: GroupOptions) -> Sequence[Part]:
    if options.threshold is None:
        raise RowError("scores become labels only with a threshold (threshold=...)")
    return scored_to_binary(record, options.threshold)


def _lists_to_lists(record: ScoredRecord, options: GroupOptions) -> Sequence[Part]:
    if len(record.ranked) < 2:
        raise RowError("fewer than two answers with a score")
    return [record.top(options.best)]


Conversion = Callable[[Any, GroupOptions], Sequence[Part]]

# kind -> {what a row is: how it becomes that kind}
CONVERSIONS: dict[str, dict[type, Conversion]] = {
    "pairs": {PreferenceRecord: lambda record, _: [record], ScoredRecord: _lists_to_pairs},
    "binary": {
        BinaryRecord: lambda record, _: [record],
        PreferenceRecord: lambda record, _: pair_to_binary(record),
        ScoredRecord: _lists_to_binary,
    },
    "lists": {ScoredRecord: _lists_to_lists},
}

NATIVE = {PreferenceRecord: "a pair", BinaryRecord: "an answer with a label", ScoredRecord: "a scored list"}


# `formats` reads these for SFT itself.
IMITATED = frozenset(f.name for f in FORMATS) | {"labelled"}

MIXED = frozenset(f.name for f in GROUP_FORMATS if f.mixed)

KNOWN = "; ".join(f"{f.name}: {f.keys}" for f in GROUP_FORMATS)


def to_groups(
    row: Any, kind: str, options: GroupOptions, *, source: str = "", place: str = ""
) -> tuple[list[Part], str]:
    """(records of `kind` with the faults among them, format name) of one row. Raises `RowError`."""
    made, name = native(row, source=source, place=place)
    return [result for part in made for result in _converted(part, kind, options, name in MIXED)], name


def native(row: Any, *, source: str = "", place: str = "") -> tuple[list[Part], str]:
    """(records as the row has them, with the faults among them, format name). Raises `RowError`."""
    found = find_format(row, GROUP_FORMATS)
    own = row.get("meta")
    meta = (own if isinstance(own, dict) else {}) | ({} if row.get("id") is None else {"id": row["id"]})
    made = found.convert(row, source=source, place=place, meta=meta)
    return made if isinstance(made, list) else [made], found.name


def to_best(row: Any, *, source: str = "", place: str = "") -> tuple[list[Any], str] | None:
    """(the best answer of each record, to imitate, format name), or None for rows that `formats` reads."""
    found = next((f for f in GROUP_FORMATS if isinstance(row, dict) and f.matches(row)), None)
    if found is None or found.name in IMITATED:
        return None
    made, name = native(row, source=source, place=place)
    return [_best(part) for part in made], name


def _best(part: Part) -> Any:
    """The record to imitate of one part of a row, or the reason why there is none."""
    if isinstance(part, RowError | UnwantedRowError):
        return part
    if isinstance(part, BinaryRecord) and not part.label:
        return UnwantedRowError("an unwanted answer is not learned")
    try:
        return best_to_sft(part)
    except RowError as reason:
        return reason


def _converted(part: Part, kind: str, options: GroupOptions, mixed: bool) -> Sequence[Part]:
    """One record of a row as records of `kind`, or the reason why it is none, no fault if `mixed`."""
    if isinstance(part, RowError | UnwantedRowError):
        return [part]
    for key, wanted in options.select.items():
        if part.meta.get(key) != wanted:
            return [UnwantedRowError(f"{key} is {part.meta.get(key)}, not {wanted}")]
    conversion = CONVERSIONS[kind].get(type(part))
    if conversion is None:
        reason = f"{NATIVE[type(part)]} does not make {kind}"
        return [UnwantedRowError(reason) if mixed else RowError(reason)]
    try:
        return conversion(part, options)
    except RowError as reason:
        return [reason]
