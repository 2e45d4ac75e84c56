"""Prompts grow: lists are parsed, near copies left out, topics stay balanced, questions keep to them."""

from __future__ import annotations

import json
import re

import pytest

from jaxalign.data.readers import read_prompts
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion
from jaxalign.synth import topics
from jaxalign.synth.self_instruct import SEEDS, Task, _Pool, fault, parse_tasks, phrases
from jaxalign.synth.templates import Templates
from jaxalign.synth.topics import Hint, balanced, is_topic, parse_questions, parse_topics, unlike
from jaxalign.text_stats import rouge_l
from tests.marker_world import asked
from tests.synth.bench import run, write_rows

MEDIA = phrases("draw\nimage\ngo to")


def reply(text: str, finish: str = "stop") -> tuple[Completion, ...]:
    return (Completion(text, finish),)


# ------------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three birds", "too short"),
        ("Name three small birds", ""),
        ("word " * 150, ""),
        ("word " * 151, "too long"),
        ("Please draw a cat and a dog", "needs more than text"),
        ("Explain the withdrawal of old coins", ""),
        ("First go to the page and read", "needs more than text"),
        ("- Name three small birds", "begins with punctuation"),
        ("Éclairs are baked in which oven", "begins with no ASCII letter"),
    ],
)
def test_an_instruction_is_refused_for_its_first_fault(text, reason):
    assert fault(text.strip(), MEDIA) == reason


def with_common(common: int, length: int) -> tuple[str, str]:
    """Two texts of so many words each, of which the first `common` agree: ROUGE-L = common / length."""
    first = [f"w{i}" for i in range(length)]
    return " ".join(first), " ".join([*first[:common], *(f"v{i}" for i in range(length - common))])


@pytest.mark.parametrize(("common", "length", "kept"), [(7, 10, 1), (70, 100, 1), (71, 100, 0), (5, 7, 0)])
def test_rouge_of_070_is_kept_and_of_071_is_dropped(common, length, kept):
    old, new = with_common(common, length)
    assert rouge_l(old, new) == common / length
    pool = _Pool([], MEDIA, 0.7)
    pool.rouge.add(old)
    pool.offer("new", Task(new))
    assert len(pool.kept) == kept
    assert pool.dropped["like another task"] == 1 - kept


def test_two_new_tasks_that_are_alike_are_not_both_kept():
    pool = _Pool([], MEDIA, 0.7)
    for i in range(2):
        pool.offer(str(i), Task("Name three small birds of the sea"))
    assert list(pool.kept) == ["0"]


# ------------------------------------------------------------------------------------------------ lists


def test_a_list_is_continued_and_its_cut_end_left_out():
    text = (
        "Sort these.\n6. Input: b, a\n###\n7. Instruction: Say hello.\n7. Input: <noinput>\n###\n8. Instruc"
    )
    found, _ = parse_tasks(reply(text, "length"), first=6)
    assert found == {
        "tasks": [
            {"instruction": "Sort these.", "input": "b, a"},
            {"instruction": "Say hello.", "input": ""},
        ],
        "malformed": 0,
    }


@pytest.mark.parametrize("said", ["<noinput>", "{noinput}", "No input.", "(no input)"])
def test_no_input_is_understood_however_it_is_bracketed(said):
    found, _ = parse_tasks(reply(f"Sort these.\n6. Input: {said}"), first=6)
    assert found["tasks"][0]["input"] == ""


def test_a_list_may_repeat_its_first_number_and_numbers_must_agree():
    text = "6. Instruction: Sort these.\n6. Input: b\n###\n7. Instruction: Oh.\n8. Input: c\n###"
    found, _ = parse_tasks(reply(text), first=6)
    assert [task["instruction"] for task in found["tasks"]] == ["Sort these."]
    assert found["malformed"] == 1
    assert parse_tasks(reply("I cannot do that."), first=6) == (None, "no task")


# ------------------------------------------------------------------------------------------------ topics


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Tea", True),
        ("Old tea houses", True),
        ("Very old tea houses", False),
        ("tea", False),
        ("Tea.", False),
    ],
)
def test_a_topic_has_up_to_three_words_and_a_capital(text, good):
    assert is_topic(text) is good


def test_topics_are_balanced_to_the_smallest_kind():
    pools = {name: [f"T{i}" for i in range(n)] for name, n in (("a", 7), ("b", 4), ("c", 9))}
    assert {name: len(found) for name, found in balanced(pools).items()} == {"a": 4, "b": 4, "c": 4}
    assert balanced(pools)["c"] == ["T0", "T1", "T2", "T3"]


def test_topics_are_the_same_whatever_their_capitals():
    assert unlike(["Tea", "Salt", "TEA", "salt", "Rye"]) == ["Tea", "Salt", "Rye"]


def test_a_list_of_topics_ends_where_its_numbers_do():
    found, _ = parse_topics(reply("Rye\n3. wheat\n4. Old Barns\n6. Gone"), first=2)
    assert found == {"topics": ["Rye", "Old Barns"], "refused": 1}
    found, _ = parse_topics(reply("Rye\n3. Barl", "length"), first=2)
    assert found["topics"] == ["Rye"]


