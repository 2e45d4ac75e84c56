"""Row lengths, which examples share a row (deterministic best-fit decreasing), and the row as arrays."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from jaxalign.errors import UserError
from jaxalign.types import Example

MULTIPLE = 64  # row lengths are multiples of it: tiles stay whole and shapes few
BUCKETS = 4  # row lengths at most: each costs a compilation


def round_up(length: int, multiple: int = MULTIPLE) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def bucket_lengths(longest: int, count: int = BUCKETS) -> tuple[int, ...]:
    """At most `count` row lengths, multiples of 64 in even steps, the last of which takes `longest`."""
    top = round_up(longest)
    return tuple(sorted({min(round_up(math.ceil(top * i / count)), top) for i in range(1, count + 1)}))


def bucket_widths(given: Sequence[int] | None, longest: int) -> tuple[int, ...]:
    """The row lengths in use: those given, as far as rows reach, or an even few. Raises `UserError`."""
    if given is None:
        return bucket_lengths(longest)
    lengths = sorted({round_up(b) for b in given})
    if not lengths or lengths[-1] < longest:
        cause = f"buckets {list(given)} end below the longest row, {longest} tokens"
        raise UserError(cause, remedy="add a bucket, or lower max_length")
    fits = next(i for i, width in enumerate(lengths) if width >= longest)
    return tuple(lengths[: fits + 1])


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of example indices, each with a total length of at most `capacity`.

    Longest first, ties by index; each into the open row with the least space that suffices, ties by row; else
    into a new row. The same lengths give the same rows. Raises `ValueError` for an example over `capacity`.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and int(sizes.max()) > capacity:
        raise ValueError(f"an example of {int(sizes.max())} tokens does not fit rows of {capacity}")
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted; full rows are not in it
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        at = bisect_left(space, (size, -1))
        if at < len(space):
            free, row = space.pop(at)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        if free > size:
            insort(space, (free - size, row))
    return rows


def fill_row(
    examples: Sequence[Example], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, segments, positions), each [T = length], of a row that holds the examples in order.

    Segments count from 1, padding is 0. Positions restart at 0. The first token of a segment is never a
    target: its predecessor belongs to another example. No example: a row of padding.
    """
    tokens = np.full(length, pad_id, np.int32)
    mask = np.zeros(length, bool)
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    at = 0
    for number, example in enumerate(examples, start=1):
        end = at + len(example.tokens)
        tokens[at:end], mask[at:end] = example.tokens, example.mask
        segments[at:end], positions[at:end] = number, np.arange(end - at)
        mask[at] = False
        at = end
    return tokens, mask, segments, positions
