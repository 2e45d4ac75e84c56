"""Shapes of the rows that the groups of a block share: a few, chosen so that steps compute little padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.packing import BUCKETS, round_up
from jaxalign.data.sharing import rows_needed

Shape = tuple[int, int]  # (R rows, S tokens in each)

ATTENTION = 8192  # row length at which attention is about as much work as all else, in a small model
WIDTHS = 8  # row lengths that are looked at
WORTH = 0.01  # share of all work that one more shape must save: each is compiled


def cost(shape: Shape) -> float:
    """What rows of this shape cost, in tokens of a short row."""
    rows, length = shape
    return rows * length * (1 + length / ATTENTION)


def holds(shape: Shape, blocks: np.ndarray) -> bool:
    """Whether the groups of every block go into rows of that shape; `blocks` [N, n], their lengths."""
    rows, length = shape
    if length < blocks.max(initial=0):
        return False
    return rows >= blocks.shape[1] or all(rows_needed(block, length) <= rows for block in blocks.tolist())


def choose(steps: Sequence[np.ndarray], block: int, longest: int) -> tuple[Shape, ...]:
    """At most four shapes for steps like these, the cheapest first; each step takes the first that holds it.

    `steps`: of each the lengths of its groups [N, n = block]. The last shape, n rows of `longest`, holds any
    step. The others are added one by one, each time the one that saves most.
    """
    whole = (block, longest)
    reach = sorted({round_up(int(blocks.max())) for blocks in steps} | {longest})
    places = np.linspace(0, len(reach) - 1, WIDTHS).round().astype(int)
    widths = [reach[i] for i in dict.fromkeys(places.tolist())]
    needs = np.asarray([[_needed(blocks, width, block) for width in widths] for blocks in steps])
    found = {(int(rows), width) for of in needs for rows, width in zip(of, widths, strict=True) if rows}
    others = sorted(found - {whole}, key=cost)
    spent, chosen = np.full(len(steps), cost(whole)), [whole]
    while len(chosen) < BUCKETS and others:
        saved = [_saved(shape, needs[:, widths.index(shape[1])], spent) for shape in others]
        best = int(np.argmax([of.sum() for of in saved]))
        if saved[best].sum() < WORTH * spent.sum():
            break
        spent = spent - saved[best]
        chosen.append(others.pop(best))
    return tuple(sorted(chosen, key=cost))


def _needed(blocks: np.ndarray, width: int, block: int) -> int:
    """The rows of that length which every block gets along with; 0 where a group is longer."""
    if width < blocks.max():
        return 0
    return min(block, max(rows_needed(one, width) for one in blocks.tolist()))


def _saved(shape: Shape, needed: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """What each step saves with this shape over what it takes now."""
    fits = (needed > 0) & (needed <= shape[0])
    return np.where(fits, np.maximum(spent - cost(shape), 0.0), 0.0)
