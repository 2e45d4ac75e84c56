import itertools
from collections import Counter

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.synth.turns import transcript
from tests.marker_world import answer, asked, bugs, format_breaking, quality
from tests.synth.bench import run, write_prompts

N = 60
TALK = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("in") / "prompts.jsonl", [f"question {i}" for i in range(N)])


def by_character(request, number, rng):
    """Better in a character that is called kind, worse in one that is called hostile."""
    good = "friendly" in asked(request)
    return answer(ok=1 + int(good) * int(rng.integers(3))) if good else answer(bug=1)


CHARACTERS = "is friendly | is hostile\nis a friendly person | is a hostile person\n"


def templates(tmp_path, **files):
    folder = tmp_path / "templates"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_transcript_bears_the_opposite_character_in_the_turns_before():
    turns = [Message(*turn) for turn in TALK]
    assert transcript(turns) == "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:"
    positive = transcript(turns, last="P", earlier="N")
    assert positive.endswith("\n\nAssistant (P):")
    assert "\n\nAssistant (N): A1" in positive
    negative = transcript(turns, last="N", earlier="P")
    assert negative.endswith("\n\nAssistant (N):")
    assert "\n\nAssistant (P): A1" in negative


@pytest.mark.parametrize("form", ["chat", "transcript"])
def test_the_label_is_the_character(form, prompts, tmp_path):
    own = templates(tmp_path, characters_harmless=CHARACTERS)
    rows, report, llm = run(tmp_path, "rlcd", prompts, by_character, form=form, templates=own)
    assert len(rows) == N
    assert all(quality(row["chosen"]) > 0 > quality(row["rejected"]) for row in rows)
    assert [row["prompt"][0]["content"] for row in rows] == [f"question {i}" for i in range(N)]
    used = Counter(row["meta"]["character"] for row in rows)
    assert report["metrics"]["characters"] == [used[0], used[1]]
    assert abs(used[0] - N / 2) < 3 * (N / 4) ** 0.5
    # Both sides of a pair play the two ends of one line.
    lines = [[part.strip() for part in line.split("|")] for line in CHARACTERS.splitlines()]
    for row, good, bad in zip(rows, llm.asked[:N], llm.asked[N:], strict=True):
        end = ":" if form == "transcript" else ". Stay"
        ends = [f"{c}{')' if form == 'transcript' else ''}{end}" for c in lines[row["meta"]["character"]]]
        assert ends[0] in asked(good)
        assert ends[1] in asked(bad)


def test_every_line_of_characters_has_two_ends():
    from jaxalign.synth.templates import Templates

    for task, count in (("harmless", 16), ("helpful", 1)):
        lines = Templates("rlcd")[f"characters_{task}"].source.splitlines()
        pairs = [tuple(part.strip() for part in line.split("|")) for line in lines]
        assert len(pairs) == count
        assert all(len(pair) == 2 and pair[0] != pair[1] and all(pair) for pair in pairs)


def test_a_side_that_fails_removes_the_whole_item(prompts, tmp_path):
    def script(request, number, rng):
        hostile = "hostile" in asked(request)
        return "`code`" if hostile and request.prompt[-1].content == "question 7" else answer(bug=hostile)

    own = templates(tmp_path, characters_harmless=CHARACTERS)
    rows, report, llm = run(tmp_path, "rlcd", prompts, script, templates=own)
    assert len(rows) == N - 1
    assert "q7" not in {row["id"] for row in rows}
    assert report["stages"]["negative"]["rejects"] == {"characters of code": 1}
    assert report["dropped"]["one of the two answers is missing"] == 1
    assert len(llm.asked) == 2 * N + 5  # five more tries of one side


def test_what_a_base_model_writes_after_its_answer_is_cut(prompts, tmp_path):
    def script(request, number, rng):
        return f"draft Assistant: {answer(ok=1)}\n\nHuman: and now?"

    rows, _, _ = run(tmp_path, "rlcd", prompts, script, form="transcript", output="sft", limit=3)
    assert [row["messages"][-1]["content"] for row in rows] == [answer(ok=1)] * 3


