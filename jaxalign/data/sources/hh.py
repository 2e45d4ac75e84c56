"""HH-RLHF (arXiv:2204.05862): transcripts of a human and an assistant, and attempts at red-teaming them.

Its pairs are two transcripts that differ in the last answer (`formats.split_answers`). A row of
`red-team-attempts` (arXiv:2209.07858) is one transcript with scores.
"""

from __future__ import annotations

import re
from typing import Any

from jaxalign.data.preferences import ScoredRecord, scored_record
from jaxalign.data.records import Message, RowError, UnwantedRowError, as_text, other_keys

SCORE = "min_harmlessness_score_transcript"
ATTACK_KEYS = f"transcript + {SCORE}"


def transcript_turns(transcript: str, name: str = "chosen") -> tuple[Message, ...]:
    """The turns of a transcript in HH-RLHF form: they begin with `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)
    if len(parts) < 3 or parts[0].strip():
        raise RowError(f"{name} has no prompt and is not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = tuple(Message(roles[name], text.strip()) for name, text in pairs)
    if turns[-1].role != "assistant":
        raise RowError("the transcript ends on the human's turn")
    return turns


def is_attack(row: dict[str, Any]) -> bool:
    """Whether the row is an attempt at red-teaming."""
    return {"transcript", SCORE} <= row.keys()


def from_attack(row: dict[str, Any], **fields: Any) -> ScoredRecord:
    """The last answer of a transcript. Its score, higher is less harmful, is that of the worst answer in it;
    labels are made of it with a threshold. `meta` holds the rating of the attack and what else the row says.
    """
    turns = transcript_turns(as_text(row["transcript"], "the transcript"), "the transcript")
    if row[SCORE] is None:
        raise RowError(f"no {SCORE}")
    meta = fields.pop("meta", {}) | other_keys(row, "transcript")
    return scored_record(turns[:-1], [turns[-1:]], [row[SCORE]], meta=meta, **fields)


def sft_from_attack(row: dict[str, Any], **fields: Any) -> Any:
    """Raises `UnwantedRowError`: attempts at red-teaming are no examples of good answers."""
    raise UnwantedRowError("an attempt at red-teaming is not imitated")
