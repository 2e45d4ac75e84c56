import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.packing import best_fit, fill_row, round_up
from jaxalign.types import Example


def example(tokens, mask=None, name="x"):
    tokens = np.asarray(tokens, np.int32)
    return Example(name, tokens, np.ones(len(tokens), bool) if mask is None else np.asarray(mask, bool))


def test_vector_packing_masks():
    path = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"
    if not path.exists():
        pytest.skip("the published loss vectors are not beside the checkout")
    vector = json.loads(path.read_text())["packing_masks"]
    tokens, mask, segments, positions = fill_row([example([7, 8, 9]), example([4, 5])], 6, 0)
    assert tokens.tolist() == vector["inputs"]["input_ids"][0]
    assert segments.tolist() == vector["inputs"]["segment_ids"][0]
    assert positions.tolist() == vector["expected"]["positions"][0]
    # mask[t] says that t is a target; the vector says that t predicts t + 1.
    assert mask[1:].astype(int).tolist() == vector["expected"]["loss_mask_shifted"][0]
    allowed = (segments[:, None] == segments[None]) & (segments[:, None] > 0) & np.tri(6, dtype=bool)
    assert allowed.astype(int).tolist() == vector["expected"]["attention_allowed"][0]


def test_fill_row_by_hand():
    tokens, mask, segments, positions = fill_row([example([7, 8, 9], [0, 0, 1]), example([4, 5])], 7, 99)
    assert tokens.tolist() == [7, 8, 9, 4, 5, 99, 99]
    assert mask.tolist() == [False, False, True, False, True, False, False]
    assert segments.tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_best_fit_by_hand():
    # 6 opens row 0, 5 opens row 1, 4 fits row 0 exactly, 3 goes beside 5, and 2 there too.
    assert best_fit([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]
    # Least sufficient space: 2 goes to the row with 2 free, not to the one with 3.
    assert best_fit([7, 8, 2], 10) == [[1, 2], [0]]


def test_ties_go_by_index():
    assert best_fit([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


def test_an_example_over_capacity_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([3, 11], 10)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 64), max_size=120))
def test_packing_loses_nothing_and_never_overflows(lengths):
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert rows == best_fit(np.asarray(lengths), 64)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // 64))  # any two rows of a best fit exceed one capacity


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 5))
def test_rows_hold_their_examples(masks, spare):
    examples = [example(range(100 * n, 100 * n + len(mask)), mask) for n, mask in enumerate(masks)]
    length = sum(map(len, masks)) + spare
    tokens, mask, segments, positions = fill_row(examples, length, 7)
    assert (segments > 0).sum() == length - spare
    for number, one in enumerate(examples, start=1):
        here = segments == number
        assert tokens[here].tolist() == one.tokens.tolist()
        assert positions[here].tolist() == list(range(len(one.tokens)))
        assert mask[here].tolist() == [False, *one.mask[1:].tolist()]
    assert not mask[segments == 0].any()


def test_round_up():
    assert [round_up(n) for n in (1, 64, 65)] == [64, 64, 128]