HINTS = [Hint("art", "Clay"), Hint("art", "Glass")]


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("6. type: art, topic: Clay, instruction: Weigh it.", "Weigh it."),
        ("6. type: art, topic: Clay pots, instruction: Weigh it.", None),
        ("6. type: art, topic: Glass, instruction: Weigh it.", None),
        ("6. type: music, topic: Clay, instruction: Weigh it.", None),
        ("7. type: art, topic: Clay, instruction: Weigh it.", None),
        ("6. type: Art, topic: Clay, instruction: Weigh it.", None),
        ("6. type: art, topic: Clay, instruction: ", None),
    ],
)
def test_a_question_counts_only_after_its_exact_prefix(line, question):
    other = "7. type: art, topic: Glass, instruction: Break it."
    assert parse_questions(reply(f"{line}\n{other}"), HINTS, first=6) == ([question, "Break it."], "")


def test_lines_without_any_prefix_are_no_answer():
    assert parse_questions(reply("Weigh it.\nBreak it."), HINTS, first=6)[0] is None


# ------------------------------------------------------------------------------------------------ builds


VERBS = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "le") for b in ("nd", "sk", "rt", "lm", "ft")]


def writer(request, number, rng):
    """Lists of tasks of random words, topics, and questions of which every third is about something else."""
    text = asked(request)
    if "Instruction:" in text:
        first = int(re.findall(r"(\d+)\. Instruction:$", text)[0])
        out = []
        for i in range(first, first + 4):
            words = " ".join(rng.choice(VERBS, 8))
            out.append(f"{i}. Instruction: {words}\n{i}. Input: <noinput>\n###")
        out.append(f"{first + 4}. Instruction: draw a nice picture now\n{first + 4}. Input: x\n###")
        return "\n".join(out)
    if "The kinds and topics" in text:
        hints = re.findall(r"^(\d+)\. (type: .*, topic: .*)$", text.split("The same list")[0], re.MULTILINE)
        lines = [f"{n}. {about}, instruction: Ask {rng.choice(VERBS)}." for n, about in hints[5:]]
        return "\n".join(re.sub("topic: ", "topic: No ", s) if i % 3 == 0 else s for i, s in enumerate(lines))
    first = int(text.split("\n")[-1].rstrip("."))
    return "\n".join(f"{first + i}. {rng.choice(VERBS).title()}" for i in range(5))


def test_a_build_from_the_seeds_of_the_package(tmp_path):
    keys = {"count": 40, "requests": 4, "topics": {"rounds": 2, "question_rounds": 2}}
    rows, report, _ = run(tmp_path, "self_instruct", None, writer, **keys)
    tasks = [row for row in rows if row["meta"]["method"] == "self_instruct"]
    asked_of = [row for row in rows if row["meta"]["method"] == "tgrt"]
    assert len(tasks) == 40
    assert report["dropped"]["needs more than text"] >= 10
    assert report["metrics"]["nearest_rouge_l"]["mean"] <= 0.7
    found = report["metrics"]["topics"]
    assert found["types"] == 20
    assert len(asked_of) == found["questions"] == sum(found["questions_per_type"].values()) > 20
    assert report["dropped"]["question off its topic"] > 0
    assert not any(" No " in row["messages"][0]["content"] for row in asked_of)
    assert len({(row["meta"]["type"], row["meta"]["topic"]) for row in asked_of}) == len(asked_of)
    assert {"tasks-1", "tasks-2", "tasks-3", "topics-1", "topics-2", "questions-1"} <= report["stages"].keys()
    assert len(read_prompts(tmp_path / "out.jsonl")[0]) == len(rows)
    (tmp_path / "again").mkdir()
    again, _, _ = run(tmp_path / "again", "self_instruct", None, writer, **keys)
    assert again == rows


def test_every_two_tasks_of_a_build_are_unlike(tmp_path):
    seeds = write_rows(tmp_path / "seeds.jsonl", [{"instruction": f"seed number {v}"} for v in VERBS[:5]])
    keys = {"count": 30, "requests": 4, "topics": None, "rouge": 0.4, "grown": 2}
    rows, report, llm = run(tmp_path, "self_instruct", seeds, writer, **keys)
    texts = [row["messages"][0]["content"] for row in rows]
    likeness = [rouge_l(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    assert max(likeness) <= 0.4
    assert report["dropped"]["like another task"] > 0
    assert report["n_in"] == 5
    assert all(asked(r).count("###") == 6 for r in llm.asked)  # five examples, and the rule that names it
    assert len(report["stages"]) > 1
    assert any(text in asked(r) for text in texts for r in llm.asked)


def test_too_few_seeds_are_refused(tmp_path):
    seeds = write_rows(tmp_path / "seeds.jsonl", [{"instruction": "Only one seed here"}])
    with pytest.raises(UserError, match="1 seeds, and every list begins with 5"):
        run(tmp_path, "self_instruct", seeds, writer)


def test_what_is_shipped_passes_its_own_filters():
    rows = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    media = phrases(Templates("self_instruct")["media_words"].text())
    assert len(rows) == 30
    pool = _Pool([], media, 0.7)
    for row in rows:
        pool.offer(row["id"], Task(row["instruction"]))
    assert len(pool.kept) == 30, pool.dropped
    seeds = [json.loads(line) for line in topics.SEEDS.read_text(encoding="utf-8").splitlines()]
    assert len({seed["type"] for seed in seeds}) == len(seeds) == 20
    assert all(is_topic(seed["topic"]) for seed in seeds)
