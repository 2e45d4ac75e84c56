"""What is kept of a reply, and that rows hold nothing of what a model was shown to make them."""

from __future__ import annotations

import re

import pytest

from jaxalign.synth.self_align import identity_of
from jaxalign.synth.self_align_filters import (
    Draft,
    cut,
    cut_repetition,
    long_or_ended,
    not_at_start,
    not_empty,
    principles_of,
    refine,
    renamed,
    thought,
    unrepeated,
    without,
    without_line,
)
from jaxalign.synth.self_instruct import phrases
from jaxalign.synth.templates import Templates
from tests.marker_world import asked
from tests.synth.bench import run, write_rows

IDENTITY, CUE = identity_of("Robin"), "### Robin"
FILTERS = [
    thought(IDENTITY, CUE),
    cut("### User"),
    unrepeated,
    without("leak", phrases("tortoise\nlead shot")),
    without("automatic", phrases("we will get back to you")),
    not_at_start("apology", phrases("sorry\nI'm sorry")),
    renamed("Robin", "Assistant"),
    not_empty,
]
LONG = " ".join(f"word{i}" for i in range(30))  # 229 characters


def reply(answer: str, note: str = "The case is plain. Rules: 3, 7.") -> str:
    return f"{IDENTITY} {note}\n{CUE}\n{answer}"


# Each case: text, whether the model ended it, the answer or the reason.
TRUTH = {
    "whole": (reply("It is so."), True, "It is so."),
    "no self-identification": (f"The case.\n{CUE}\nIt is so.", True, "no self-identification"),
    "no cue": (f"{IDENTITY} Rules: 3. It is so.", True, "no answer after the thought"),
    "short after the cut": (reply("It is so.\n### User\nAnd now?"), True, "short after the cut"),
    "long after the cut": (reply(f"{LONG}.\n### User\nAnd now?"), False, f"{LONG}."),
    "truncated word": (reply("It is so and no oth"), False, "It is so and no"),
    "leak": (reply("A tortoise does so."), True, "leak"),
    "automatic reply": (reply("Thanks, we will get back to you."), True, "automatic"),
    "apology at the start": (reply("Sorry, it is so."), True, "apology"),
    "apology later": (reply("It is so, sorry."), True, "It is so, sorry."),
    "repeated clause": (reply("Yes. I can help. I can help. Done."), True, "Yes. I can help."),
    "persona": (
        reply("I am Robin, and robin's friends say so."),
        True,
        "I am Assistant, and Assistant's friends",
    ),
    "empty": (reply("..."), True, "empty"),
    "repeated heading": (f"{CUE} (note)\n{reply('It is so.')}", True, "It is so."),
}


@pytest.mark.parametrize("case", TRUTH)
def test_the_truth_table_of_the_filters(case):
    text, ended, expected = TRUTH[case]
    found = refine(Draft("Is it so?", text, ended), FILTERS)
    said = found if isinstance(found, str) else found.text
    assert said.startswith(expected) if case == "persona" else said == expected


@pytest.mark.parametrize(("length", "kept"), [(159, False), (160, True)])
def test_what_is_left_of_a_cut_answer_must_have_160_characters(length, kept):
    text = "x" * (length - 1) + "."
    found = cut("### User")(Draft("", f"{text}\n### User\nOh"))
    assert isinstance(found, Draft) is kept


def test_repetition_is_cut_as_in_the_paper():
    assert cut_repetition("Yes. I can help. I can help. Done.") == "Yes. I can help."
    assert cut_repetition("A, b, c.") == "A, b, c."
    assert cut_repetition("if (a) {\n}\nif (b) {\n}\n") == "if (a) {\n}\nif (b) {\n}"  # no words in a brace


def test_a_word_of_the_examples_that_was_asked_for_is_no_leak():
    check = without("leak", phrases("tortoise\nlead shot"))
    assert check(Draft("Is a tortoise slow?", "A Tortoise is slow.")) != "leak"
    assert check(Draft("Is a tortoise slow?", "Lead shot is heavy.")) == "leak"
    assert check(Draft("", "Tortoises are slow.")) != "leak"


def test_only_numbers_of_principles_count():
    assert principles_of("Rules: 3, 16, 3 and 17, 0, 103, v7.") == (3, 16)


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [("Short.", True, True), ("Short", True, False), ("Short.", False, False), ("x" * 128, False, True)],
)
def test_a_long_answer_may_end_anywhere_and_a_short_one_may_not(text, ended, kept):
    assert isinstance(long_or_ended(Draft("", text, ended)), Draft) is kept


def test_the_footer_of_an_encyclopedia_stands_in_a_line_of_its_own():
    check = without_line("footer", phrases("see also\nreferences"))
    assert check(Draft("", "It is so.\n\n== References ==\n1. A book")) == "footer"
    assert check(Draft("", "It is so.\n**See also:**")) == "footer"
    assert check(Draft("", "For references see the book.")) != "footer"


# ------------------------------------------------------------------------------------------------ builds


QUESTIONS = [f"Tell me about item {i}." for i in range(24)]
SPOILT = {3: "Sorry, no.", 5: "The tortoise knows.", 7: "no thought at all"}


