import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.records import SFTRecord, chat_record, completion_record, text_record
from jaxalign.data.spans import lay_out
from jaxalign.data.tokenize import encode_record, tokenize
from jaxalign.errors import UserError
from tests.data.toy import (
    CHATML,
    DEFAULT_SYSTEM,
    GLUED,
    LLAMA2,
    NO_STOP,
    NO_SYSTEM_ALLOWED,
    OPENS_THOUGHT,
    THINKING,
    chat,
    toy,
)


def learned(record: SFTRecord, tokenizer, loss_on=None) -> list[str]:
    """The runs of learned tokens, as text."""
    example = encode_record(record, tokenizer, loss_on)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.mask, [False]]).astype(int)))
    return [tokenizer.decode(example.tokens[a:b], special=True) for a, b in edges.reshape(-1, 2)]


TWO_TURNS = chat_record(chat("s:Be brief", "u:hello", "a:first", "u:world", "a:second"))


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, OPENS_THOUGHT])
def test_every_answer_and_its_stop_token_is_learned(template):
    assert learned(TWO_TURNS, toy(template)) == ["first<|end|>", "second<|end|>"]


def test_default_system_prompt_is_context():
    record = chat_record(chat("u:hello", "a:first"))
    tokenizer = toy(DEFAULT_SYSTEM)
    example = encode_record(record, tokenizer)
    text = tokenizer.decode(example.tokens, special=True)
    assert (
        text
        == "<|turn|>system\nBe kind.<|end|>\n<|turn|>user\nhello<|end|>\n<|turn|>assistant\nfirst<|end|>\n"
    )
    assert learned(record, tokenizer) == ["first<|end|>"]


def test_loss_on_completion_and_all():
    tokenizer = toy()
    assert learned(TWO_TURNS, tokenizer, "completion") == ["second<|end|>"]
    whole = encode_record(TWO_TURNS, tokenizer, "all")
    assert whole.mask.tolist() == [False] + [True] * (len(whole.tokens) - 1)


def test_prompt_turns_are_not_learned_by_default():
    turns = chat("u:hello", "a:first", "u:world", "a:second")
    record = chat_record(turns, prompt_turns=3)
    assert learned(record, toy()) == ["second<|end|>"]
    assert learned(record, toy(), "assistant_turns") == ["first<|end|>", "second<|end|>"]


def test_prompt_ids_begin_the_row_as_they_do_when_answering():
    for template in (CHATML, DEFAULT_SYSTEM, LLAMA2, THINKING, GLUED):
        tokenizer = toy(template)
        record = chat_record(chat("u:hello", "a:\n\nhello world"))
        example = encode_record(record, tokenizer)
        prompt = tokenizer.encode_prompt(record.messages[:1])
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.mask[: len(prompt)].any()
        assert example.mask[len(prompt)]


def test_a_prompt_that_ends_inside_a_token_is_encoded_apart():
    tokenizer = toy(GLUED)
    record = chat_record(chat("u:hello", "a:\n\nhello"))
    assert tokenizer.encode("\n\n") != tokenizer.encode("\n") * 2  # the merge that would swallow the boundary
    example = encode_record(record, tokenizer)
    assert tokenizer.decode(example.tokens, special=True) == "<|turn|>hello\n\n\nhello<|end|>"
    assert learned(record, tokenizer) == ["\n\nhello<|end|>"]
    _, report = tokenize([record], tokenizer, 64)
    assert report.split_boundaries == 1


def test_a_prompt_whose_last_space_is_split_otherwise_is_encoded_apart():
    # Alone, "\n\n" ends the prompt and is one token; before a letter it is two, and no token reaches across.
    tokenizer = toy(GLUED)
    record = chat_record(chat("u:hello\n", "a:hello"))
    prompt = tokenizer.encode_prompt(record.messages[:1])
    assert tokenizer.encode(tokenizer.render(record.messages))[: len(prompt)] != prompt
    assert encode_record(record, tokenizer).tokens[: len(prompt)].tolist() == prompt
    assert learned(record, tokenizer) == ["hello<|end|>"]


def test_rewritten_answers_are_found_and_counted():
    record = chat_record(chat("u:hello", "a:<think>hm</think>first", "u:world", "a:<think>so</think>second"))
    tokenizer = toy(THINKING)
    assert learned(record, tokenizer) == ["first<|end|>", "<think>so</think>second<|end|>"]
    _, report = tokenize([record], tokenizer, 256)
    assert report.recovered_turns == 1
    assert report.turns == 2


# What trips the search for an answer: pieces of headers and thoughts, line breaks, characters of many bytes.
ALPHABET = "a<thinkstur>\n 漢é"
ANSWERS = st.text(alphabet=ALPHABET, min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
TOYS = {template: toy(template) for template in (CHATML, DEFAULT_SYSTEM, OPENS_THOUGHT, GLUED)}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=3), st.sampled_from(list(TOYS)))
def test_learned_text_is_the_answers_and_their_stop_tokens(pairs, template):
    record = chat_record(chat(*(turn for user, answer in pairs for turn in (f"u:{user}", f"a:{answer}"))))
    tokenizer = TOYS[template]
    assert learned(record, tokenizer) == [f"{answer}<|end|>" for _, answer in pairs]
    example = encode_record(record, tokenizer)
    assert tokenizer.decode(example.tokens, special=True) == tokenizer.render(record.messages)
    if template != OPENS_THOUGHT:  # its prompt holds what no conversation does
        prompt = tokenizer.encode_prompt(record.messages[:1])
        assert example.tokens[: len(prompt)].tolist() == prompt


