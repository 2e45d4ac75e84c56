"""Members in one row: every token where the index says, and nothing twice that need not be."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.data.sharing import lay_out, shared_length, stem_length
from jaxalign.types import BRANCH, Example


def member(tokens: list[int], prompt: int) -> Example:
    return Example("x", np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


PAIR = [member([5, 6, 7, 10, 11], 3), member([5, 6, 7, 20], 3)]


@pytest.mark.parametrize(
    ("members", "stem"),
    [
        (PAIR, 2),  # the prompt's last token predicts both answers
        ([member([5, 6, 7, 10], 3)], 2),
        ([member([5, 6, 7, 10], 3), member([5, 9, 7, 10], 3)], 1),  # they part earlier
        ([member([5, 6, 7, 10], 3), member([5, 6, 7, 10], 2)], 1),  # one is trained earlier
        ([member([5, 6], 1), member([5, 7], 1)], 0),
        ([member([5, 6], 0), member([5, 7], 0)], 0),
        ([], 0),
    ],
)
def test_stem(members: list[Example], stem: int) -> None:
    assert stem_length(members) == stem


def test_a_row() -> None:
    shared = lay_out([PAIR, []], 9, (3, 6), pad_id=1)
    assert shared_length(PAIR) == 7
    one, two = 1 + BRANCH, 1 + 2 * BRANCH
    assert shared.tokens.tolist() == [[5, 6, 7, 10, 11, 7, 20, 1, 1], [1] * 9]
    assert shared.positions.tolist()[0] == [0, 1, 2, 3, 4, 2, 3, 0, 0]
    assert shared.segments.tolist()[0] == [1, 1, one, one, one, two, two, 0, 0]
    assert shared.index.tolist()[0] == [[0, 1, 2, 3, 4, 0], [0, 1, 5, 6, 0, 0], [0] * 6]
    assert not shared.segments[1].any()
    assert shared.index.shape == (2, 3, 6)


def test_the_index_finds_every_token() -> None:
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(20):
        prompt = rng.integers(0, 9, rng.integers(1, 12)).tolist()
        sizes = rng.integers(1, 9, rng.integers(1, 5))
        groups.append([member(prompt + rng.integers(0, 9, n).tolist(), len(prompt)) for n in sizes])
    width = max(shared_length(g) for g in groups)
    shared = lay_out(groups, width, (4, 24), pad_id=0)
    for b, members in enumerate(groups):
        for g, one in enumerate(members):
            where = shared.index[b, g, : len(one.tokens)]
            assert shared.tokens[b, where].tolist() == one.tokens.tolist()
            assert shared.positions[b, where].tolist() == list(range(len(one.tokens)))
        assert (shared.segments[b] != 0).sum() == shared_length(members)