def base(request, number, rng):
    """Plays the next turn of the worked conversations; some answers are spoilt."""
    text = asked(request)
    name = re.match(r"# (\w+)", text)[1]
    item = int(re.findall(r"item (\d+)\.", text)[-1])
    if item == 7:
        return SPOILT[7]
    answer = SPOILT.get(item, f"I am {name} and item {item} is a thing.")
    note = f"I am {name}, an AI assistant. Item {item} is asked for. Rules: 2, {1 + item % 16}."
    return f"{note}\n### {name}\n{answer}"


def engraved(request, number, rng):
    item = int(re.findall(r"item (\d+)\.", asked(request))[-1])
    return f"Item {item} is a thing. " + " ".join(f"Point {k} about it is {k * item + k}." for k in range(20))


def shown(name: str) -> list[str]:
    """Every line of the principles and the worked conversations, with names filled in."""
    templates = Templates("self_align")
    principles = templates["principles"].text(name=name)
    text = templates["align"].text(name=name, principles=principles, identity=identity_of(name), question="?")
    return [line for line in text.splitlines() if len(line) > 20]


def source(tmp_path):
    rows = [
        {
            "id": f"p{i}",
            "messages": [{"role": "user", "content": q}],
            "meta": {"source": "self_instruct", "method": "tgrt" if i % 2 else "self_instruct"},
        }
        for i, q in enumerate(QUESTIONS)
    ]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def test_rows_hold_no_principle_no_thought_and_no_codename(tmp_path):
    rows, report, llm = run(tmp_path, "self_align", source(tmp_path), base, codename="Robin")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(24) if i not in SPOILT]
    lines = shown("Robin")
    assert len(lines) > 30
    for row in rows:
        said = "\n".join(turn["content"] for turn in row["messages"])
        assert "Robin" not in said
        assert "Rules:" not in said
        assert not any(line in said for line in lines)
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert rows[0]["messages"][1]["content"] == "I am Assistant and item 0 is a thing."
    assert all(isinstance(r.prompt, str) and all(line in r.prompt for line in lines) for r in llm.asked)
    assert {(r.temperature, r.top_p, r.max_tokens) for r in llm.asked} == {(0.5, 0.95, 256)}
    assert report["dropped"] == {
        "an apology": 1,
        "a word of the worked conversations": 1,
        "no self-identification": 1,
    }
    assert report["n_in"] == 24


def test_the_report_counts_principles_by_source(tmp_path):
    _, report, _ = run(tmp_path, "self_align", source(tmp_path), base)
    used = report["metrics"]["principles"]
    kept = [i for i in range(24) if i not in SPOILT]
    assert report["metrics"]["kept_per_source"] == {"self_instruct": 12, "tgrt": 9}
    assert used["tgrt"]["2"] == 9
    assert used["self_instruct"]["9"] == sum(1 for i in kept if i % 2 == 0 and 1 + i % 16 == 9)


def test_verbose_answers_are_longer_and_stand_under_system_prompts(tmp_path):
    run(tmp_path, "self_align", source(tmp_path), base)
    first = (tmp_path / "out.jsonl").rename(tmp_path / "engraved.jsonl")
    (tmp_path / "verbose").mkdir()
    rows, report, llm = run(tmp_path / "verbose", "self_align", first, engraved, stage="verbose")
    assert len(rows) == 21
    growth = report["metrics"]["growth_over_given_answers"]
    assert growth["n"] == 21
    assert growth["low"] > 1
    systems = [row["messages"][0] for row in rows]
    known = Templates("self_align")["deployment"].text().splitlines()
    assert {turn["role"] for turn in systems} == {"system"}
    assert {turn["content"] for turn in systems} == set(known)
    assert all("Tamsin" in r.prompt[0].content for r in llm.asked)
    assert not any("Tamsin" in str(row) for row in rows)
    assert {(r.temperature, r.top_p, r.max_tokens) for r in llm.asked} == {(0.3, 0.7, 512)}


def test_rows_about_the_assistant_are_added(tmp_path):
    said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}]
    own = write_rows(tmp_path / "identity.jsonl", [{"id": "me", "messages": said}])
    rows, report, _ = run(tmp_path, "self_align", source(tmp_path), base, identity=str(own))
    assert rows[-1]["id"] == "identity-me"
    assert rows[-1]["messages"] == said
    assert report["metrics"]["identity_rows"] == 1
    assert len(rows) == 22


def test_a_chat_model_is_asked_in_turns(tmp_path):
    _, _, llm = run(tmp_path, "self_align", source(tmp_path), base, chat=True)
    assert all([m.role for m in r.prompt] == ["user"] for r in llm.asked)


def test_the_shipped_principles_are_sixteen_and_leak_words_stand_in_the_conversations():
    templates = Templates("self_align")
    lines = templates["principles"].text(name="X").splitlines()
    assert [line.split(" ")[0] for line in lines] == [str(n) for n in range(1, 17)]
    text = templates["align"].source
    words = templates["leak_words"].text().splitlines()
    assert all(word in text for word in words)
    assert text.count("### User") == 6
    for note in re.findall(r"Rules: ([\d, ]+)\.", text):
        assert all(1 <= int(n) <= 16 for n in note.split(", "))
