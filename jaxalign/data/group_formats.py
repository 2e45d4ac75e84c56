"""Recognisers of rows that compare or judge answers, and how each becomes the kind that a loss learns from.

As in `formats`: `GROUP_FORMATS` is tried from the top. `CONVERSIONS` then leads from what a row is to what
is asked for: a ranked list gives pairs, a pair gives two labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.convert import best_to_sft, pair_to_binary, scored_to_binary, scored_to_pairs
from jaxalign.data.formats import LABELS, Format, Row, find_format, is_turns, split_answers, structured
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
from jaxalign.data.records import Message, RowError, UnwantedRowError, as_text
from jaxalign.data.sources import oasst, seed_safety, sparse_feedback

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


def from_ultrafeedback(row: Row, **fields: Any) -> ScoredRecord:
    """UltraFeedback: `instruction` and `completions` with `response` and judged aspects. An answer's score is
    the mean of its ratings ("N/A" left out), else `overall_score`; `meta` has the ratings as `aspects`."""
    given = structured(row["completions"])
    answers = tuple((Message("assistant", as_text(c.get("response"), "response")),) for c in given)
    rated = [_ratings(c) for c in given]
    scores = [
        sum(r.values()) / len(r) if r else c.get("overall_score") for c, r in zip(given, rated, strict=True)
    ]
    names = sorted({name for ratings in rated for name in ratings})
    meta = fields.pop("meta") | {"aspects": {n: [r.get(n) for r in rated] for n in names}}
    prompt = (Message("user", as_text(row["instruction"], "instruction")),)
    return scored_record(prompt, answers, scores, meta=meta, **fields)


def _ratings(completion: dict[str, Any]) -> dict[str, float]:
    """{aspect: rating} of one judged answer."""
    found = completion.get("annotations") or {}
    ratings = {name: aspect.get("Rating") for name, aspect in found.items() if isinstance(aspect, dict)}
    return {n: as_number(r, f"the {n} rating") for n, r in ratings.items() if r not in (None, "N/A")}


def from_pku(row: Row, **fields: Any) -> list[Part]:
    """PKU safety preferences: one pair for `better_response_id` (aspect helpful), one for `safer_response_id`
    (aspect harmless)."""
    out: list[Part] = []
    meta, own = fields.pop("meta"), row.get("id")
    for aspect, key in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        best = row[key]
        if isinstance(best, bool) or best not in (0, 1):
            out.append(RowError(f"{key} is neither 0 nor 1"))
            continue
        names = {"chosen": f"response_{best}", "rejected": f"response_{1 - best}"}
        answers = [(Message("assistant", as_text(row[n], n)),) for n in names.values()]
        safe = {role: row.get(f"is_{n}_safe") for role, n in names.items()}
        about = meta | {"aspect": aspect, "safe": safe} | ({} if own is None else {"id": f"{own}:{aspect}"})
        prompt = (Message("user", as_text(row["prompt"], "prompt")),)
        try:
            out.append(pair_record(prompt, answers[0], answers[1], meta=about, **fields))
        except RowError as reason:
            out.append(reason)
    return out


def _has_answers(row: Row) -> bool:
    return "completions" in row or "responses" in row


def _is_ultrafeedback(row: Row) -> bool:
    given = structured(row.get("completions"))
    return "instruction" in row and is_turns(given) and all("response" in c for c in given)


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
    Format(
        "pku",
        "prompt + response_0 + response_1 + better_response_id + safer_response_id",
        lambda row: {"response_0", "response_1", "better_response_id", "safer_response_id"} <= row.keys(),
        from_pku,
    ),
    Format(
        "preference",
        "conversations|messages|prompt + chosen + rejected",
        lambda row: "chosen" in row and "rejected" in row,
        from_pair,
    ),
    Format(
        "ultrafeedback", "instruction + completions: [{response, ...}]", _is_ultrafeedback, from_ultrafeedback
    ),
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


IMITATED = frozenset({"tree", "preference", "labelled"})  # `formats` reads these for SFT itself

KNOWN = "; ".join(f"{f.name}: {f.keys}" for f in GROUP_FORMATS)


def to_groups(
    row: Any, kind: str, options: GroupOptions, *, source: str = "", place: str = ""
) -> tuple[list[Part], str]:
    """(records of `kind` with the faults among them, format name) of one row. Raises `RowError`."""
    made, name = native(row, source=source, place=place)
    return [result for part in made for result in _converted(part, kind, options)], name


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
    return [p if isinstance(p, RowError | UnwantedRowError) else best_to_sft(p) for p in made], name


def _converted(part: Part, kind: str, options: GroupOptions) -> Sequence[Part]:
    """One record of a row as records of `kind`, or the reason why it is none."""
    if isinstance(part, RowError | UnwantedRowError):
        return [part]
    for key, wanted in options.select.items():
        if part.meta.get(key) != wanted:
            return [UnwantedRowError(f"{key} is {part.meta.get(key)}, not {wanted}")]
    conversion = CONVERSIONS[kind].get(type(part))
    if conversion is None:
        return [RowError(f"{NATIVE[type(part)]} does not make {kind}")]
    try:
        return conversion(part, options)
    except RowError as reason:
        return [reason]
