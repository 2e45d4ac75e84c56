"""Batches by step number. The order is a pure function of (seed, step), so the step is the data position."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.data.packing import best_fit, fill_row, round_up
from jaxalign.errors import UserError
from jaxalign.types import Batch, Example

BUCKETS = 4  # row lengths at most: each costs a compilation


@dataclass(frozen=True)
class BatchStats:
    """What one epoch holds. `tokens` are real ones. `pad_share` is of rows laid out each in its bucket;
    a step widens them to its longest row, so that unpacked it is a lower bound."""

    examples: int
    rows: int
    tokens: int
    targets: int
    pad_share: float
    longest: int


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` rows in one epoch: a function of its arguments on every machine and numpy release.

    It ranks raw Philox words, which numpy guarantees; `Generator.permutation` may change between releases.
    """
    words = np.random.Philox(key=np.asarray([seed % 2**64, epoch], np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")


def bucket_lengths(longest: int, count: int = BUCKETS) -> tuple[int, ...]:
    """At most `count` row lengths, multiples of 64 in even steps, the last of which takes `longest`."""
    top = round_up(longest)
    return tuple(sorted({min(round_up(math.ceil(top * i / count)), top) for i in range(1, count + 1)}))


class BatchSource:
    """Training batches: `batch(step)` gives numpy leaves [A, B_local, G=1, T].

    `batch_size` rows make one update: A = `accumulation` micro-batches of B rows over all processes. Process
    p of n holds rows p*B/n to (p+1)*B/n of every micro-batch, so all together hold what one process would.
    Rows run through epoch after epoch, each in its own order; a step may span two epochs, so that no step is
    smaller. `packing` puts several examples into a row; otherwise a row is one example, and a step's T is the
    smallest of `buckets` that takes its longest row (the same on every process).

    Raises `UserError` for sizes that do not divide, no examples, or an example over `max_length`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_length: int,
        accumulation: int = 1,
        packing: bool = False,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        buckets: Sequence[int] | None = None,
        pad_id: int = 0,
    ) -> None:
        _check_sizes(batch_size, accumulation, process_count, process_index)
        self.examples, self.pad_id, self.seed = list(examples), pad_id, seed
        self.batch_size, self.accumulation, self.packing = batch_size, accumulation, packing
        self._local = slice(*_share(batch_size // accumulation, process_index, process_count))
        lengths = _lengths(self.examples, max_length)
        capacity = round_up(max_length)
        plan = best_fit(lengths, capacity) if packing else [[i] for i in range(len(lengths))]
        self.rows: list[list[int]] = plan
        """the examples of every row"""
        self._row_lengths = np.asarray([int(lengths[row].sum()) for row in plan])
        longest = int(self._row_lengths.max())
        chosen = (round_up(longest),) if packing else _buckets(buckets, longest)
        self.lengths: tuple[int, ...] = chosen
        """the row lengths T that can occur"""
        self._settings = {
            "batch_size": batch_size,
            "packing": packing,
            "max_length": max_length,
            "seed": seed,
        }
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Every shape [A, B_local, G, T] that can occur: as many compilations as there are."""
        local = self._local.stop - self._local.start
        return [(self.accumulation, local, 1, length) for length in self.lengths]

    @property
    def steps_per_epoch(self) -> int:
        """Updates after which every row was seen at least once."""
        return self.steps(1.0)

    def steps(self, epochs: float) -> int:
        """Updates that make `epochs` passes over the rows, the last one rounded up; at least 1."""
        return max(1, math.ceil(epochs * len(self.rows) / self.batch_size - 1e-9))

    @property
    def stats(self) -> BatchStats:
        """Counts of one epoch."""
        tokens = int(self._row_lengths.sum())
        widths = np.asarray(self.lengths)[np.searchsorted(self.lengths, self._row_lengths)]
        return BatchStats(
            examples=len(self.examples),
            rows=len(self.rows),
            tokens=tokens,
            targets=int(sum(e.mask[1:].sum() for e in self.examples)),
            pad_share=1.0 - tokens / float(widths.sum()),
            longest=int(self._row_lengths.max()),
        )

    @property
    def fingerprint(self) -> str:
        """sha256 over token ids, masks and what decides the order, so not accumulation or processes."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        for example in self.examples:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
            digest.update(np.packbits(example.mask).tobytes())
        return digest.hexdigest()

    def row_indices(self, step: int) -> np.ndarray:
        """Indices into `rows` of one update, [A, B] over all processes."""
        flat = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(flat, len(self.rows))
        picked = [self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(picked).reshape(self.accumulation, -1)

    def _epoch(self, epoch: int) -> np.ndarray:
        known, order = self._order  # a cache, not a state: any step may be asked for, from any thread
        if known != epoch:
            order = permutation(self.seed, epoch, len(self.rows))
            self._order = (epoch, order)
        return order

    def batch(self, step: int) -> Batch:
        """The micro-batches of one update on this process."""
        wanted = self.row_indices(step)
        longest = int(self._row_lengths[wanted].max())
        length = next(width for width in self.lengths if width >= longest)
        mine = wanted[:, self._local]
        rows = [[self.examples[i] for i in self.rows[row]] for row in mine.ravel()]
        return stack(rows, length, self.pad_id, (*mine.shape, 1))

    def ids(self, step: int) -> list[str]:
        """Ids of the examples in one update, over all processes."""
        return [self.examples[i].id for row in self.row_indices(step).ravel() for i in self.rows[row]]


def stack(rows: Sequence[Sequence[Example]], length: int, pad_id: int, leading: tuple[int, ...]) -> Batch:
    """Rows of examples as a `Batch` with leaves [*leading, T = length]."""
    filled = [fill_row(row, length, pad_id) for row in rows]
    arrays = (np.stack(leaf).reshape(*leading, length) for leaf in zip(*filled, strict=True))
    tokens, mask, segments, positions = arrays
    return Batch(tokens, mask, segments, positions)


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    packing: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    buckets: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Every example once, as batches with leaves [B_local, G=1, T].

    The last batch is filled with rows of padding (segments 0, nothing learned), so that shapes stay few. Rows
    go by length, so that little is padded; every process gets equally many batches.
    """
    _check_sizes(batch_size, 1, process_count, process_index)
    lengths = _lengths(examples, max_length)
    plan = best_fit(lengths, round_up(max_length)) if packing else [[i] for i in range(len(lengths))]
    sizes = np.asarray([int(lengths[row].sum()) for row in plan])
    widths = (round_up(int(sizes.max())),) if packing else _buckets(buckets, int(sizes.max()))
    order = np.argsort(sizes, kind="stable")
    first, last = _share(batch_size, process_index, process_count)
    for begin in range(0, len(order), batch_size):
        wanted = order[begin : begin + batch_size]
        width = next(w for w in widths if w >= int(sizes[wanted].max()))
        rows = [[examples[i] for i in plan[row]] for row in wanted.tolist()]
        rows += [[]] * (batch_size - len(rows))
        yield stack(rows[first:last], width, pad_id, (last - first, 1))


def _share(rows: int, index: int, count: int) -> tuple[int, int]:
    return rows // count * index, rows // count * (index + 1)


def _lengths(examples: Sequence[Example], max_length: int) -> np.ndarray:
    """Length of every example, int64 [N]. Raises `UserError` for none, or one over `max_length`."""
    if not examples:
        raise UserError(
            "no examples to make batches of", remedy="look at the rows with `jaxalign inspect data`"
        )
    lengths = np.asarray([len(e.tokens) for e in examples], np.int64)
    worst = int(lengths.argmax())
    if lengths[worst] > max_length:
        cause = f"example {examples[worst].id} has {lengths[worst]} tokens, more than max_length={max_length}"
        raise UserError(cause, remedy="tokenize with the same max_length")
    return lengths


def _buckets(given: Sequence[int] | None, longest: int) -> tuple[int, ...]:
    """The row lengths in use: those given, as far as rows reach, or an even few. Raises `UserError`."""
    if given is None:
        return bucket_lengths(longest)
    lengths = sorted({round_up(b) for b in given})
    if not lengths or lengths[-1] < longest:
        cause = f"buckets {list(given)} end below the longest row, {longest} tokens"
        raise UserError(cause, remedy="add a bucket, or lower max_length")
    fits = next(i for i, width in enumerate(lengths) if width >= longest)
    return tuple(lengths[: fits + 1])


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
