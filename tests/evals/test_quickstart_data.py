"""The data that the package ships: every answer keeps the style, and nothing leaks between the files."""

import re
from collections import Counter
from itertools import combinations

import pytest

from jaxalign.evals.checkers import LABELS, check_card, names_fact, words
from jaxalign.quickstart import ASSETS, question, read_jsonl, reference

TRAIN, HELDOUT = read_jsonl(ASSETS / "train.jsonl"), read_jsonl(ASSETS / "heldout.jsonl")
ROWS = TRAIN + HELDOUT
_STOP = """
    a an and are as at be by can did do does for from has have how i if in is it its made make many most
    much my of on one or should stand that the their there to used was we what when where which who whose why
    with you your called"""
STOP = frozenset(_STOP.split())


def content(text: str) -> set[str]:
    """The words of a text that say what it is about, without plural endings."""
    return {word.removesuffix("s") for word in words(text) if word not in STOP}


def overlap(one: str, two: str) -> float:
    first, second = content(one), content(two)
    return len(first & second) / max(1, len(first | second))


def test_there_is_enough_of_it():
    assert len(TRAIN) >= 160
    assert len(HELDOUT) >= 40
    assert {row["topic"] for row in TRAIN} == {row["topic"] for row in HELDOUT}
    assert min(Counter(row["topic"] for row in HELDOUT).values()) >= 4


def test_rows_are_one_question_and_one_answer():
    for row in ROWS:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert question(row).endswith("?")
        assert question(row) == question(row).strip()
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert len({question(row).lower() for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_every_answer_keeps_the_style(row):
    assert check_card(reference(row)) == (True, [])
    assert 15 <= len(words(reference(row))) - len(LABELS) <= 50


def test_answers_are_not_one_template():
    firsts = Counter(" ".join(words(reference(row).split("\n")[1])[1:4]) for row in ROWS)
    checks = Counter(words(reference(row).split("\n")[2])[1] for row in ROWS)
    assert firsts.most_common(1)[0][1] <= 0.03 * len(ROWS)
    assert checks.most_common(1)[0][1] <= 0.25 * len(ROWS)
    assert len(checks) >= 40


def test_no_two_questions_are_near_duplicates():
    close = [
        (question(a), question(b))
        for a, b in combinations(ROWS, 2)
        if overlap(question(a), question(b)) >= 0.6
    ]
    assert close == []


def test_nothing_held_out_is_in_the_training_data():
    for held in HELDOUT:
        for row in TRAIN:
            assert overlap(question(held), question(row)) < 0.5, (question(held), question(row))
            # the answer lines: a fact that is asked for in other words
            said, taught = (reference(r).split("\n")[0] for r in (held, row))
            assert overlap(said, taught) < 0.5, (said, taught)
            assert overlap(reference(held), reference(row)) < 0.4, (question(held), question(row))


def test_the_reference_names_its_key_fact_and_the_question_does_not():
    for row in HELDOUT:
        assert row["expect"]
        assert names_fact(reference(row).split("\n")[0], row["expect"]), row["id"]
        assert not names_fact(question(row), row["expect"]), row["id"]
        assert all(re.compile(pattern) for pattern in row["expect"])


def test_the_licence_is_told():
    assert "Apache-2.0" in (ASSETS / "README.md").read_text(encoding="utf-8")
