import re

import pytest

from jaxalign.llm.base import Completion
from jaxalign.synth.cnr import CRITIQUE, DONE, REVISION, sections
from tests.marker_world import answer, asked, bugs, noisy, quality
from tests.synth.bench import run, write_prompts, write_rows

MARK = re.compile(r"Answer:\n(.*?)\n\n", re.DOTALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Answers with 0 to 6 bugs."""
    rows = [
        {
            "id": f"k{k}-{i}",
            "messages": [
                {"role": "user", "content": f"task {k} {i}"},
                {"role": "assistant", "content": answer(ok=1, bug=k)},
            ],
        }
        for k in range(7)
        for i in range(2)
    ]
    return write_rows(tmp_path_factory.mktemp("in") / "answers.jsonl", rows)


def reviser(request, number, rng):
    """Names every bug, and removes the last."""
    text = MARK.search(asked(request)).group(1)
    found = bugs(text)
    if not found:
        return f"{CRITIQUE}\n{DONE}"
    named = ", ".join(f"bug {b}" for b in found)
    return f"{CRITIQUE}\nIt has {named}.\n{REVISION}\n{text.replace(f'<bug:{found[-1]}>', '').strip()}"


@pytest.mark.parametrize("passes", [1, 3, 5])
def test_every_pass_removes_one_fault(passes, data, tmp_path):
    rows, report, llm = run(tmp_path, "cnr", data, reviser, answers="given", passes=passes)
    counts = [min(k, passes) for k in range(7) for _ in range(2)]
    assert len(rows) == sum(counts)
    for row in rows:
        assert len(bugs(row["rejected"])) - len(bugs(row["chosen"])) == 1
        assert all(f"bug {b}" in row["meta"]["critique"] for b in bugs(row["rejected"]))
        assert row["prompt"][0]["content"].startswith("task")
    metrics = report["metrics"]
    assert metrics["passes"] == {str(n): counts.count(n) for n in range(max(counts) + 1)}
    assert metrics["ended"].get("nothing to improve", 0) == sum(2 for k in range(7) if k < passes)
    assert len(llm.asked) == sum(2 * min(k + 1, passes) for k in range(7))


def test_a_reviser_that_repeats_the_answer_makes_no_pair(data, tmp_path):
    def echo(request, number, rng):
        return f"{CRITIQUE}\nIt is what it is.\n{REVISION}\n{MARK.search(asked(request)).group(1)}"

    rows, report, _ = run(tmp_path, "cnr", data, echo, answers="given")
    assert rows == []
    assert report["metrics"]["ended"] == {"unchanged": 14}


def better(prompt, option):
    text = prompt[-1].content
    first, second = text.split("(A) ")[1].split("(B) ")
    return float(quality(first) if option == "A" else quality(second.split("\n")[0]))


def spoil(text):
    return text if DONE in text else f"{text} <bug:97> <bug:98>"


def test_a_noisy_reviser_is_right_as_often_as_it_is_not_noisy(tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", [f"task {i}" for i in range(2000)])

    def writer(request, number, rng):
        return answer(bug=3)

    def script(request, number, rng):
        plain = asked(request).startswith("task")
        return writer(request, number, rng) if plain else noisy(reviser, 0.2, spoil)(request, number, rng)

    rows, report, _ = run(tmp_path, "cnr", prompts, script, better, passes=1, compare=True)
    assert len(rows) == 2000
    rate = report["metrics"]["win_rate_over_first"]["1"]
    right = sum(quality(row["chosen"]) > quality(row["rejected"]) for row in rows) / 2000
    assert rate["mean"] == pytest.approx(right)
    assert rate["mean"] == pytest.approx(0.8, abs=0.03)


def test_a_judge_lets_only_better_answers_through(data, tmp_path):
    script = noisy(reviser, 0.4, spoil)
    rows, report, _ = run(tmp_path, "cnr", data, script, better, answers="given", accept="judge")
    assert rows
    assert all(quality(row["chosen"]) > quality(row["rejected"]) for row in rows)
    assert report["metrics"]["refused_revisions"]["not preferred"] > 0


def test_critique_and_revision_may_be_two_requests(data, tmp_path):
    def script(request, number, rng):
        text, whole = MARK.search(asked(request)).group(1), asked(request)
        if "Comments:" in whole:
            assert "bug" in whole.split("Comments:")[1]
            return text.replace(f"<bug:{bugs(text)[-1]}>", "").strip()
        return "".join(f"bug {b}. " for b in bugs(text)) or DONE

    rows, report, llm = run(tmp_path, "cnr", data, script, answers="given", steps="apart", passes=2)
    assert len(rows) == sum(2 * min(k, 2) for k in range(7))
    assert {"critique-1", "revise-1", "critique-2", "revise-2"} == set(report["stages"])
    assert len(llm.asked) == (14 + 12) + (12 + 10)


def test_rows_that_teach_critique_and_revision_parse_again(data, tmp_path):
    rows, _, _ = run(tmp_path, "cnr", data, reviser, answers="given", output="teach")
    assert len(rows) == sum(2 * min(k, 5) for k in range(7))
    for row in rows:
        question, reply = (turn["content"] for turn in row["messages"])
        value, _ = sections((Completion(reply),))
        assert len(bugs(MARK.search(question).group(1))) - len(bugs(value["revision"])) == 1


def test_last_answers_to_imitate(data, tmp_path):
    rows, _, _ = run(tmp_path, "cnr", data, reviser, answers="given", output="sft")
    assert [len(bugs(row["messages"][-1]["content"])) for row in rows] == [0] * 12 + [1] * 2


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("no form at all", "stop", "headers"),
        (f"{CRITIQUE}\na\n{REVISION}\nb\n{REVISION}\nc", "stop", "headers"),
        (f"{CRITIQUE}\n{REVISION}\nb", "stop", "no critique"),
        (f"{CRITIQUE}\na\n{REVISION}\n", "stop", "no revision"),
        (f"{CRITIQUE}\na", "stop", "no revision"),
        (f"{CRITIQUE}\na\n{REVISION}\nb", "length", "does not end"),
    ],
)
def test_replies_without_the_form_are_not_understood(text, finish, reason):
    value, said = sections((Completion(text, finish),))
    assert value is None
    assert reason in said


def test_sections_of_a_reply():
    assert sections((Completion(f"{CRITIQUE}\na\n{REVISION}\nb\nc"),))[0] == {
        "critique": "a",
        "revision": "b\nc",
    }
    assert sections((Completion(f"{CRITIQUE}\n{DONE}"),))[0] == {"critique": DONE, "revision": None}
