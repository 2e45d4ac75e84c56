"""Text that grows, and pieces of text."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.sampling.engine import Sample
from jaxalign.sampling.forced import Forced
from jaxalign.serve.errors import ApiError
from jaxalign.serve.given import Growing, Reader
from tests.data.toy import BOS, toy

TOKENIZER = toy()


def said(text: str, stop: tuple[str, ...] = (), whole: str | None = None) -> list[str]:
    """What is shown after each token of `text`, and at its end."""
    growing, tokens = Growing(TOKENIZER, stop), TOKENIZER.encode(text)
    pieces = [growing.more(tokens[: i + 1]) for i in range(len(tokens))]
    return [*pieces, growing.rest(text if whole is None else whole)]


def test_text_is_shown_as_it_comes() -> None:
    assert said("hello wo") == ["hello", " wo", ""]


def test_half_a_character_is_held_back() -> None:
    assert said("a\u00f6b") == ["a", "", "\u00f6", "b", ""]
    assert said("a\U0001f600") == ["a", "", "", "", "\U0001f600", ""]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert said("x\ny\n\n", ("\n\nz",)) == ["x", "", "\ny", "", "\n\n"]
    assert said("x\ny\n\n", ("\n\nz",), "x\ny") == ["x", "", "\ny", "", ""]
    assert said("ab", ("bc",)) == ["a", "", "b"]
    assert said("abb", ("bc", "bbc")) == ["a", "", "", "bb"]


def test_a_prompt_without_tokens_or_template_is_refused() -> None:
    reader = Reader(TOKENIZER)
    with pytest.raises(ApiError, match="no tokens"):
        reader.encode("", "prompt")
    with pytest.raises(ApiError, match="a BOS token inside") as refused:
        reader.encode("a<|bos|>", "prompt")
    assert (refused.value.status, refused.value.param) == (400, "prompt")
    with pytest.raises(ApiError, match="no chat template"):
        Reader(toy(None)).encode((), "messages")


def test_a_bos_is_a_piece_before_the_text() -> None:
    tokenizer = toy(BOS, add_bos=True)
    tokens = tokenizer.encode_prompt("hello wo")
    rows = np.zeros((3, 2))
    made = Forced(np.array([np.nan, -1, -2]), rows.astype(int), rows)
    pieces = Reader(tokenizer).of_prompt("hello wo", tokens, made, 0)
    assert [(p.text, p.start, p.logp) for p in pieces] == [
        ("<|bos|>", 0, None),
        ("hello", 0, -1.0),
        (" wo", 5, -2.0),
    ]


def test_pieces_of_an_answer_follow_its_prompt() -> None:
    tokens = [*TOKENIZER.encode("hello wo"), TOKENIZER.stop_tokens[0]]
    logp = np.array([-1.0, -2.0, -3.0], np.float32)
    sample = Sample(np.array(tokens), logp, logp, "stop", "hello wo")
    reader = Reader(TOKENIZER)
    pieces = reader.of_answer(sample, 4, None, 0)
    assert [(p.text, p.start, p.logp) for p in pieces] == [
        ("hello", 4, -1.0),
        (" wo", 9, -2.0),
        ("<|eos|>", 12, -3.0),
    ]
    # The same with alternatives, as the end of a text of five tokens.
    ids = np.array([[0, 0], [0, 0], [tokens[1], tokens[0]], [tokens[0], tokens[1]], [tokens[2], tokens[0]]])
    tops = np.array([[0, 0], [0, 0], [-0.5, -1], [-0.5, -1], [-3, -4]])
    made = Forced(np.array([np.nan, -9, -1, -2, -3]), ids, tops)
    assert [p.top for p in reader.of_answer(sample, 4, made, 1)] == [
        ((" wo", -0.5),),
        (("hello", -0.5),),
        (("<|eos|>", -3.0),),
    ]