def test_an_answer_that_cannot_be_found_is_dropped_with_its_reason():
    tokenizer = toy("{{ messages|length }}" + CHATML)
    found = chat_record(chat("u:hello", "a:first"))
    assert learned(found, tokenizer) == ["first<|end|>"]
    _, report = tokenize([found, TWO_TURNS], tokenizer, 256)
    assert report.dropped == {
        "the chat template rewrites what precedes an answer: it cannot be found": (1, ("row 1",))
    }


def test_spaces_of_the_template_belong_to_the_answer():
    record = chat_record(chat("u:hello", "a:first", "u:world", "a:second"))
    assert learned(record, toy(LLAMA2)) == [" first <|eos|>", " second <|eos|>"]


def test_eos_is_appended_once_and_learned_in_plain_text():
    tokenizer = toy(add_bos=True)
    for text in ("hello world", "hello world<|eos|>"):
        example = encode_record(text_record(text), tokenizer)
        assert tokenizer.decode(example.tokens, special=True) == "<|bos|>hello world<|eos|>"
        assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    record = completion_record("hello", " world")
    assert learned(record, tokenizer) == [" world<|eos|>"]
    assert learned(record, tokenizer, "all") == ["hello world<|eos|>"]


def test_pad_equal_to_eos_keeps_eos_learned():
    tokenizer = toy(pad="<|eos|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    assert learned(completion_record("hello", " wo"), tokenizer) == [" wo<|eos|>"]
    stop = toy(pad="<|end|>", eos="<|end|>")
    assert learned(TWO_TURNS, stop) == ["first<|end|>", "second<|end|>"]


def test_text_rows_have_no_completion():
    with pytest.raises(UserError, match="a text row has none"):
        encode_record(text_record("hello"), toy(), "completion")


def test_unknown_choices_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'completion'"):
        tokenize([TWO_TURNS], toy(), 64, loss_on="completions")
    with pytest.raises(UserError, match="did you mean 'keep_start'"):
        tokenize([TWO_TURNS], toy(), 64, truncation="keepstart")


def test_template_without_stop_token_is_refused():
    with pytest.raises(UserError, match="ends no assistant turn with a stop token"):
        tokenize([TWO_TURNS], toy(NO_STOP), 256)


def test_rows_the_template_refuses_are_counted():
    records = [TWO_TURNS, chat_record(chat("u:hello", "a:first"))]
    examples, report = tokenize(records, toy(NO_SYSTEM_ALLOWED), 256)
    assert [e.id for e in examples] == [records[1].id]
    assert [(count, reason) for reason, (count, _) in report.dropped.items()] == [
        (1, "the chat template refuses it (no system role)")
    ]


def rows_of(*lengths: int) -> list[SFTRecord]:
    return [completion_record("", "x" * (length - 1)) for length in lengths]


def test_truncation_policies():
    tokenizer, records = toy(), rows_of(10, 20)
    kept, report = tokenize(records, tokenizer, 12, "keep_start")
    assert [len(e.tokens) for e in kept] == [10, 12]
    assert (report.truncated, report.tokens_lost, report.tokens) == (1, 8, 22)
    assert report.lost_share == pytest.approx(8 / 30)
    ends, _ = tokenize(records, tokenizer, 12, "keep_end")
    assert ends[1].tokens[-1] == tokenizer.eos_id
    assert ends[1].mask.tolist() == [False] + [True] * 11
    dropped, report = tokenize(records, tokenizer, 12, "drop")
    assert [len(e.tokens) for e in dropped] == [10]
    assert report.dropped == {"longer than max_length=12": (1, ("row 1",))}
    assert report.tokens_lost == 20
    with pytest.raises(UserError, match="20 tokens, more than max_length=12"):
        tokenize(records, tokenizer, 12, "error")


def test_rows_whose_prompt_fills_max_length_are_dropped_and_named():
    records = [completion_record("x" * 40, "yes"), completion_record("x", "yes")]
    examples, report = tokenize(records, toy(), 16)
    assert len(examples) == 1
    assert report.dropped == {"nothing to learn within max_length": (1, ("row 0",))}
    with pytest.raises(UserError, match="row 0") as caught:
        tokenize(records[:1], toy(), 16)
    assert "xxxx" in str(caught.value)


def test_layout_is_text_and_spans():
    layout = lay_out(completion_record("hello", " world"), toy())
    assert (layout.text, layout.spans, layout.plain) == ("hello world", ((5, 11),), True)


def test_targets_are_counted():
    examples, report = tokenize([TWO_TURNS] * 3, toy(), 256)
    assert report.targets == sum(int(e.mask.sum()) for e in examples) == 3 * len("firstsecond" + "..")
    assert report.tokens == sum(len(e.tokens) for e in examples)
