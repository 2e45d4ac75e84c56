"""Groups of answers with their common prompt laid out once: the model then computes it once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def lay_out(groups: Sequence[Sequence[Example]], length: int, shape: tuple[int, int], pad_id: int) -> Shared:
    """Rows [B, S = length] of B groups, and the index of their members [B, G, T], `shape` = (G, T)."""
    rows = (len(groups), length)
    tokens, index = np.full(rows, pad_id, np.int32), np.zeros((len(groups), *shape), np.int32)
    segments, positions = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for b, members in enumerate(groups):
        stem = stem_length(members)
        if members:
            tokens[b, :stem] = members[0].tokens[:stem]
            segments[b, :stem], positions[b, :stem] = 1, np.arange(stem)
        at = stem
        for g, member in enumerate(members):
            size = len(member.tokens)
            branch = slice(at, at + size - stem)
            tokens[b, branch], positions[b, branch] = member.tokens[stem:], np.arange(stem, size)
            segments[b, branch] = 1 + (g + 1) * BRANCH
            index[b, g, :stem] = np.arange(stem)
            index[b, g, stem:size] = np.arange(branch.start, branch.stop)
            at = branch.stop
    return Shared(tokens, segments, positions, index)
