import json

import pytest

from jaxalign.data.chat import load_tokenizer
from jaxalign.data.records import RowError
from jaxalign.errors import UserError
from jaxalign.types import ModelSource
from tests.data.toy import BOS, CHATML, LLAMA2, NO_STOP, NO_USER, chat, toy, wrap


def ids(tokenizer, *names):
    return [tokenizer.backend.token_to_id(name) for name in names]


def test_encode_adds_nothing_though_the_tokenizer_would():
    tokenizer = toy(add_bos=True)
    assert tokenizer.hf("hello")["input_ids"][0] == tokenizer.hf.bos_token_id
    assert tokenizer.encode("hello") == ids(tokenizer, "hello")
    assert tokenizer.encode_text("hello") == ids(tokenizer, "<|bos|>", "hello")


def test_bos_is_never_doubled():
    tokenizer = toy(BOS, add_bos=True)
    assert tokenizer.encode_text("<|bos|>hello") == ids(tokenizer, "<|bos|>", "hello")
    prompt = tokenizer.encode_prompt(chat("u:hello"))
    assert prompt[0] == tokenizer.hf.bos_token_id
    assert prompt.count(tokenizer.hf.bos_token_id) == 1


def test_a_bos_inside_is_refused_unless_the_template_writes_it():
    with pytest.raises(UserError, match="BOS token inside"):
        toy(BOS, add_bos=True).encode_prompt("hello<|bos|>hello")
    llama2 = toy(LLAMA2, add_bos=True)
    assert llama2.lone_bos is None
    two = llama2.encode_prompt(chat("u:hello", "a:hello", "u:hello"))
    assert two.count(llama2.hf.bos_token_id) == 2


def test_prompt_is_the_template_with_the_generation_prompt():
    tokenizer = toy()
    expected = "<|turn|>user\nhello<|end|>\n<|turn|>assistant\n"
    assert tokenizer.decode(tokenizer.encode_prompt(chat("u:hello")), special=True) == expected
    assert tokenizer.decode(tokenizer.encode_prompt(chat("u:hello"))) == "user\nhello\nassistant\n"


def test_stop_tokens_are_eos_and_the_end_of_turn():
    tokenizer = toy()
    assert tokenizer.stop_tokens == tuple(ids(tokenizer, "<|eos|>", "<|end|>"))
    assert tokenizer.turn_end == ids(tokenizer, "<|end|>")[0]
    assert toy(eos=None).eos_id == tokenizer.turn_end
    assert toy(NO_STOP).turn_end is None


def test_folder_with_generation_config(tmp_path):
    wrap(CHATML, add_bos=True).save_pretrained(str(tmp_path))
    plain = load_tokenizer(ModelSource("m", tmp_path))
    turn = plain.backend.token_to_id("<|turn|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain.eos_id, turn]}))
    tokenizer = load_tokenizer(ModelSource("m", tmp_path))
    assert tokenizer.bos_id == plain.backend.token_to_id("<|bos|>")
    assert set(tokenizer.stop_tokens) == {*plain.stop_tokens, turn}
    assert tokenizer.encode("hello wo") == toy().encode("hello wo")
    assert tokenizer.render(chat("u:hello")) == toy().render(chat("u:hello"))


def test_saving_and_loading_gives_the_same_ids(tmp_path):
    toy(BOS, add_bos=True).save(tmp_path)
    again = load_tokenizer(ModelSource("m", tmp_path))
    assert again.encode_prompt(chat("u:hello")) == toy(BOS, add_bos=True).encode_prompt(chat("u:hello"))
    assert again.bos_id is not None


def test_template_can_be_replaced(tmp_path):
    toy(None).save(tmp_path)
    assert load_tokenizer(ModelSource("m", tmp_path), chat_template=CHATML).fault == ""


def test_an_adapter_brings_the_template_it_was_trained_with(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    toy(None).save(base)
    load_tokenizer(ModelSource("m", base), chat_template=CHATML).save(adapter)
    again = load_tokenizer(ModelSource("m", base, adapter=adapter))
    assert again.render(chat("u:hello")) == toy(CHATML).render(chat("u:hello"))
    plain = CHATML.replace("<|turn|>", "")
    assert load_tokenizer(ModelSource("m", base, adapter=adapter), plain).hf.chat_template == plain


def test_no_stop_token_is_a_user_error():
    with pytest.raises(UserError, match="without a stop token"):
        toy(None, eos=None)


def test_no_template_is_a_user_error_for_chats_alone():
    tokenizer = toy(None)
    assert tokenizer.encode_prompt("hello") == ids(tokenizer, "hello")
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.encode_prompt(chat("u:hello"))


def test_template_without_the_user_turn_is_a_user_error():
    with pytest.raises(UserError, match="leaves out the user turn"):
        toy(NO_USER).render(chat("u:hello", "a:hello"))


def test_template_that_does_not_compile_is_a_user_error():
    with pytest.raises(UserError, match="fails on one question and answer"):
        toy("{% for m in messages %}").render(chat("u:hello"))


def test_template_refusing_a_row_is_a_bad_row():
    tokenizer = toy("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML)
    with pytest.raises(UserError, match="too long"):
        tokenizer.render(chat("u:a", "a:b", "u:c"))  # its own fault shows on two questions already
    tokenizer = toy(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    with pytest.raises(RowError, match="no system"):
        tokenizer.render(chat("s:x", "u:c"))


def test_missing_tokenizer_files_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(ModelSource("m", tmp_path))


def test_pad_is_eos_where_there_is_no_pad():
    tokenizer = toy(pad=None)
    assert tokenizer.pad_id == tokenizer.eos_id
