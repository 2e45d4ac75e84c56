import numpy as np
import pytest

from jaxalign.data.preferences import binary_record, pair_record, scored_record
from jaxalign.data.readers import read_groups
from jaxalign.data.records import Message, SFTRecord
from jaxalign.data.tokenize import encode_record, tokenize_groups
from jaxalign.errors import UserError
from tests.data import toy as templates
from tests.data.toy import chat, shared, toy

PROMPT = chat("s:Be brief", "u:hello", "a:hello hello", "u:and?")
PAIR = pair_record(PROMPT, chat("a: world"), chat("a:\n\nno"), margin=1.5, place="a.jsonl:1")


def alone(record, index):
    """The row to imitate with one of the record's answers: what the other path makes of the same text."""
    if isinstance(record.prompt, str):
        return SFTRecord(record.id, prompt=record.prompt, completion=record.answers[index])
    return SFTRecord(
        record.id, messages=record.prompt + record.answers[index], prompt_turns=len(record.prompt)
    )


TEMPLATES = ("CHATML", "DEFAULT_SYSTEM", "BOS", "THINKING", "OPENS_THOUGHT", "LLAMA2", "GLUED")


@pytest.mark.parametrize("name", TEMPLATES)
def test_members_are_the_rows_that_fine_tuning_makes(name):
    tokenizer = toy(getattr(templates, name))
    prompt = PROMPT[1:] if name == "LLAMA2" else PROMPT
    record = pair_record(prompt, chat("a:ok world"), chat("a:no"))
    (group,), report = tokenize_groups([record], tokenizer, 1000)
    for index, member in enumerate(group.members):
        expected = encode_record(alone(record, index), tokenizer)
        assert member.tokens.tolist() == expected.tokens.tolist()
        assert member.mask.tolist() == expected.mask.tolist()
    assert report.examples == 1


@pytest.mark.parametrize("template", ["CHATML", "GLUED"])
def test_members_share_the_ids_of_the_prompt(template):
    """With GLUED the prompt's last line break would merge with an answer that begins with one."""
    tokenizer = toy(getattr(templates, template))
    (group,), _ = tokenize_groups([PAIR], tokenizer, 1000)
    prompt = tokenizer.encode_prompt(PROMPT)
    for member, answer in zip(group.members, PAIR.answers, strict=True):
        assert member.tokens[: len(prompt)].tolist() == prompt
        assert not member.mask[: len(prompt)].any()
        assert tokenizer.decode(member.tokens, special=True) == tokenizer.render(PROMPT + answer)
        learned = tokenizer.decode(member.tokens[member.mask], special=True)
        assert learned == answer[0].content + "<|end|>"
    assert group.aux["margin"] == np.float32(1.5)
    assert group.family == PAIR.family


@pytest.mark.parametrize("add_bos", [False, True])
def test_strings_stand_as_they_are(add_bos):
    tokenizer = toy(add_bos=add_bos)
    record = pair_record("hello", " world", " no")
    (group,), _ = tokenize_groups([record], tokenizer, 100)
    for index, member in enumerate(group.members):
        expected = encode_record(alone(record, index), tokenizer)
        assert member.tokens.tolist() == expected.tokens.tolist()
        assert member.mask.tolist() == expected.mask.tolist()
        assert tokenizer.decode(member.tokens[member.mask], special=True).endswith("<|eos|>")
    assert np.isnan(group.aux["margin"])


def test_lists_and_labels():
    scored = scored_record(PROMPT, [chat("a:b"), chat("a:best"), chat("a:c")], [1, 5, None])
    label = binary_record(PROMPT, chat("a:b"), False)
    groups, report = tokenize_groups([scored, label], toy(), 1000)
    answers = [toy().decode(m.tokens[m.mask]) for g in groups for m in g.members]
    assert answers == ["best", "b", "b"]
    assert groups[0].aux["scores"].tolist() == [5.0, 1.0]
    assert groups[1].aux == {"label": False}
    assert (report.rows, report.examples, report.turns, report.unstopped_turns) == (2, 2, 3, 0)
    assert report.tokens == sum(len(m.tokens) for g in groups for m in g.members)
    assert report.targets == sum(int(m.mask.sum()) for g in groups for m in g.members)


def test_only_the_assistants_turns_of_a_long_answer_are_learned():
    tool = (Message("assistant", "look"), Message("tool", "seen"), Message("assistant", "done"))
    (group,), _ = tokenize_groups([pair_record(PROMPT, tool, chat("a:no"))], toy(), 1000)
    first = group.members[0]
    assert toy().decode(first.tokens[first.mask], special=True) == "look<|end|>done<|end|>"


def lengths_of(record):
    (group,), _ = tokenize_groups([record], toy(), 1000)
    stem = int(group.members[0].mask.argmax())
    return stem, [len(m.tokens) for m in group.members]


