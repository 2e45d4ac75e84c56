"""The built-in model's own tokenizer and template on published rows."""

import numpy as np
import pytest

from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.data.readers import read_records
from jaxalign.data.tokenize import encode_record, tokenize
from tests.data.toy import chat, shared

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from jaxalign.models.source import resolve

    return load_tokenizer(resolve("smollm2-135m-instruct"))


def test_prompt_is_chatml_with_the_default_system_turn(tokenizer):
    text = tokenizer.decode(tokenizer.encode_prompt(chat("u:Hi")), special=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.stop_tokens == (2,)
    assert tokenizer.vocab_size == 49152


def test_digits_and_line_breaks_split_as_in_training(tokenizer):
    ids = tokenizer.encode("a\n\n12")
    assert [tokenizer.decode([i]) for i in ids] == ["a", "\n\n", "1", "2"]


@pytest.mark.parametrize("name", ["llama-factory/dpo_en_demo.json", "hh-rlhf/harmless-base-test.jsonl.gz"])
def test_published_rows(tokenizer, name):
    path = shared(name)
    if path is None:
        pytest.skip(f"{name} is not beside the checkout")
    records = read_records(path)[0][:300]
    for record in records:
        example = encode_record(record, tokenizer)
        prompt = tokenizer.encode_prompt(record.messages[: record.prompt_turns])
        assert example.tokens[: len(prompt)].tolist() == prompt
        answer = tokenizer.decode(example.tokens[example.mask], special=True)
        assert answer == record.messages[-1].content + "<|im_end|>"
        assert tokenizer.decode(example.tokens, special=True) == tokenizer.render(record.messages)
    examples, report = tokenize(records, tokenizer, 1024)
    assert report.unstopped_turns == report.recovered_turns == report.split_boundaries == 0
    assert max(len(e.tokens) for e in examples) <= 1024
    assert np.all([e.mask.any() for e in examples])


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    from jaxalign.types import ModelSource

    tokenizer.save(tmp_path)
    again = load_tokenizer(ModelSource("saved", tmp_path))
    for text in ("Hello 2023  42\n\n1. é 漢字 😀", "<|im_start|>user\nHi<|im_end|>\n"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.encode_prompt(chat("u:Hi")) == tokenizer.encode_prompt(chat("u:Hi"))
