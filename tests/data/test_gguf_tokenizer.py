import pytest

from jaxalign.data.chat import load_tokenizer
from jaxalign.data.gguf_tokenizer import load_gguf_tokenizer, read_metadata
from jaxalign.errors import UserError
from jaxalign.types import ModelSource
from tests.data.toy import CHATML, SPECIAL, backend, chat, toy

NORMAL, CONTROL, BYTE = 1, 3, 6


def write(path, tokens, types, *, model, pre="gpt-2", merges=None, scores=None, add_bos=None, eos="<|eos|>"):
    """A .gguf file that holds a tokenizer alone."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_bos_token_id(tokens.index("<|bos|>"))
    writer.add_eos_token_id(tokens.index(eos))
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(path, **options):
    """The toy tokenizer as a .gguf file."""
    vocab = backend().get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [CONTROL if token in SPECIAL else NORMAL for token in tokens]
    merges = ["Ċ Ċ", "h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ a"]
    return write(path, tokens, types, model="gpt2", merges=merges, **options)


def test_byte_level_agrees_with_the_tokenizer_it_came_from(tmp_path):
    path = byte_level(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(ModelSource("m", tmp_path, gguf=path))
    for text in ("hello world", "<|turn|>user\nhello  漢<|end|>\n\n", " a wo 10\t"):
        assert tokenizer.encode(text) == toy().encode(text)
        assert tokenizer.decode(tokenizer.encode(text), special=True) == text
    assert tokenizer.encode_prompt(chat("u:hello")) == toy().encode_prompt(chat("u:hello"))
    assert tokenizer.stop_tokens == toy().stop_tokens
    assert tokenizer.bos_id is None


def test_saved_folder_gives_the_same_ids(tmp_path):
    path = byte_level(tmp_path / "m.gguf", add_bos=True)
    tokenizer = load_tokenizer(ModelSource("m", tmp_path, gguf=path))
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(ModelSource("m", tmp_path / "out"))
    assert tokenizer.encode_text("hello") == again.encode_text("hello")
    assert again.encode_text("hello")[0] == again.bos_id
    assert again.stop_tokens == tokenizer.stop_tokens


def test_digits_stand_alone_where_the_pre_tokenizer_says_so(tmp_path):
    plain = load_gguf_tokenizer(byte_level(tmp_path / "a.gguf", pre="gpt-2")).backend
    digits = load_gguf_tokenizer(byte_level(tmp_path / "b.gguf", pre="smollm")).backend
    # "\n\n1": without digit splitting the second line break is split off with what follows it.
    assert plain.encode("a\n\n1").tokens == ["a", "Ċ", "Ċ", "1"]
    assert digits.encode("a\n\n1").tokens == ["a", "ĊĊ", "1"]


def test_sentencepiece_merges_best_token_first(tmp_path):
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁a"]
    tokens = ["<unk>", "<|bos|>", "<|eos|>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    path = write(tmp_path / "m.gguf", tokens, types, model="llama", scores=scores)
    found = load_gguf_tokenizer(path)
    assert found.add_bos  # a sentencepiece vocabulary that does not say otherwise
    assert found.backend.encode("abc").tokens == ["▁a", "bc"]
    assert found.backend.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert found.backend.decode(found.backend.encode("abc é").ids) == "abc é"
    assert load_tokenizer(ModelSource("m", tmp_path, gguf=path)).encode_text("a")[0] == tokens.index(
        "<|bos|>"
    )


def test_metadata_is_read_as_gguf_reads_it(tmp_path):
    import gguf

    path = byte_level(tmp_path / "m.gguf", add_bos=False)
    theirs = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert read_metadata(path) == theirs


def test_bad_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="unknown pre-tokenizer 'martian'"):
        load_gguf_tokenizer(byte_level(tmp_path / "a.gguf", pre="martian"))
    whole = byte_level(tmp_path / "b.gguf").read_bytes()
    for size in (3, 30, 500, 3000):
        (tmp_path / "c.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off or damaged"):
            load_gguf_tokenizer(tmp_path / "c.gguf")
    (tmp_path / "d.gguf").write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(UserError, match="not a GGUF file"):
        load_gguf_tokenizer(tmp_path / "d.gguf")
