"""The few shapes that sampling compiles, and how prompts of any length are shared out among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CALL = 128  # a prefill costs about as much as this many tokens more than its tokens do


def bucket(size: int, smallest: int = 1) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return 1 << (max(size, smallest, 1) - 1).bit_length()


def width(length: int, multiple: int = 16) -> int:
    """The smallest of the lengths in use that holds `length`: four to a power of two, but multiples of
    `multiple`."""
    step = max(multiple, bucket(length) // 8)
    return max(1, -(-length // step)) * step


def groups(lengths: Sequence[int], fewest: int = 1) -> Iterator[tuple[list[int], int, int]]:
    """Shares prompts out among prefills: (indices, rows, columns) of each, rows a power of two from `fewest`.

    Together they take the least padded tokens, `CALL` for each call included, of all cuts of the prompts in
    order of length whose pieces are full, but for the shortest one's.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first j prompts: tokens, and how many the last piece has
    for j in range(1, len(order) + 1):
        columns = width(lengths[order[j - 1]])
        pieces = {j, *(1 << k for k in range(j.bit_length()))}
        best.append(min((best[j - n][0] + bucket(n, fewest) * columns + CALL, n) for n in pieces))
    end = len(order)
    while end:
        count = best[end][1]
        yield order[end - count : end], bucket(count, fewest), width(lengths[order[end - 1]])
        end -= count
