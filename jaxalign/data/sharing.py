"""Groups of answers with their common prompt laid out once: the model then computes it once.

Groups may stand in one row together: those of one block, which lie on one device with its rows, so that the
way from rows to answers leads over no other device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.packing import best_fit
from jaxalign.types import BRANCH, Example, Shared


def stem_length(members: Sequence[Example]) -> int:
    """Tokens that all members share and of which none predicts a target.

    The last token of the prompt predicts the first of every answer, so that each branch needs its own.
    """
    if not members:
        return 0
    ends = [int(m.mask.argmax()) if m.mask.any() else len(m.tokens) for m in members]
    limit = max(0, min(*ends, *(len(m.tokens) for m in members)) - 1)
    first = members[0].tokens[:limit]
    same = np.ones(limit, bool)
    for member in members[1:]:
        same &= member.tokens[:limit] == first
    return limit if same.all() else int(same.argmin())


def shared_length(members: Sequence[Example]) -> int:
    """Tokens of the group's row: the stem and the branches."""
    stem = stem_length(members)
    return stem + sum(len(m.tokens) - stem for m in members)


def rows_needed(sizes: Sequence[int], length: int) -> int:
    """Rows of `length` tokens that groups of these sizes take together; 0 is a group that holds nothing."""
    return len(_together(sizes, length))


def places(sizes: Sequence[int], rows: int, length: int) -> list[tuple[int, int]]:
    """(first token, segment) of every group of a block; the tokens of its `rows` rows are counted row by row.

    As many rows as groups: each has its own. Fewer: they go together by best fit, a function of the sizes.
    """
    if rows == len(sizes):
        return [(row * length, 1) for row in range(rows)]
    out = [(0, 1)] * len(sizes)
    for row, held in enumerate(_together(sizes, length)):
        at = row * length
        for segment, group in enumerate(held, start=1):
            out[group] = (at, segment)
            at += sizes[group]
    return out


def _together(sizes: Sequence[int], length: int) -> list[list[int]]:
    """The groups of every row."""
    real = np.flatnonzero(sizes)
    return [real[row].tolist() for row in best_fit(np.asarray(sizes)[real], length)]


def lay_out(
    blocks: Sequence[Sequence[Sequence[Example]]], rows: tuple[int, int], shape: tuple[int, int], pad_id: int
) -> Shared:
    """N blocks of n groups in rows [N, R, S], `rows` = (R, S), and the index of their members [N, n, G, T],
    `shape` = (G, T). `places` says where a group lies."""
    tokens = np.full((len(blocks), rows[0] * rows[1]), pad_id, np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    index = np.zeros((len(blocks), len(blocks[0]), *shape), np.int32)
    for b, groups in enumerate(blocks):
        found = places([shared_length(members) for members in groups], *rows)
        for n, (members, (at, segment)) in enumerate(zip(groups, found, strict=True)):
            _write((tokens[b], segments[b], positions[b]), index[b, n], members, at, segment)
    tokens, segments, positions = (x.reshape(-1, *rows) for x in (tokens, segments, positions))
    return Shared(tokens, segments, positions, index)


def _write(
    block: tuple[np.ndarray, ...], index: np.ndarray, members: Sequence[Example], at: int, segment: int
) -> None:
    """One group into (tokens, segments, positions) [R S] of its block from token `at` on, and its `index`
    [G, T]."""
    tokens, segments, positions = block
    stem = stem_length(members)
    begin = slice(at, at + stem)
    if members:
        tokens[begin] = members[0].tokens[:stem]
        segments[begin], positions[begin] = segment, np.arange(stem)
    end = begin.stop
    for g, member in enumerate(members):
        size = len(member.tokens)
        branch = slice(end, end + size - stem)
        tokens[branch], positions[branch] = member.tokens[stem:], np.arange(stem, size)
        segments[branch] = segment + (g + 1) * BRANCH
        index[g, :stem] = np.arange(begin.start, begin.stop)
        index[g, stem:size] = np.arange(branch.start, branch.stop)
        end = branch.stop
