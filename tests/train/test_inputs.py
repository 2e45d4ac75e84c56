"""Splitting and sizing the data, and what does not fit the model."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.data.batching import BatchSource
from jaxalign.errors import UserError
from jaxalign.train.inputs import Inputs, check_fit, default_batch_size, split, total_steps
from jaxalign.train.settings import TrainConfig
from jaxalign.types import Example

ROWS = [Example(f"e{i}", np.full(4 + i % 3, i, np.int32), np.arange(4 + i % 3) > 1) for i in range(20)]


def _ids(examples: list[Example]) -> list[str]:
    return [e.id for e in examples]


def test_split_is_a_partition_in_order_and_repeatable() -> None:
    train, held_out = split(ROWS, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(_ids(train) + _ids(held_out)) == sorted(_ids(ROWS))
    assert _ids(train) == [i for i in _ids(ROWS) if i in set(_ids(train))]
    assert _ids(split(ROWS, 0.25, seed=3)[1]) == _ids(held_out)
    assert _ids(split(ROWS, 0.25, seed=4)[1]) != _ids(held_out)


def test_split_holds_out_at_least_one_and_leaves_something() -> None:
    assert len(split(ROWS, 0.001, seed=0)[1]) == 1
    with pytest.raises(UserError, match="leaves none to train on"):
        split(ROWS[:2], 0.9, seed=0)


@pytest.mark.parametrize(
    ("shards", "accumulation", "rows"), [(1, 1, 8), (8, 1, 8), (3, 1, 9), (4, 4, 16), (256, 1, 256)]
)
def test_default_batch_size_divides_everywhere(shards: int, accumulation: int, rows: int) -> None:
    assert default_batch_size(shards, accumulation) == rows


def _source() -> BatchSource:
    return BatchSource(ROWS, batch_size=8, max_length=64)


def test_total_steps() -> None:
    assert total_steps(TrainConfig(epochs=2), _source()) == 5
    assert total_steps(TrainConfig(epochs=2, max_steps=7), _source()) == 7


def test_what_the_model_does_not_have() -> None:
    inputs = Inputs(_source(), [], {})
    check_fit(inputs, vocab_size=20, max_positions=6)
    with pytest.raises(UserError, match="makes token 19, the model knows 0 to 18"):
        check_fit(inputs, vocab_size=19, max_positions=6)
    with pytest.raises(UserError, match="a row has 6 tokens, the model has 5 positions") as caught:
        check_fit(inputs, vocab_size=20, max_positions=5)
    assert "max_length=5" in str(caught.value)


def test_identity_names_what_a_changed_data_set_changed() -> None:
    one, two = (
        Inputs(BatchSource(r, batch_size=8, max_length=64), [], {}).identity for r in (ROWS, ROWS[:19])
    )
    assert (one["examples"], two["examples"]) == (20, 19)
    assert one["fingerprint"] != two["fingerprint"]
