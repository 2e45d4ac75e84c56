"""The order of rows in stages: each row in its stage, no update over two, the same on every process."""

from __future__ import annotations

from itertools import pairwise

import jax
import numpy as np
import pytest

from jaxalign.data.batching import BatchSource
from jaxalign.data.order import Stage, Staged, by_file, by_gap, in_order, stage_ends
from jaxalign.errors import UserError
from tests.data.test_group_batches import pairs, same

GAPS = np.asarray([0.5, 3.0, 0.5, -1.0, 2.0, 3.0, 0.0, 1.0, 0.5, 2.5, -2.0, 0.25])


def staged(stages: list[Stage], epochs: float = 1.0, batch_size: int = 4, seed: int = 3) -> Staged:
    return Staged(stages, stage_ends(stages, batch_size, epochs, None), batch_size, seed)


def rows(stages: list[Stage]) -> list[list[int]]:
    return [stage.rows.tolist() for stage in stages]


def source(order: Staged | None, **options) -> BatchSource:
    return BatchSource(pairs(12), **{"batch_size": 4, "max_length": 128, "seed": 3, "order": order} | options)


def test_gaps_do_not_rise_from_stage_to_stage() -> None:
    """Equal gaps (0.5) go by their place: 0 and 2 into the second stage, 8 too, for it has room."""
    stages = by_gap(GAPS, 3, "rating_gap")
    assert rows(stages) == [[1, 4, 5, 9], [0, 2, 7, 8], [3, 6, 10, 11]]
    assert [stage.gap for stage in stages] == [(3.0, 2.0), (1.0, 0.5), (0.25, -2.0)]
    assert rows(by_gap(GAPS, 3, "rating_gap")) == rows(stages)
    uneven = by_gap(GAPS, 5, "")
    assert [len(stage.rows) for stage in uneven] == [3, 3, 2, 2, 2]
    gaps = [stage.gap for stage in uneven if stage.gap]
    assert all(before[1] >= after[0] for before, after in pairwise(gaps))


def test_parts_of_the_data_and_files() -> None:
    assert rows(in_order(7, 3)) == [[0, 1, 2], [3, 4], [5, 6]]
    files = by_file(["b", "b", "a", "b", "a"])
    assert rows(files) == [[0, 1, 3], [2, 4]]
    assert [stage.name for stage in files] == ["b", "a"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_row_once_in_each_pass_over_its_stage(epochs: int) -> None:
    stages = by_gap(GAPS, 3, "")
    order = staged(stages, epochs, batch_size=2)
    assert order.ends == (2 * epochs, 4 * epochs, 6 * epochs)
    assert order.steps(epochs) == order.ends[-1]
    assert order.begins == (2 * epochs, 4 * epochs)
    for stage, begin in zip(stages, (0, *order.begins), strict=True):
        for first in range(begin, begin + 2 * epochs, 2):
            seen = [row for step in range(first, first + 2) for row in order.at(step).tolist()]
            assert sorted(seen) == stage.rows.tolist()
    passes = [[r for s in (2 * e, 2 * e + 1) for r in order.at(s).tolist()] for e in range(epochs)]
    assert all(seen != stages[0].rows.tolist() for seen in passes)  # shuffled
    assert len({tuple(seen) for seen in passes}) == epochs  # anew


def test_no_update_takes_rows_of_two_stages() -> None:
    """5 + 4 rows in updates of 4: the first stage's second update is filled up with its own rows."""
    stages = in_order(9, 2)
    order = staged(stages)
    assert order.ends == (2, 3)
    taken = [order.at(step).tolist() for step in range(3)]
    assert sorted((taken[0] + taken[1])[:5]) == [0, 1, 2, 3, 4]
    assert set(taken[1]) < {0, 1, 2, 3, 4}
    assert sorted(taken[2]) == [5, 6, 7, 8]


def test_where_a_step_is() -> None:
    order = staged(by_gap(GAPS, 3, "rating_gap"))
    assert [order.facts(step) for step in range(4)] == [{"stage": n} for n in (1, 2, 3, 3)]
    assert order.line(1) == "stage 2 of 3: updates 2 to 2, 4 rows, rating_gap 1 to 0.5"
    assert order.report()[2] == {"rows": 4, "updates": [3, 3], "name": "rating_gap", "gap": (0.25, -2.0)}
    plain = source(None).order
    assert (plain.begins, plain.facts(1), plain.line(1), plain.report()) == ((), {}, "", [])


@pytest.mark.parametrize(
    ("sizes", "updates", "ends"), [((4, 4), 6, (3, 6)), ((10, 5, 5), 8, (4, 6, 8)), ((9, 1), 10, (9, 10))]
)
def test_max_steps_are_shared_out_by_rows(
    sizes: tuple[int, ...], updates: int, ends: tuple[int, ...]
) -> None:
    assert stage_ends([Stage(np.arange(n)) for n in sizes], 4, 1.0, updates) == ends


def test_too_few_updates_or_rows() -> None:
    with pytest.raises(UserError, match="2 updates leave none to stage 2 of 3") as caught:
        stage_ends(in_order(9, 3), 4, 1.0, 2)
    assert "max_steps" in str(caught.value)
    for make in (lambda: in_order(2, 3), lambda: by_gap(np.zeros(2), 3, "")):
        with pytest.raises(UserError, match="2 rows do not make 3 stages"):
            make()


def test_batches_are_a_function_of_the_step() -> None:
    order = staged(by_gap(GAPS, 3, ""))
    once = [source(order).batch(step) for step in range(3)]
    late = source(staged(by_gap(GAPS, 3, "")))
    assert all(same(late.batch(step), once[step]) for step in (2, 0, 1))
    assert sorted(late.ids(1)) == ["0", "2", "7", "8"]


def test_processes_share_what_one_process_would_see() -> None:
    order = staged(by_gap(GAPS, 3, ""))
    alone = source(order, accumulation=2)
    parts = [source(order, accumulation=2, process_index=p, process_count=2) for p in range(2)]
    for step in range(3):
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part.batch(step) for part in parts))
        assert same(joined, alone.batch(step))
    assert {part.fingerprint for part in parts} == {alone.fingerprint}


def test_stages_cost_no_shapes_and_are_part_of_the_identity() -> None:
    plain, one, two = source(None), source(staged(by_gap(GAPS, 3, ""))), source(staged(by_gap(GAPS, 2, "")))
    assert plain.shapes == one.shapes
    assert plain.stats == one.stats
    longer = source(staged(by_gap(GAPS, 3, ""), epochs=2))
    assert len({s.fingerprint for s in (plain, one, two, longer)}) == 4
