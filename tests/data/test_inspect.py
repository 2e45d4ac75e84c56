import io
import json

import pytest
from rich.console import Console

from jaxalign.data.inspect import (
    histogram,
    inspect_data,
    inspect_files,
    plain_tokens,
    rich_tokens,
    show_tokens,
)
from jaxalign.data.preferences import binary_record, pair_record, scored_record
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


PAIR = pair_record(chat("u:hello"), chat("a:hi"), chat("a:no"), margin=0.5, meta={"id": "p"})


def printed_groups(records, *, terminal=False, **options) -> str:
    stream = io.StringIO()
    color = "truecolor" if terminal else None
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=color)
    report = LoadReport(3, 2, {"chosen and rejected are equal": (1, ("a.jsonl:2",))}, {}, {"preference": 2})
    inspect_data(records, report, toy(), console=console, **options)
    return stream.getvalue()


def test_pairs_show_the_prompt_once_and_both_answers():
    text = printed_groups([PAIR])
    assert text.count("<|turn|>user\\nhello<|end|>") == 1
    assert "Row p: a prompt of" in text
    assert "chosen, margin 0.5: 4 tokens, 3 learned\n+ 'hi<|end|>'\n- '\\n'" in text
    assert "rejected: 4 tokens, 3 learned\n+ 'no<|end|>'\n- '\\n'" in text
    assert "rejected 1: chosen and rejected are equal (a.jsonl:2)" in text
    assert "one answer a row: 2 rows" in text
    assert "prompts once, in steps of 8: 1 groups" in text
    assert "packed" not in text


def test_pairs_are_coloured_on_a_terminal():
    text = printed_groups([PAIR], terminal=True)
    assert "\x1b[" in text
    assert "learned: green" in text


def test_labels_and_scores_name_the_answers():
    label = binary_record(chat("u:hello"), chat("a:hi"), False)
    scored = scored_record(chat("u:hello"), [chat("a:a"), chat("a:b")], [1, 2.5])
    assert "unwanted: 4 tokens" in printed_groups([label])
    text = printed_groups([scored])
    assert text.index("score 2.5:") < text.index("score 1:")


@pytest.mark.parametrize(
    ("kind", "shown"), [(None, "chosen: "), ("sft", "1 preference"), ("binary", "wanted: ")]
)
def test_files_are_shown_as_what_they_are_or_as_asked(kind, shown, tmp_path):
    row = {"prompt": [{"role": "user", "content": "hello"}], "chosen": "hi", "rejected": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    stream = io.StringIO()
    inspect_files(tmp_path / "a.jsonl", toy(), kind=kind, console=Console(file=stream, width=120))
    assert shown in stream.getvalue()
    assert ("\nrejected: " in stream.getvalue()) == (kind is None)
