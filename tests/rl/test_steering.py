"""SteerLM's conditions: how answers are graded, and what is learned and asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxalign.data.records import Message, Prompt
from jaxalign.rl.selection import Judged
from jaxalign.rl.steering import Conditioned, conditioned, graded

TEXT = Prompt("t", None, "Once", {})
CHAT = Prompt("c", (Message("user", "Hello"),), None, {})
LED = Prompt("s", (Message("system", "Be kind."), Message("user", "Hello")), None, {})


def test_levels_divide_the_span_of_the_first_answers(tmp_path: Path):
    """Later values lie within the same span, or at its ends; no number has no level."""
    file = tmp_path / "levels.json"
    first = graded({"a": np.linspace(0, 1, 101), "b": np.full(101, 7.0)}, 5, file)
    assert [g["a"] for g in first[::25]] == [0, 1, 2, 3, 4]
    assert {g["b"] for g in first} == {0}
    later = graded({"a": np.array([-3.0, 0.5, 9.0, np.nan]), "b": np.full(4, 8.0)}, 5, file)
    assert later == [{"a": 0, "b": 4}, {"a": 2, "b": 4}, {"a": 4, "b": 4}, {"b": 4}]


def test_a_condition_is_the_system_turn_its_last_line_or_the_line_before():
    assert conditioned(TEXT, {"a": 4, "b": 0}).text == "a: 4, b: 0\nOnce"
    assert conditioned(CHAT, {"a": 4}).messages == (Message("system", "a: 4"), Message("user", "Hello"))
    assert conditioned(LED, {"a": 1}).messages[0] == Message("system", "Be kind.\na: 1")


def test_answers_are_learned_with_their_own_levels_and_the_highest_are_asked_for():
    given = Judged(CHAT, ["Hi.", "Go."], [0.9, 0.1], 0, [{"a": 4}, {"a": 0}])
    rows = list(Conditioned()(given))
    assert [row["messages"][0]["content"] for row in rows] == ["a: 4", "a: 0"]
    assert [row["messages"][-1] for row in rows] == [
        {"role": "assistant", "content": "Hi."},
        {"role": "assistant", "content": "Go."},
    ]
    (row,) = Conditioned()(Judged(TEXT, ["upon"], [1.0], 0, [{"a": 2}]))
    assert (row["prompt"], row["completion"]) == ("a: 2\nOnce", "upon")
    assert Conditioned(levels=3).asked(CHAT, 1, ["a"]) == conditioned(CHAT, {"a": 2})
    assert Conditioned().asked(CHAT, 0, ["a"]) == CHAT
