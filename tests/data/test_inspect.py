import io

import pytest
from rich.console import Console

from jaxalign.data.inspect import histogram, inspect_data, plain_tokens, rich_tokens, show_tokens
from jaxalign.data.readers import LoadReport
from jaxalign.data.records import chat_record
from jaxalign.data.tokenize import encode_record
from jaxalign.errors import UserError
from tests.data.toy import chat, toy

RECORD = chat_record(chat("u:hello", "a:漢 hi"), place="a.jsonl:1")


def printed(*, terminal: bool, **options) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, width=120, color_system="truecolor" if terminal else None
    )
    report = LoadReport(2, 1, {"empty text": (1, ("a.jsonl:2",))}, {}, {"messages": 1})
    inspect_data([RECORD], report, toy(), console=console, **options)
    return stream.getvalue()


def test_tokens_say_what_they_are():
    tokens = show_tokens(encode_record(RECORD, toy()), toy())
    assert "".join(t.text for t in tokens) == "<|turn|>user\nhello<|end|>\n<|turn|>assistant\n漢 hi<|end|>\n"
    assert [t.text for t in tokens if t.kind == "special"] == ["<|turn|>", "<|end|>", "<|turn|>"]
    assert [t.text for t in tokens if t.kind == "stop"] == ["<|end|>"]
    assert [t.text for t in tokens if t.learned] == ["", "", "漢", " ", "h", "i", "<|end|>"]


def test_plain_text_where_there_is_no_terminal():
    text = printed(terminal=False)
    assert "\x1b" not in text
    assert "+ '漢 hi<|end|>'" in text
    assert "- '<|turn|>user\\nhello<|end|>\\n<|turn|>assistant\\n'" in text
    assert "rejected 1: empty text (a.jsonl:2)" in text
    assert "1 of 1 rows" in text
    assert "packed: 1 rows" in text


def test_colours_on_a_terminal():
    text = printed(terminal=True)
    assert "\x1b[" in text
    assert "learned: green" in text
    spans = rich_tokens(show_tokens(encode_record(RECORD, toy()), toy())).spans
    assert "bold black on green" in {str(span.style) for span in spans}


def test_what_is_dropped_is_said():
    with pytest.raises(UserError, match="nothing to learn within max_length"):
        printed(terminal=False, max_length=8)


def test_runs_are_joined():
    tokens = show_tokens(encode_record(RECORD, toy()), toy())
    assert [line[0] for line in plain_tokens(tokens)] == ["-", "+", "-"]


def test_histogram_counts_every_length():
    import numpy as np

    lines = histogram(np.asarray([1, 64, 65, 128, 128]), (64, 128))
    assert [line.split()[0] for line in lines] == ["1-64", "65-128"]
    assert [line.split()[-1] for line in lines] == ["2", "3"]
