"""Rows and batches that a method cannot learn from: left out and counted, or refused with a remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxalign.data.batching import BatchSource
from jaxalign.errors import UserError
from jaxalign.registry import OBJECTIVES
from jaxalign.train.needs import check_batches, fit_needs, lines, one_sided
from jaxalign.train.settings import config_for
from jaxalign.types import Example, Group

GOOD: dict[str, Any] = {"margin": np.float32(1), "safe": np.array([True, False])}


def example(count: int = 4) -> Example:
    return Example("e", np.arange(count, dtype=np.int32), np.arange(count) > 1)


def groups(*aux: dict[str, Any]) -> list[Group]:
    return [Group(f"id{i}", (example(),), x, place=f"rows.jsonl:{i + 1}") for i, x in enumerate(aux)]


@pytest.mark.parametrize(
    ("method", "keys", "aux", "said"),
    [
        ("odpo", {}, {"margin": np.float32(0)}, "have a margin that is not above 0"),
        ("odpo", {}, {"margin": np.float32("nan")}, "have no margin"),
        ("mix", {"losses": {"odpo": 1, "sft": 1}}, {"margin": np.float32(0)}, "have a margin that is not"),
        ("cost", {}, {"margin": np.float32(1)}, "do not say whether each answer is safe"),
        ("cost", {}, {"safe": np.array([False, True])}, "prefer an unsafe answer to a safe one"),
        ("reward", {"margin_weight": 1.0}, {"margin": np.float32("nan")}, "have no margin"),
        ("reward_rating", {}, {"scores": np.array([5.0, 1.0])}, "outside lowest=0 to highest=1"),
        ("lipo", {"labels": "scores"}, {"scores": np.array([-1.0, 1.0])}, "have scores outside 0 to 1"),
    ],
)
def test_a_row_at_fault_is_left_out_and_counted_or_stops_the_run(
    method: str, keys: dict[str, Any], aux: dict[str, Any], said: str
) -> None:
    objective = OBJECTIVES[method](**keys)
    good = {"scores": np.array([1.0, 0.5])} if "scores" in aux else GOOD
    rows = groups(*[good] * 4, aux, *[good] * 4, aux)
    kept, faults = fit_needs(rows, objective, "data", max_bad_rows=0.2)
    assert [g.id for g in kept] == [g.id for g in rows if g.id not in ("id4", "id9")]
    (line,) = lines(faults, len(rows))
    assert said in line
    assert line.startswith("left out 2 of 10 rows that ")
    assert line.endswith(": rows.jsonl:5, rows.jsonl:10")
    with pytest.raises(UserError, match=said) as caught:
        fit_needs(rows, objective, "data", max_bad_rows=0.19)
    assert "2 of 10 rows" in str(caught.value)
    assert "rows.jsonl:5" in str(caught.value)
    assert "max_bad_rows" in caught.value.remedy


def test_no_row_is_enough_under_no_share() -> None:
    with pytest.raises(UserError, match="3 of 3 rows have no margin"):
        fit_needs(groups(*[{"margin": np.float32("nan")}] * 3), OBJECTIVES["odpo"](), "data", max_bad_rows=1)


def test_only_what_is_read_goes_on() -> None:
    assert set(fit_needs(groups(GOOD), OBJECTIVES["dpo"](), "data")[0][0].aux) == {"margin"}
    assert set(fit_needs(groups(GOOD), OBJECTIVES["cost"](), "data")[0][0].aux) == {"margin", "safe"}


def labelled(*labels: bool) -> list[Group]:
    return groups(*({"label": np.bool_(label)} for label in labels))


def test_one_label_only_is_refused() -> None:
    for label in (True, False):
        with pytest.raises(UserError, match=f"all 3 rows have the label {label}") as caught:
            fit_needs(labelled(*[label] * 3), OBJECTIVES["kto"](), "data")
        assert "rows of the other label" in caught.value.remedy


def source(labels: list[bool], batch_size: int) -> BatchSource:
    return BatchSource(labelled(*labels), batch_size=batch_size, max_length=16)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_updates_of_one_label_are_counted_before_the_first(batch_size: int) -> None:
    labels = [i % 4 > 0 for i in range(24)]
    rows, said = source(labels, batch_size), list[str]()
    by_hand = [{labels[i] for i in rows.row_indices(step).ravel()} for step in range(24 // batch_size)]
    count = sum(len(found) == 1 for found in by_hand)
    assert count > 0
    assert one_sided(rows, OBJECTIVES["kto"](), said.append) == count
    (line,) = said
    assert f"{count} of {24 // batch_size} updates" in line
    assert "75% of all are wanted" in line
    assert "raise batch_size" in line


def test_updates_of_both_labels_are_not_spoken_of() -> None:
    said: list[str] = []
    assert one_sided(source([True, False] * 4, 8), OBJECTIVES["kto"](), said.append) == 0
    assert one_sided(source([True] * 8, 2), OBJECTIVES["apo_zero_unpaired"](), said.append) == 0
    assert said == []


@pytest.mark.parametrize("method", ["kto", "bco", "aot", "rpo_relative", "rpo_relative_unpaired"])
@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 1), ("eval_batch_size", 1), ("grad_accumulation", 2)]
)
def test_a_whole_batch_is_more_than_one_row_and_in_one_piece(method: str, key: str, value: int) -> None:
    with pytest.raises(UserError, match=key) as caught:
        check_batches(config_for(method)(**{"batch_size": 4, key: value}), OBJECTIVES[method]())
    assert caught.value.place == key
    assert caught.value.remedy
    check_batches(config_for("dpo")(**{key: value}), OBJECTIVES["dpo"]())