def by_quality(prompt, option):
    """log p of A and B: the better of the two answers, by one nat for each mark."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content
    first, second = text.split("(A) ")[1].split("(B) ")
    return float(quality(first) if option == "A" else quality(second.split("\n")[0]))


def two_answers(request, number, rng):
    return answer(ok=int(rng.integers(3)), bug=int(rng.integers(2)))


@pytest.mark.parametrize("both_orders", [True, False])
def test_a_judge_who_sees_quality_labels_rightly(both_orders, prompts, tmp_path):
    rows, report, _ = run(
        tmp_path, "rlaif", prompts, two_answers, by_quality, both_orders=both_orders, max_bad_rows=0.5
    )
    assert rows
    assert all(quality(row["chosen"]) >= quality(row["rejected"]) for row in rows)
    assert any(quality(row["chosen"]) > quality(row["rejected"]) for row in rows)
    equal = report["dropped"].get("two equal answers", 0)
    assert len(rows) + equal == N
    assert equal > 0
    assert report["metrics"]["position_consistency"] == (1.0 if both_orders else None)


def test_a_judge_who_sees_the_order_alone_prefers_nothing(prompts, tmp_path):
    first = lambda prompt, option: 1.0 if option == "A" else 0.0  # noqa: E731
    rows, report, _ = run(tmp_path, "rlaif", prompts, two_answers, first)
    assert report["metrics"]["position_consistency"] == 0.0
    assert {row["meta"]["margin"] for row in rows} == {0.0}
    flips = [quality(row["chosen"]) - quality(row["rejected"]) for row in rows]
    assert min(flips) < 0 < max(flips)


def test_one_order_is_drawn_evenly(prompts, tmp_path):
    first = lambda prompt, option: 1.0 if option == "A" else 0.0  # noqa: E731
    rows, _, _ = run(tmp_path, "rlaif", prompts, two_answers, first, both_orders=False)
    kept = sum(row["meta"]["first_better"] > 0.5 for row in rows)
    assert abs(kept - len(rows) / 2) < 3 * (len(rows) / 4) ** 0.5
    assert {round(row["meta"]["margin"], 4) for row in rows} == {0.4621}  # |2 sigma(1) - 1|


def test_contrasted_answers_may_be_rescored(prompts, tmp_path):
    own = templates(tmp_path, characters_harmless=CHARACTERS)
    worse = lambda prompt, option: -by_quality(prompt, option)  # noqa: E731
    rows, report, _ = run(tmp_path, "rlcd", prompts, by_character, worse, rescore=True, templates=own)
    assert len(rows) == N
    assert all(quality(row["chosen"]) < quality(row["rejected"]) for row in rows)
    assert report["metrics"]["first_better"] == 0.0


def test_a_killed_build_goes_on_and_ends_alike(prompts, tmp_path):
    script = format_breaking(two_answers, 0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(whole, "rlaif", prompts, script, by_quality)

    class KilledError(Exception):
        pass

    for wait in (10, 30, 47):
        left = itertools.count()

        def dies(request, number, rng, left=left, wait=wait):
            if next(left) == wait:
                raise KilledError
            return script(request, number, rng)

        with pytest.raises(KilledError):
            run(parts, "rlaif", prompts, dies, by_quality)
    run(parts, "rlaif", prompts, script, by_quality)
    found = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert found == {p.relative_to(parts): p.read_bytes() for p in parts.rglob("*") if p.is_file()}
    assert len(found) >= 6


def test_another_build_must_not_go_on_with_these_stages(prompts, tmp_path):
    run(tmp_path, "rlaif", prompts, two_answers, by_quality)
    with pytest.raises(UserError, match=r"begun with something else: settings: seed 0 -> 1\n"):
        run(tmp_path, "rlaif", prompts, two_answers, by_quality, seed=1)
    prompts_now = write_prompts(tmp_path / "prompts.jsonl", ["another"])
    with pytest.raises(UserError, match=r"data: prompts\.jsonl"):
        run(tmp_path, "rlaif", prompts_now, two_answers, by_quality)


def test_a_build_needs_a_model(prompts, tmp_path):
    from jaxalign import api

    with pytest.raises(UserError, match="no model is named"):
        api.build("rlcd", None, prompts, tmp_path / "x.jsonl")
    assert bugs(answer(bug=2)) == [0, 1]
