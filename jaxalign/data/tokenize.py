"""Records -> examples: tokens, loss masks, the truncation policy, and a report before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jaxalign.data.chat import Tokenizer
from jaxalign.data.preferences import GroupRecord
from jaxalign.data.records import RowError, SFTRecord
from jaxalign.data.spans import (
    Layout,
    LossOn,
    Marked,
    anchored,
    check_loss_on,
    encode_layout,
    join_pieces,
    lay_out,
    mark,
)
from jaxalign.errors import UserError, nearest
from jaxalign.types import Example, Group

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


Members = tuple[Example, ...]  # one row as examples: the answers to one prompt, or one alone


def _keep_start(members: Members, max_length: int) -> Members:
    return tuple(replace(e, tokens=e.tokens[:max_length], mask=e.mask[:max_length]) for e in members)


def _keep_end(members: Members, max_length: int) -> Members:
    over = max(len(e.tokens) for e in members) - max_length
    if len(members) > 1 and any(e.mask[: over + 1].any() for e in members):
        raise RowError(f"an answer alone is longer than max_length={max_length}")
    return tuple(_without_first(e, over) for e in members)


def _without_first(example: Example, count: int) -> Example:
    mask = example.mask[count:].copy()
    mask[0] = False  # what preceded it is gone
    return replace(example, tokens=example.tokens[count:], mask=mask)


def _drop(members: Members, max_length: int) -> Members:
    raise RowError(f"longer than max_length={max_length}")


def _error(members: Members, max_length: int) -> Members:
    worst = max(members, key=lambda e: len(e.tokens))
    raise UserError(
        f"row {worst.id} has {len(worst.tokens)} tokens, more than max_length={max_length}",
        remedy="raise max_length, or set truncation to keep_start, keep_end or drop",
    )


Cut = Callable[[Members, int], Members]

# What happens to a row longer than max_length. keep_start (methods: truncate the tail of the answer, drop the
# row if the prompt alone fills it) is the default: it loses the fewest tokens, and the report says how many.
# keep_end cuts the same tokens off the prompt of all members of a group, and never into an answer.
TRUNCATIONS: dict[str, Cut] = {
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
    cut = _truncation(truncation, max_length)
    counts = _Counts()
    examples = []
    for index, record, part in _encoded(records, tokenizer, loss_on, counts):
        examples += counts.fit(index, record, [part], cut, max_length)
    report = counts.report(len(records), examples)
    _check(report, records, tokenizer, counts.empty)
    return examples, report


def tokenize_groups(
    records: Sequence[GroupRecord],
    tokenizer: Tokenizer,
    max_length: int,
    truncation: Truncation = "keep_start",
) -> tuple[list[Group], TokenizeReport]:
    """Groups whose members have at most `max_length` tokens each, and the report: `examples` counts groups,
    `tokens` those of all members.

    The prompt is encoded once and every answer appended, so that the members share its ids. Only the answers
    are learned. A group is dropped when an answer has no room behind the prompt, or when all its answers have
    the same tokens. Raises `UserError` as `tokenize` does.
    """
    cut = _truncation(truncation, max_length)
    counts = _Counts()
    groups: list[Group] = []
    for index, record, parts in _encoded_groups(records, tokenizer, counts):
        members = counts.fit(index, record, parts, cut, max_length)
        if members:
            groups.append(Group(record.id, members, record.aux, record.family, record.place))
    members = [member for group in groups for member in group.members]
    report = replace(counts.report(len(records), members), examples=len(groups))
    _check(report, records, tokenizer, counts.empty)
    return groups, report


def _truncation(name: str, max_length: int) -> Cut:
    """The policy of that name. Raises `UserError` for an unknown one, or a length that holds nothing."""
    if name not in TRUNCATIONS:
        known = ", ".join(TRUNCATIONS)
        raise UserError(f"unknown truncation {name!r}{nearest(name, TRUNCATIONS)}", remedy=f"known: {known}")
    if max_length < 2:
        raise UserError(f"max_length={max_length} leaves nothing to learn", remedy="set it to 2 or more")
    return TRUNCATIONS[name]


Part = tuple[Layout, Marked]


def _same(a: Example, b: Example) -> bool:
    return np.array_equal(a.tokens, b.tokens)


class _Counts:
    """The report while it is being counted."""

    def __init__(self) -> None:
        self.dropped: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.lost = self.truncated = self.splits = self.recovered = self.unstopped = self.turns = 0
        self.empty: tuple[int, Example] | None = None  # the first row with nothing to learn

    def drop(self, reason: str, index: int, record: SFTRecord | GroupRecord) -> None:
        """Count a dropped row, remembering the first places."""
        count, places = self.dropped.get(reason, (0, ()))
        place = record.place or f"row {index}"
        self.dropped[reason] = (count + 1, (*places, place) if len(places) < PLACES_KEPT else places)

    def fit(
        self, index: int, record: SFTRecord | GroupRecord, parts: Sequence[Part], cut: Cut, max_length: int
    ) -> Members:
        """The examples of one row cut to `max_length`; none for a row that is dropped."""
        whole = members = tuple(marked.example for _, marked in parts)
        total = sum(len(e.tokens) for e in whole)
        try:
            if max(len(e.tokens) for e in whole) > max_length:
                members = cut(whole, max_length)
            for before, after in zip(whole, members, strict=True):
                if not after.mask.any():
                    self.empty = self.empty or (index, before)
                    short = before.mask.any()
                    raise RowError("nothing to learn within max_length" if short else "nothing to learn")
            if len(members) > 1 and all(_same(members[0], e) for e in members[1:]):
                within = "" if all(_same(whole[0], e) for e in whole[1:]) else " within max_length"
                raise RowError(f"the answers have the same tokens{within}")
        except RowError as reason:
            self.lost += total
            self.drop(str(reason), index, record)
            return ()
        kept = sum(len(e.tokens) for e in members)
        self.truncated += kept < total
        self.lost += total - kept
        self.splits += sum(marked.splits for _, marked in parts)
        self.recovered += sum(layout.recovered for layout, _ in parts)
        self.unstopped += sum(marked.unstopped for _, marked in parts)
        self.turns += sum(marked.turns for _, marked in parts)
        return members

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
) -> Iterator[tuple[int, SFTRecord, Part]]:
    """(index, record, (layout, marked)) of every row that can be rendered; the others are counted."""
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
                yield index, record, (layout, encode_layout(layout, encoding, tokenizer, record.id))
            except RowError as reason:
                counts.drop(str(reason), index, record)


def _encoded_groups(
    records: Sequence[GroupRecord], tokenizer: Tokenizer, counts: _Counts
) -> Iterator[tuple[int, GroupRecord, list[Part]]]:
    """The same of groups, a part for each answer."""
    for begin in range(0, len(records), CHUNK):
        chunk: list[tuple[int, GroupRecord, str, list[Layout]]] = []
        for index, record in enumerate(records[begin : begin + CHUNK], start=begin):
            try:
                chunk.append((index, record, *_lay_out_group(record, tokenizer)))
            except RowError as reason:
                counts.drop(str(reason), index, record)
        prompts = tokenizer.encode_batch([prompt for _, _, prompt, _ in chunk])
        tails = [anchored(o.text[len(p) :], tokenizer) for _, _, p, layouts in chunk for o in layouts]
        answers = iter(tokenizer.encode_batch(tails))
        for (index, record, text, layouts), prompt in zip(chunk, prompts, strict=True):
            pieces = [join_pieces([prompt, next(answers)], [len(text)], tokenizer) for _ in layouts]
            try:
                marked = [
                    mark(layout, ids, starts, tokenizer, record.id)
                    for layout, (ids, starts) in zip(layouts, pieces, strict=True)
                ]
            except RowError as reason:
                counts.drop(str(reason), index, record)
            else:
                yield index, record, list(zip(layouts, marked, strict=True))


def _lay_out_group(record: GroupRecord, tokenizer: Tokenizer) -> tuple[str, list[Layout]]:
    """(the prompt's text, the text of the prompt with each answer). Raises `RowError` unless every one of
    them begins with the prompt's text, to the letter."""
    layouts = [lay_out(_alone(record, i), tokenizer) for i in range(len(record.answers))]
    heads = {layout.text[: layout.spans[0][0]] for layout in layouts}
    if len(heads) != 1:
        raise RowError("the chat template writes the prompt differently for its answers")
    return heads.pop(), layouts


def _alone(record: GroupRecord, index: int) -> SFTRecord:
    """One answer of a group as a row of its own."""
    prompt, answer = record.prompt, record.answers[index]
    if isinstance(prompt, str) or isinstance(answer, str):
        return SFTRecord(record.id, prompt=str(prompt), completion=str(answer))
    return SFTRecord(record.id, messages=prompt + answer, prompt_turns=len(prompt))


def _check(
    report: TokenizeReport,
    records: Sequence[SFTRecord | GroupRecord],
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