def test_answers_are_cut_at_the_end():
    record = pair_record(PROMPT, chat("a:" + "x" * 20), chat("a:" + "y" * 5))
    stem, sizes = lengths_of(record)
    (group,), report = tokenize_groups([record], toy(), stem + 10)
    assert [len(m.tokens) for m in group.members] == [stem + 10, sizes[1]]
    assert (report.truncated, report.tokens_lost) == (1, sizes[0] - stem - 10)
    whole, _ = tokenize_groups([record], toy(), max(sizes))
    assert [len(m.tokens) for m in whole[0].members] == sizes


OTHER = pair_record(chat("u:x"), chat("a:y"), chat("a:z"))


def test_a_prompt_that_fills_max_length_drops_the_group():
    stem, _ = lengths_of(PAIR)
    groups, report = tokenize_groups([PAIR, OTHER], toy(), stem)
    assert [g.id for g in groups] == [OTHER.id]
    assert report.dropped == {"nothing to learn within max_length": (1, ("a.jsonl:1",))}
    assert len(tokenize_groups([PAIR, OTHER], toy(), stem + 1)[0]) == 2


def test_answers_with_the_same_tokens_are_dropped():
    same = pair_record(PROMPT, chat("a:hello one"), chat("a:hello two"), place="a.jsonl:2")
    stem, _ = lengths_of(same)
    groups, report = tokenize_groups([same, OTHER], toy(), stem + 1)
    assert [g.id for g in groups] == [OTHER.id]
    assert report.dropped == {"the answers have the same tokens within max_length": (1, ("a.jsonl:2",))}
    trimmed = toy(templates.CHATML.replace("m['content']", "m['content'] | replace('?', '!')"))
    written_alike = pair_record(PROMPT, chat("a:so?"), chat("a:so!"))
    groups, report = tokenize_groups([written_alike, OTHER], trimmed, 1000)
    assert list(report.dropped) == ["the answers have the same tokens"]
    assert len(groups) == 1


def test_other_policies_of_truncation():
    record = pair_record(PROMPT, chat("a:" + "x" * 20), chat("a:" + "y" * 5))
    stem, sizes = lengths_of(record)
    (group,), report = tokenize_groups([record], toy(), max(sizes) - 7, "keep_end")
    assert [len(m.tokens) for m in group.members] == [size - 7 for size in sizes]
    first = [m.tokens[: stem - 7].tolist() for m in group.members]
    assert first[0] == first[1]
    assert [int(m.mask.sum()) for m in group.members] == [size - stem - 1 for size in sizes]  # a line break
    assert report.truncated == 1
    groups, report = tokenize_groups([record, OTHER], toy(), max(sizes) - stem, "keep_end")
    assert [g.id for g in groups] == [OTHER.id]
    assert list(report.dropped) == [f"an answer alone is longer than max_length={max(sizes) - stem}"]
    groups, report = tokenize_groups([record, OTHER], toy(), max(sizes) - 1, "drop")
    assert [g.id for g in groups] == [OTHER.id]
    with pytest.raises(UserError, match=f"has {max(sizes)} tokens, more than max_length"):
        tokenize_groups([record, OTHER], toy(), max(sizes) - 1, "error")
    with pytest.raises(UserError, match="unknown truncation 'keep_strat'; did you mean 'keep_start'"):
        tokenize_groups([record], toy(), 100, "keep_strat")  # type: ignore[arg-type]


def test_a_template_that_writes_the_prompt_by_the_answer_is_refused():
    by_answer = toy("{{ messages[-1]['content'][:1] }}" + templates.CHATML)
    with pytest.raises(UserError, match="no row has anything to learn"):
        tokenize_groups([PAIR], by_answer, 1000)


def test_a_template_without_a_stop_token_is_refused():
    with pytest.raises(UserError, match="ends no assistant turn with a stop token"):
        tokenize_groups([PAIR], toy(templates.NO_STOP), 1000)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-factory/dpo_en_demo.json", "pairs"),
        ("hh-rlhf/harmless-base-test.jsonl.gz", "pairs"),
        ("oasst/en_100_tree.jsonl", "lists"),
        ("llama-factory/kto_en_demo.json", "binary"),
    ],
)
def test_published_rows(name, kind):
    from jaxalign.data.chat import load_tokenizer
    from jaxalign.models.source import resolve

    path = shared(name)
    if path is None:
        pytest.skip(f"{name} is not beside the checkout")
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    records = read_groups(path, kind)[0][:200]
    groups, report = tokenize_groups(records, tokenizer, 100_000)
    assert (len(groups), report.dropped, report.unstopped_turns) == (len(records), {}, 0)
    for record, group in zip(records, groups, strict=True):
        prompt = tokenizer.encode_prompt(record.prompt)
        for index, member in enumerate(group.members):
            assert member.tokens[: len(prompt)].tolist() == prompt
            expected = encode_record(alone(record, index), tokenizer)
            assert member.tokens.tolist() == expected.tokens.tolist()
            assert member.mask.tolist() == expected.mask.tolist()
