"""Batches by step number. The order is a pure function of (seed, step), so the step is the data position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.data.layouts import Shape
from jaxalign.data.order import Order, Shuffled, permutation
from jaxalign.data.packing import bucket_lengths, round_up
from jaxalign.data.rows import PADDING, Item, Rows, arrange, in_blocks, members_of
from jaxalign.errors import UserError
from jaxalign.types import Batch, Group

__all__ = ["BatchSource", "BatchStats", "bucket_lengths", "eval_batches", "permutation"]

SAMPLE = 256  # steps at most by which layouts are chosen and padding is told


@dataclass(frozen=True)
class BatchStats:
    """What one epoch holds. `tokens` are real ones.

    `pad_share` is of what the model computes. Where answers share a row, in the steps of the first epoch, or
    an even sample of them; else in rows laid out each in its bucket: a step widens them to its longest row,
    so that unpacked it is a lower bound.
    """

    examples: int
    rows: int
    tokens: int
    targets: int
    pad_share: float
    longest: int


class BatchSource:
    """Training batches: `batch(step)` gives numpy leaves [A, B_local, G, T].

    `batch_size` rows make one update: A = `accumulation` micro-batches of B rows over all processes. Process
    p of n holds rows p*B/n to (p+1)*B/n of every micro-batch, so all together hold what one process would.
    `order` says which rows a step takes; None runs through all of them (`Shuffled`). `packing` puts several
    examples into a row; otherwise a row is one example, and a step's T is the smallest of `buckets` that
    takes its longest row (the same on every process).

    Of groups a row is one group, G its answers; shorter groups are filled up with answers that hold nothing.
    `group` is the G wanted; None or 0: that of the longest group. 2 over groups of one answer: member 1 is
    the row's prompt with the answer of the row before it in the step (the first row takes the last one's).
    `share`: batches say how the members of a group go into one row with their prompt once (`Batch.shared`);
    the lengths then are those of such rows. The groups of one of `blocks` blocks may share rows too
    (`rows.in_blocks`): a micro-batch has as many blocks as devices it is cut over, those of all processes;
    None is one for each process. Not with `apart`: row lengths then are what they would be for any rows as
    long, whatever else the data holds.

    Raises `UserError` for sizes that do not divide, no examples, an example over `max_length`, packed groups,
    or a group of more than `group` answers.
    """

    def __init__(
        self,
        examples: Sequence[Item],
        *,
        batch_size: int,
        max_length: int,
        accumulation: int = 1,
        packing: bool = False,
        group: int | None = None,
        share: bool = False,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        buckets: Sequence[int] | None = None,
        pad_id: int = 0,
        order: Order | None = None,
        blocks: int | None = None,
        apart: bool = False,
    ) -> None:
        _check_sizes(batch_size, accumulation, process_count, process_index)
        self._rows = self._alone = arrange(
            examples,
            max_length=max_length,
            packing=packing,
            group=group,
            share=share,
            buckets=buckets,
            pad_id=pad_id,
        )
        if self._rows.rotated and batch_size < 2:
            cause = "a row is compared with the answer of another one, and batch_size=1 holds no other"
            raise UserError(cause, place="batch_size", remedy="set it to 2 or more; 16 is a good start")
        self.order = order or Shuffled(np.arange(len(self.rows)), batch_size, seed)
        self.seed, self.batch_size, self.accumulation = seed, batch_size, accumulation
        self._local = local_rows(batch_size // accumulation, process_index, process_count)
        self._apart = apart
        self._cut(process_count if blocks is None else blocks)
        self._settings = {
            "batch_size": batch_size,
            "packing": packing,
            "max_length": max_length,
            "seed": seed,
        }

    def in_blocks(self, blocks: int) -> BatchSource:
        """The same batches, laid out for micro-batches of so many blocks."""
        other = copy(self)
        other._cut(blocks)
        return other

    def _cut(self, blocks: int) -> None:
        block = groups_of(blocks, self.batch_size // self.accumulation)
        self._rows = in_blocks(self._alone, block, [] if self._apart else self._sample)

    @property
    def _sample(self) -> list[np.ndarray]:
        """The rows of steps of the first epoch."""
        steps = self.steps_per_epoch
        return [self.row_indices(step) for step in range(0, steps, -(-steps // SAMPLE))]

    @property
    def examples(self) -> list[Any]:
        """What it was made of, in the order of the data: examples, or groups."""
        return self._rows.items

    @property
    def rows(self) -> list[list[int]]:
        """The examples of every row."""
        return self._rows.plan

    @property
    def lengths(self) -> tuple[int, ...]:
        """The row lengths T that can occur; S where members share a row."""
        return tuple(sorted({length for _, length in self.layouts})) or self._rows.widths

    @property
    def layouts(self) -> tuple[Shape, ...]:
        """(R, S): how many rows the groups of a block can take, and how long, where members share rows."""
        return self._rows.shapes

    @property
    def group(self) -> int:
        """G of its batches."""
        return self._rows.group

    @property
    def rotated(self) -> bool:
        """Whether a row borrows the answer of another one."""
        return self._rows.rotated

    @property
    def members(self) -> int:
        """Sequences that the model sees of a row: G, or at most 1 where the members share it."""
        return 1 if self._rows.members_in else self.group

    def abstract(self) -> list[Batch]:
        """Shapes and dtypes of this process's batches [A, B_local, G, T], all that can occur, the smallest
        first: as many compilations as there are."""
        return self._rows.abstract((self.accumulation, self._local.stop - self._local.start))

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of `abstract` alone."""
        return [batch.tokens.shape for batch in self.abstract()]

    @property
    def steps_per_epoch(self) -> int:
        """Updates after which every row was seen at least once."""
        return self.steps(1.0)

    def steps(self, epochs: float) -> int:
        """Updates that make `epochs` passes over the rows, the last one rounded up; at least 1."""
        return self.order.steps(epochs)

    @property
    def stats(self) -> BatchStats:
        """Counts of one epoch."""
        examples = self._rows.own_members
        tokens = sum(len(e.tokens) for e in examples)
        return BatchStats(
            examples=len(self.examples),
            rows=len(self.rows),
            tokens=tokens,
            targets=int(sum(e.mask[1:].sum() for e in examples)),
            pad_share=self._pad_share(tokens),
            longest=int(self._rows.sizes.max()),
        )

    def _pad_share(self, tokens: int) -> float:
        rows = self._rows
        if rows.members_in:
            held, computed, _ = rows.work(map(rows.lengths, self._sample))
            return 1.0 - held / computed
        widths = np.asarray(rows.widths)[np.searchsorted(rows.widths, rows.sizes)]
        return 1.0 - tokens / (float(widths.sum()) * (1 if rows.rotated else self.group))

    @property
    def fingerprint(self) -> str:
        """sha256 over token ids, masks and what decides the order, so not accumulation or processes."""
        digest = hashlib.sha256(json.dumps(self._settings | self.order.identity, sort_keys=True).encode())
        for item in self.examples:
            if isinstance(item, Group):
                digest.update(len(item.members).to_bytes(8, "little"))
                for name in sorted(item.aux):
                    digest.update(name.encode() + np.asarray(item.aux[name], np.float32).tobytes())
            for example in members_of(item):
                digest.update(len(example.tokens).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
                digest.update(np.packbits(example.mask).tobytes())
        return digest.hexdigest()

    def row_indices(self, step: int) -> np.ndarray:
        """Indices into `rows` of one update, [A, B] over all processes."""
        return self.order.at(step).reshape(self.accumulation, -1)

    def batch(self, step: int) -> Batch:
        """The micro-batches of one update on this process."""
        return self._rows.batch(self.row_indices(step), self._local)

    def ids(self, step: int) -> list[str]:
        """Ids of the examples in one update, over all processes."""
        return [self.examples[i].id for row in self.row_indices(step).ravel() for i in self.rows[row]]


def eval_batches(
    examples: Sequence[Item],
    *,
    batch_size: int,
    max_length: int,
    packing: bool = False,
    group: int | None = None,
    share: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    buckets: Sequence[int] | None = None,
    pad_id: int = 0,
    blocks: int | None = None,
) -> Iterator[Batch]:
    """Every example or group once, as batches with leaves [B_local, G, T], which `BatchSource` explains.

    The last batch is filled with rows of padding (segments 0, nothing learned), so that shapes stay few. Rows
    go by length, so that little is padded; every process gets equally many batches.
    """
    _check_sizes(batch_size, 1, process_count, process_index)
    rows = arrange(
        examples,
        max_length=max_length,
        packing=packing,
        group=group,
        share=share,
        buckets=buckets,
        pad_id=pad_id,
    )
    steps = list(by_length(rows, batch_size))
    rows = in_blocks(rows, groups_of(blocks or process_count, batch_size), steps)
    mine = local_rows(batch_size, process_index, process_count)
    for wanted in steps:
        yield rows.batch(wanted, mine)


def by_length(rows: Rows, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of every batch [B], the shortest first; the last batch is filled up with `PADDING`."""
    order = np.argsort(rows.sizes, kind="stable")
    full = np.full(round_up(len(order), batch_size), PADDING)
    full[: len(order)] = order
    yield from full.reshape(-1, batch_size)


def groups_of(blocks: int, rows: int) -> int:
    """The groups of each block of a batch. Raises `UserError` where they do not divide."""
    if rows % blocks:
        raise UserError(f"{rows} rows of a batch do not divide over {blocks} devices")
    return rows // blocks


def local_rows(rows: int, index: int, count: int) -> slice:
    """The rows of a batch that process `index` of `count` holds."""
    return slice(rows // count * index, rows // count * (index + 1))


def _check_sizes(batch_size: int, accumulation: int, process_count: int, process_index: int) -> None:
    """Raise `UserError` unless the rows of an update divide evenly."""
    if min(batch_size, accumulation, process_count) < 1 or not 0 <= process_index < process_count:
        raise UserError(f"batch_size={batch_size}, grad_accumulation={accumulation}: both must be at least 1")
    if batch_size % (accumulation * process_count):
        parts = f"grad_accumulation={accumulation} x {process_count} processes"
        nearest = round_up(batch_size, accumulation * process_count)
        raise UserError(
            f"batch_size={batch_size} does not divide by {parts}", remedy=f"try batch_size={nearest}"
        )
