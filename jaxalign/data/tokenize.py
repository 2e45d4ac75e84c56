"""Records -> examples: tokens, loss masks, the truncation policy, and a report before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jaxalign.data.chat import Tokenizer
from jaxalign.data.records import RowError, SFTRecord
from jaxalign.data.spans import Layout, LossOn, Marked, check_loss_on, encode_layout, lay_out
from jaxalign.errors import UserError, nearest
from jaxalign.types import Example

Truncation = Literal["keep_start", "keep_end", "drop", "error"]

CHUNK = 1024  # texts encoded at a time: enough for all cores, and the offsets of no more are held
PLACES_KEPT = 3


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the records.

    tokens, targets   of the examples that are left; targets are the tokens that are learned
    tokens_lost       cut off by truncation or dropped with their row
    truncated         rows that lost tokens and are still used
    dropped           {reason: (rows, first places)}
    split_boundaries  prompt ends inside a token, where the text was encoded in two
    recovered_turns   answers that the template rewrites when turns follow (learned as rewritten)
    unstopped_turns   answers after which the template writes no stop token, of `turns`
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    tokens_lost: int = 0
    truncated: int = 0
    dropped: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    split_boundaries: int = 0
    recovered_turns: int = 0
    unstopped_turns: int = 0
    turns: int = 0

    @property
    def lost_share(self) -> float:
        """Share of all tokens that is lost, 0 to 1."""
        return self.tokens_lost / max(self.tokens + self.tokens_lost, 1)

    def lines(self) -> list[str]:
        """The report in plain lines; only what happened is named."""
        out = [f"{self.examples} of {self.rows} rows, {self.tokens} tokens, {self.targets} of them learned"]
        if self.tokens_lost:
            out.append(f"truncated {self.truncated} rows; {self.lost_share:.1%} of the tokens lost")
        for reason, (count, places) in self.dropped.items():
            more = ", ..." if count > len(places) else ""
            out.append(f"dropped {count}: {reason} ({', '.join(places)}{more})")
        notes = (
            (self.split_boundaries, "prompt ends inside a token; encoded in two parts"),
            (self.recovered_turns, "answers are rewritten by the chat template; learned as rewritten"),
            (self.unstopped_turns, f"of {self.turns} answers end without a stop token"),
        )
        return out + [f"{count} {note}" for count, note in notes if count]


def _keep_start(example: Example, max_length: int) -> Example:
    return replace(example, tokens=example.tokens[:max_length], mask=example.mask[:max_length])


def _keep_end(example: Example, max_length: int) -> Example:
    mask = example.mask[-max_length:].copy()
    mask[0] = False  # what preceded it is gone
    return replace(example, tokens=example.tokens[-max_length:], mask=mask)


def _drop(example: Example, max_length: int) -> Example:
    raise RowError(f"longer than max_length={max_length}")


def _error(example: Example, max_length: int) -> Example:
    raise UserError(
        f"row {example.id} has {len(example.tokens)} tokens, more than max_length={max_length}",
        remedy="raise max_length, or set truncation to keep_start, keep_end or drop",
    )


# What happens to a row longer than max_length. keep_start (methods: truncate the tail of the answer, drop the
# row if the prompt alone fills it) is the default: it loses the fewest tokens, and the report says how many.
TRUNCATIONS: dict[str, Callable[[Example, int], Example]] = {
    "keep_start": _keep_start,
    "keep_end": _keep_end,
    "drop": _drop,
    "error": _error,
}


def encode_record(record: SFTRecord, tokenizer: Tokenizer, loss_on: LossOn | None = None) -> Example:
    """Tokens and mask of one record, not truncated. Raises `RowError` or `UserError`."""
    check_loss_on(loss_on)
    layout = lay_out(record, tokenizer, loss_on)
    return encode_layout(layout, tokenizer.encode_batch([layout.text])[0], tokenizer, record.id).example


def tokenize(
    records: Sequence[SFTRecord],
    tokenizer: Tokenizer,
    max_length: int,
    truncation: Truncation = "keep_start",
    loss_on: LossOn | None = None,
) -> tuple[list[Example], TokenizeReport]:
    """Examples of at most `max_length` tokens, each with something to learn, and the report.

    Raises `UserError` when no row is left (with the first row's text), when the chat template ends no answer
    with a stop token, and, under `truncation="error"`, at the first row that is too long.
    """
    check_loss_on(loss_on)
    if truncation not in TRUNCATIONS:
        known = ", ".join(TRUNCATIONS)
        raise UserError(
            f"unknown truncation {truncation!r}{nearest(truncation, TRUNCATIONS)}", remedy=f"known: {known}"
        )
    if max_length < 2:
        raise UserError(f"max_length={max_length} leaves nothing to learn", remedy="set it to 2 or more")
    counts = _Counts()
    examples = []
    for index, record, layout, marked in _encoded(records, tokenizer, loss_on, counts):
        example = counts.fit(index, record, marked, layout, TRUNCATIONS[truncation], max_length)
        if example is not None:
            examples.append(example)
    report = counts.report(len(records), examples)
    _check(report, records, tokenizer, counts.empty)
    return examples, report


class _Counts:
    """The report while it is being counted."""

    def __init__(self) -> None:
        self.dropped: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.lost = self.truncated = self.splits = self.recovered = self.unstopped = self.turns = 0
        self.empty: tuple[int, Example] | None = None  # the first row with nothing to learn

    def drop(self, reason: str, index: int, record: SFTRecord) -> None:
        """Count a dropped row, remembering the first places."""
        count, places = self.dropped.get(reason, (0, ()))
        place = record.place or f"row {index}"
        self.dropped[reason] = (count + 1, (*places, place) if len(places) < PLACES_KEPT else places)

    def fit(
        self,
        index: int,
        record: SFTRecord,
        marked: Marked,
        layout: Layout,
        cut: Callable[[Example, int], Example],
        max_length: int,
    ) -> Example | None:
        """The example cut to `max_length`, or None for a row that is dropped."""
        whole = example = marked.example
        try:
            if len(whole.tokens) > max_length:
                example = cut(whole, max_length)
            if not example.mask.any():
                self.empty = self.empty or (index, whole)
                short = whole.mask.any()
                raise RowError("nothing to learn within max_length" if short else "nothing to learn")
        except RowError as reason:
            self.lost += len(whole.tokens)
            self.drop(str(reason), index, record)
            return None
        self.truncated += len(example.tokens) < len(whole.tokens)
        self.lost += len(whole.tokens) - len(example.tokens)
        self.splits += marked.splits
        self.recovered += layout.recovered
        self.unstopped += marked.unstopped
        self.turns += marked.turns
        return example

    def report(self, rows: int, examples: list[Example]) -> TokenizeReport:
        """The finished report."""
        return TokenizeReport(
            rows=rows,
            examples=len(examples),
            tokens=sum(len(e.tokens) for e in examples),
            targets=int(sum(e.mask.sum() for e in examples)),
            tokens_lost=self.lost,
            truncated=self.truncated,
            dropped=self.dropped,
            split_boundaries=self.splits,
            recovered_turns=self.recovered,
            unstopped_turns=self.unstopped,
            turns=self.turns,
        )


def _encoded(
    records: Sequence[SFTRecord], tokenizer: Tokenizer, loss_on: LossOn | None, counts: _Counts
) -> Iterator[tuple[int, SFTRecord, Layout, Marked]]:
    """(index, record, layout, marked) of every row that can be rendered; the others are counted."""
    for begin in range(0, len(records), CHUNK):
        chunk: list[tuple[int, SFTRecord, Layout]] = []
        for index, record in enumerate(records[begin : begin + CHUNK], start=begin):
            try:
                chunk.append((index, record, lay_out(record, tokenizer, loss_on)))
            except RowError as reason:
                counts.drop(str(reason), index, record)
        encodings = tokenizer.encode_batch([layout.text for *_, layout in chunk])
        for (index, record, layout), encoding in zip(chunk, encodings, strict=True):
            try:
                yield index, record, layout, encode_layout(layout, encoding, tokenizer, record.id)
            except RowError as reason:
                counts.drop(str(reason), index, record)


def _check(
    report: TokenizeReport,
    records: Sequence[SFTRecord],
    tokenizer: Tokenizer,
    empty: tuple[int, Example] | None,
) -> None:
    """Raise `UserError` when nothing can be learned, or no answer would learn to end."""
    if not report.examples:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, (count, _) in report.dropped.items())
        remedy = "raise max_length, or look at the rows with `jaxalign inspect data`"
        if empty is not None:
            index, example = empty
            text = tokenizer.decode(example.tokens[:200], special=True)
            remedy += f"\n  row {index} ({records[index].place or example.id}): {text!r}"
        raise UserError(f"no row has anything to learn ({reasons or 'no rows'})", remedy=remedy)
    if report.turns and report.unstopped_turns == report.turns:
        remedy = (
            "set chat_template to one that ends every assistant turn with eos_token, or the model never stops"
        )
        raise UserError(
            "the chat template ends no assistant turn with a stop token", place=tokenizer.name, remedy=remedy
        )


def token_counts(examples: Sequence[Example]) -> np.ndarray:
    """Length of every example, int64 [N]."""
    return np.asarray([len(e.tokens) for e in examples], np.int64)
