"""Members in one row: every token where the index says, and nothing twice that need not be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.sharing import lay_out, rows_needed, shared_length, stem_length
from jaxalign.models.attention import causal
from jaxalign.types import BRANCH, Example, Shared


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
    shared = lay_out([[PAIR], [[]]], (1, 9), (3, 6), pad_id=1)
    assert shared_length(PAIR) == 7
    one, two = 1 + BRANCH, 1 + 2 * BRANCH
    assert shared.tokens.tolist() == [[[5, 6, 7, 10, 11, 7, 20, 1, 1]], [[1] * 9]]
    assert shared.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 0]
    assert shared.segments[0, 0].tolist() == [1, 1, one, one, one, two, two, 0, 0]
    assert shared.index[0, 0].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 5, 6, 0, 0], [0] * 6]
    assert not shared.segments[1].any()
    assert shared.index.shape == (2, 1, 3, 6)


def test_groups_in_one_row() -> None:
    """By hand: the longer group opens the first row, the shorter one follows it as segment 2."""
    short = [member([8, 9], 1), member([8, 4], 1)]
    shared = lay_out([[short, PAIR, [], PAIR]], (2, 12), (2, 6), pad_id=0)
    one, two = BRANCH, 2 * BRANCH
    assert shared.tokens[0].tolist() == [
        [5, 6, 7, 10, 11, 7, 20, 8, 9, 8, 4, 0],
        [5, 6, 7, 10, 11, 7, 20] + [0] * 5,
    ]
    branches = [2 + one, 2 + one, 2 + two, 2 + two]
    assert shared.segments[0, 0].tolist() == [1, 1, *[1 + one] * 3, *[1 + two] * 2, *branches, 0]
    assert shared.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 0]
    assert shared.index[0, 0].tolist() == [[7, 8, 0, 0, 0, 0], [9, 10, 0, 0, 0, 0]]
    assert shared.index[0, 3].tolist() == [[12, 13, 14, 15, 16, 0], [12, 13, 17, 18, 0, 0]]


answers = st.lists(st.integers(1, 8), min_size=0, max_size=4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 11), answers), min_size=1, max_size=12), st.data())
def test_the_index_finds_every_token(sizes: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    """Whatever the number of rows; a token sees its own prompt and its own answer, and nothing else."""
    rng = np.random.default_rng(0)
    groups = []
    for prompt, lengths in sizes:
        stem = rng.integers(0, 9, prompt).tolist()
        groups.append([member(stem + rng.integers(0, 9, n).tolist(), prompt) for n in lengths])
    held = [shared_length(g) for g in groups]
    width = max(1, max(held)) + data.draw(st.integers(0, 40))
    rows = data.draw(st.integers(max(1, rows_needed(held, width)), len(groups)))
    shared = lay_out([groups], (rows, width), (4, 24), pad_id=0)
    tokens, segments, positions = (x.reshape(-1) for x in (shared.tokens, shared.segments, shared.positions))
    seen = allowed(shared)
    for b, members in enumerate(groups):
        for g, one in enumerate(members):
            where = shared.index[0, b, g, : len(one.tokens)]
            assert tokens[where].tolist() == one.tokens.tolist()
            assert positions[where].tolist() == list(range(len(one.tokens)))
            for t, place in enumerate(where):
                assert np.flatnonzero(seen[place]).tolist() == sorted(where[: t + 1])
    assert (segments != 0).sum() == sum(held)


def allowed(shared: Shared) -> np.ndarray:
    """bool [R S, R S] of the only block: what the model's attention lets a token see."""
    _, rows, length = shared.tokens.shape
    out = np.zeros((rows, length, rows, length), bool)
    for r in range(rows):
        out[r, :, r] = causal(shared.segments[:, r], shared.positions[:, r], 0)[0]
    return out.reshape(rows * length, -1)
