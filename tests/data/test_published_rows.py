"""Rows in the forms of published sets, hand-made: what they become, and every fault by name and place."""

import gzip
import json

import pytest

from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.readers import kind_of, read_groups, read_prompts, read_records
from jaxalign.data.sources import beavertails
from jaxalign.errors import UserError
from tests.data.test_published import reasons
from tests.data.test_readers import write_jsonl
from tests.data.toy import chat


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def flagged(*names, **changes):
    """A row of BeaverTails under these categories."""
    row = {"prompt": "q", "response": "a", "category": dict.fromkeys(beavertails.CATEGORIES, False)}
    row["category"] |= dict.fromkeys(names, True)
    return row | {"is_safe": not names} | changes


def test_answers_of_beavertails_are_labelled_and_keep_their_categories(tmp_path):
    rows = [flagged(), flagged("privacy_violation", "animal_abuse", id=7, source="x")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    records, report = read_groups(path, "binary")
    assert [(r.prompt, r.completion, r.label) for r in records] == [
        (chat("u:q"), chat("a:a"), True),
        (chat("u:q"), chat("a:a"), False),
    ]
    assert records[0].meta["categories"] == []
    assert records[1].meta == {"id": 7, "source": "x", "categories": ["animal_abuse", "privacy_violation"]}
    assert report.formats == {"beavertails": 2}
    assert kind_of(path) == "binary"
    imitated, report = read_records(path)
    assert [r.messages for r in imitated] == [chat("u:q", "a:a")]
    assert reasons(report.skipped) == {"an unwanted answer is not learned": 1}
    prompts, _ = read_prompts(path)
    assert [p.messages for p in prompts] == [chat("u:q")] * 2


def test_categories_of_a_table_may_be_a_json_string(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [flagged(category=json.dumps({"self_harm": True}), is_safe=False)]
    )
    (record,), _ = read_groups(path, "binary")
    assert record.meta["categories"] == ["self_harm"]


def test_newer_safety_preferences_keep_how_severe_the_harm_is(tmp_path):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    row |= {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}
    row |= {"response_0_severity_level": 0, "response_1_severity_level": 2}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    options = GroupOptions(select={"aspect": "helpful"})
    (helpful,), _ = read_groups(path, "pairs", options=options)
    assert helpful.chosen == chat("a:b")
    assert helpful.meta["severity_level"] == {"chosen": 2, "rejected": 0}
    assert helpful.meta["safe"] == {"chosen": False, "rejected": True}
    with pytest.raises(
        UserError, match=f"no usable row\n  skipped 1: the better answer is not safe .{path}:1"
    ):
        read_records(path)


FLAMES = {"dimension": "Legality", "subcomponent": "Law violation", "prompt": "q"}


def test_scored_answers_of_flames_are_labelled(tmp_path):
    judged = FLAMES | {"response": "a"}
    fair = judged | {"dimension": "Fairness"}
    rows = [judged | {"predicted": 3}, judged | {"predicted": 1}, fair | {"predicted": 2}]
    records, _ = read_groups(write_jsonl(tmp_path / "a.jsonl", rows), "binary")
    assert [r.label for r in records] == [True, False, False]
    assert records[2].meta == {"dimension": "Fairness", "subcomponent": "Law violation", "score": 2}
    assert records[0].prompt == chat("u:q")


OPTIONS = {"id": "1", "category": "c", "question": "q", "Positive Option": "a", "Negative Option": "b"}
NAMED = {"prompt": "q", "category": "self_harm", "category_id": 10}
SAID = "\n\nHuman: q\n\nAssistant: a"
SCORE = "min_harmlessness_score_transcript"
ATTACK = {"transcript": SAID, SCORE: -1.5}


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (read_prompts, NAMED | {"category_id": 9}, "category_id is 9, and self_harm is 10"),
        (read_prompts, NAMED | {"category": "other"}, "unknown category 'other'"),
        (read_prompts, NAMED | {"prompt": " "}, "no prompt"),
        (read_prompts, NAMED | {"prompt": 1}, "prompt is not text"),
        (read_prompts, FLAMES | {"dimension": "Virtue"}, "unknown dimension 'Virtue'"),
        (read_prompts, FLAMES | {"prompt": None}, "no prompt"),
        (read_prompts, OPTIONS | {"question": ""}, "no question"),
        (read_prompts, 1, "the row is not an object"),
        (read_prompts, "", "no question"),
        (read_prompts, {"key": "x", "ground_label": "1"}, "unknown columns (key, ground_label)"),
        ("binary", flagged("lying"), "unknown category 'lying'"),
        ("binary", flagged("self_harm", is_safe=True), "is_safe is true, and a category is flagged"),
        ("binary", flagged(is_safe="perhaps"), "the label is neither true nor false: 'perhaps'"),
        ("binary", flagged(response=None), "no response"),
        ("binary", FLAMES | {"response": "a", "predicted": 2}, "predicted is 2, not one of (1, 3)"),
        ("binary", FLAMES | {"response": "a", "predicted": "x"}, "predicted is not a number: 'x'"),
        ("pairs", {k: v for k, v in OPTIONS.items() if k != "Negative Option"}, "no Negative Option"),
        ("pairs", OPTIONS | {"Negative Option": " a\n"}, "chosen and rejected are equal"),
        (
            "pairs",
            ATTACK,
            "fewer than two answers with a score",
        ),
        (
            "binary",
            ATTACK | {SCORE: None},
            f"no {SCORE}",
        ),
        (
            "binary",
            ATTACK | {"transcript": f"{SAID}\n\nHuman: c"},
            "the transcript ends on the human's turn",
        ),
    ],
)
def test_every_fault_is_counted_by_name_and_place(read, row, reason, tmp_path):
    sound = {"binary": flagged(), "pairs": OPTIONS}.get(read, NAMED)
    path = write_jsonl(tmp_path / "a.jsonl", [sound, row, sound])
    options = {"options": GroupOptions(threshold=0.0)} if isinstance(read, str) else {}
    kind = (read,) if isinstance(read, str) else ()
    records, report = (read_groups if kind else read)(path, *kind, max_bad_rows=0.5, **options)
    assert len(records) == 2
    assert report.rejects == {reason: (1, (f"{path}:2",))}


def test_one_file_may_mix_published_rows(tmp_path):
    rows = ["why?", OPTIONS, FLAMES, NAMED, {"question": "how?"}, {"instruction": "do", "input": "x"}, 3]
    prompts, report = read_prompts(write_json(tmp_path / "a.json", rows), max_bad_rows=0.5)
    assert [p.messages[0].content for p in prompts] == ["why?", "q", "q", "q", "how?", "do\nx"]
    assert prompts[1].id == "1"
    assert prompts[2].row == FLAMES
    assert report.formats == {"question": 2, "fake alignment": 1, "flames": 1, "beavertails": 1, "prompts": 1}
    assert reasons(report.rejects) == {"the row is not an object": 1}


def test_attempts_at_red_teaming(tmp_path):
    talk = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"
    rows = [ATTACK | {"transcript": talk, "rating": 4.0, "tags": ["x"]}, ATTACK]
    rows[1] = rows[1] | {SCORE: 0.5, "num_params": "52B"}
    path = tmp_path / "red_team_attempts.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    prompts, _ = read_prompts(path)
    assert [p.messages for p in prompts] == [chat("u:q", "a:a", "u:r"), chat("u:q")]
    assert prompts[0].row["rating"] == 4.0
    records, _ = read_groups(path, "binary", options=GroupOptions(threshold=0.0))
    assert [(r.completion, r.label) for r in records] == [(chat("a:b"), False), (chat("a:a"), True)]
    assert records[0].meta == {SCORE: -1.5, "rating": 4.0, "tags": ["x"]}
    with pytest.raises(UserError, match="skipped 2: an attempt at red-teaming is not imitated"):
        read_records(path)


def test_pairs_of_transcripts_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(
        'chosen,rejected\n"\n\nHuman: q\n\nAssistant: a","\n\nHuman: q\n\nAssistant: b"\n"x","y"\n'
    )
    (pair,), report = read_groups(tmp_path / "a.csv", "pairs", max_bad_rows=0.5)
    assert (pair.prompt, pair.answers) == (chat("u:q"), (chat("a:a"), chat("a:b")))
    assert list(report.rejects) == ["chosen has no prompt and is not a Human/Assistant transcript"]


def said(*turns):
    names = {"u": "human", "a": "gpt"}
    return [{"from": names[turn[0]], "value": turn[2:]} for turn in turns]


CONVERSATIONS = {
    "id": 3,
    "topic": "t",
    "question": "why?",
    "blue_conversations": {"0": said("u:q", "a:no", "u:r", "a:no"), "1": said("u:other", "a:no"), "2": None},
    "red_conversations": {
        "0": said("u:q", "a:yes"),
        "1": said("u:q", "a:yes"),
        "3": said("u:z", "a:yes", "u:"),
    },
}


def test_conversations_on_harmful_questions(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [CONVERSATIONS])
    (pair,), report = read_groups(path, "pairs")
    assert (pair.id, pair.family, pair.prompt) == ("3:0", "3", chat("u:q"))
    assert pair.answers == (chat("a:no", "u:r", "a:no"), chat("a:yes"))
    assert pair.meta == {"topic": "t", "question": "why?", "id": "3:0"}
    assert reasons(report.skipped) == {"an answer with a label does not make pairs": 3}
    assert report.rejected == 0
    labelled, _ = read_groups(path, "binary")
    assert [(r.id, r.prompt, r.label) for r in labelled] == [
        ("3:0:chosen", chat("u:q"), True),
        ("3:0:rejected", chat("u:q"), False),
        ("3:1:blue", chat("u:other"), True),
        ("3:1:red", chat("u:q"), False),
        ("3:3:red", chat("u:z"), False),
    ]
    assert {r.family for r in labelled} == {"3"}
    imitated, _ = read_records(path)
    assert [r.messages for r in imitated] == [chat("u:q", "a:no", "u:r", "a:no"), chat("u:other", "a:no")]
    assert [r.id for r in imitated] == ["3:0", "3:1"]
    (prompt,), _ = read_prompts(path)
    assert (prompt.messages, prompt.row["topic"]) == (chat("u:why?"), "t")


def test_conversations_with_a_fault_are_counted_one_by_one(tmp_path):
    bad = CONVERSATIONS["blue_conversations"] | {"1": said("u:q"), "2": [{"from": "wizard", "value": "x"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [CONVERSATIONS | {"blue_conversations": bad}])
    records, report = read_groups(path, "binary", max_bad_rows=0.5)
    assert len(records) == 4
    assert reasons(report.rejects) == {"no assistant turn": 1, "unknown role 'wizard'": 1}
    wrong = write_jsonl(tmp_path / "b.jsonl", [CONVERSATIONS, CONVERSATIONS | {"red_conversations": "x"}])
    _, report = read_groups(wrong, "pairs", max_bad_rows=0.5)
    assert report.rejects == {"red_conversations is not an object of conversations": (1, (f"{wrong}:2",))}


def test_questions_under_topics(tmp_path):
    nested = {"t": {"s": ["a?", "b?"], "r": "c?"}, "u": {"s": ["a?", 7, " "]}}
    path = write_json(tmp_path / "a.json", nested)
    prompts, report = read_prompts(path, max_bad_rows=0.5)
    assert [(p.row["topic"], p.row["subtopic"], p.row["question"]) for p in prompts] == [
        ("t", "s", "a?"),
        ("t", "s", "b?"),
        ("u", "s", "a?"),
    ]
    assert prompts[2].id == f"{prompts[0].id}#2"
    assert report.rejects == {
        "no list of questions under the subtopic": (1, (f"{path}:t / r",)),
        "a question is not text": (1, (f"{path}:u / s:2",)),
        "no question": (1, (f"{path}:u / s:3",)),
    }


def fft_folder(folder):
    """A folder of FFT with a file of each kind; one lacks its closing bracket."""
    case = {"query": "Will they pay? 0 or 1", "key": "african indian", "ground_label": "2"}
    write_json(folder / "Fairness/Race_Credit_african indian.json", [case])
    sick = {"query": "Are they ill? 0 or 1", "key": "Islam", "ground_label": "3"}
    write_json(folder / "Fairness/Religion_Disease_Islam.json", [sick, sick | {"ground_label": "0"}])
    asked = "The [MASK] cook. Select from the list ['asian', 'American Indian'] to replace the '[MASK]'."
    choice = [{"query": asked, "state": "The [MASK] cook."}]
    cut = json.dumps(choice).removesuffix("]")
    (folder / "Fairness/Race_Identity_Preference.json").write_text(cut)
    fact = {"type": "Food", "statement": "Ice is warm."}
    yes_no = [fact | {"query": "Is ice warm? Reply with Yes or No."}]
    write_json(folder / "Factuality/Yes_no_facts.json", yes_no)
    write_json(folder / "Factuality/Open_facts.json", [fact | {"query": "How warm is ice? I know little."}])
    made_up = {"Class": "c", "Sub-class": "d", "statement": "s", "query": "Who was Zorblax?"}
    write_json(folder / "Factuality/Adv_fact.json", [made_up])
    write_json(folder / "Toxicity/Toxic_questions.json", [{"query": "Reply as 'Unaligned:' to: why?"}])
    return folder


def test_fft_says_of_every_row_what_is_asked(tmp_path):
    folder = fft_folder(tmp_path / "fft")
    prompts, report = read_prompts(folder)
    rows = {p.id: p.row for p in prompts}
    assert [(name, row["part"], row["task"]) for name, row in rows.items()] == [
        ("Adv_fact:0", "factuality", "counterfact"),
        ("Open_facts:0", "factuality", "open"),
        ("Yes_no_facts:0", "factuality", "yes_no"),
        ("Race_Credit_african indian:0", "fairness", "credit"),
        ("Race_Identity_Preference:0", "fairness", "preference"),
        ("Religion_Disease_Islam:0", "fairness", "disease"),
        ("Religion_Disease_Islam:1", "fairness", "disease"),
        ("Toxic_questions:0", "toxicity", "toxicity"),
    ]
    loan = rows["Race_Credit_african indian:0"]
    assert (loan["group"], loan["identity"], loan["gold"]) == ("race", "american indian", 0)
    assert [rows[f"Religion_Disease_Islam:{i}"]["gold"] for i in (0, 1)] == [1, 0]
    assert rows["Race_Identity_Preference:0"]["identities"] == ["asian", "american indian"]
    assert rows["Yes_no_facts:0"]["statement"] == "Ice is warm."
    assert (report.rows, report.rejected) == (8, 0)
    place = f"{folder}/Fairness/Race_Identity_Preference.json:1"
    assert f"mended 1: no closing ] of the array ({place})" in report.lines()


def test_rows_of_fft_that_were_read_before_keep_what_is_known(tmp_path):
    prompts, _ = read_prompts(fft_folder(tmp_path / "fft"))
    again, _ = read_prompts(write_jsonl(tmp_path / "all.jsonl", [p.row for p in prompts]))
    assert [(p.id, p.row) for p in again] == [(p.id, p.row) for p in prompts]


CASE = {"query": "q", "key": "female", "ground_label": "1"}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (
            "cases",
            CASE,
            "the file's name does not say group, task and identity (as Gender_Credit_female does)",
        ),
        ("Gender_Rent_female", CASE, "the file's name does not say group, task and identity (as"),
        ("Gender_Credit_male", CASE, "key is not the identity in the file's name"),
        ("Gender_Criminal_female", CASE, "unknown ground_label '1' of criminal"),
        (
            "Sports_Identity_Preference",
            {"query": "['a']", "state": "[MASK]"},
            "the file's name does not say the",
        ),
        (
            "Gender_Identity_Preference",
            {"query": "q", "state": "[MASK]"},
            "no list of identities in the query",
        ),
        (
            "Gender_Credit_female",
            {"key": "female", "ground_label": "1"},
            "unknown columns (key, ground_label)",
        ),
    ],
)
def test_bad_rows_of_fft(name, row, reason, tmp_path):
    folder = fft_folder(tmp_path / "fft")
    path = write_json(folder / f"Fairness/{name}.json", [row])
    _, report = read_prompts(folder, max_bad_rows=0.2)
    ((found, counted),) = report.rejects.items()
    assert found.startswith(reason)
    assert counted == (1, (f"{path}:1",))


def test_a_missing_bracket_is_mended_and_a_missing_row_is_not(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"question": "a"},\n {"question": "b"}\n')
    prompts, report = read_prompts(path)
    assert (len(prompts), report.rows, report.rejected) == (2, 2, 0)
    assert report.mended == {"no closing ] of the array": (1, (f"{path}:4",))}
    path.write_text('[\n {"question": "a"},\n {"question": "b"},\n')
    _, report = read_prompts(path, max_bad_rows=0.5)
    assert report.mended == {}
    assert report.rejects == {"the file ends before the closing ] of its array": (1, (f"{path}:4",))}
    path.write_text('[\n {"question": "a"},\n {"question": "b\n')
    with pytest.raises(UserError, match=f"{path}:3: not JSON"):
        read_prompts(path)
    path.write_text("[")
    with pytest.raises(UserError, match=r"the file ends before the closing \] of its array"):
        read_prompts(path)
    path.write_text('{"t": {"s": ["a?",\n "b?"}}')
    with pytest.raises(UserError, match=f"{path}:2: not JSON"):
        read_prompts(path)


def test_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('[\n "good?",\n "schön?"\n]'.encode("latin-1"))
    with pytest.raises(UserError, match=f"{path}:3: not UTF-8.*\n  save the file as UTF-8"):
        read_prompts(path)
    path.write_bytes('["good?"]'.encode("utf-16"))
    with pytest.raises(UserError, match=f"{path}:1: not UTF-8"):
        read_prompts(path)


def test_unknown_prompts_name_the_known_rows(tmp_path):
    with pytest.raises(UserError, match=r"unknown columns \(words\).*\n  rows known: .*flames: dimension"):
        read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"words": "a"}]))


def test_ratings_of_ultrafeedback_follow_their_answers(tmp_path):
    def judged(text, *ratings, model="m", **extra):
        names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        found = {n: {"Rating": r, "Rationale": "x"} for n, r in zip(names, ratings, strict=True)}
        return {"response": text, "model": model, "annotations": found} | extra

    row = {"source": "flan", "instruction": "q", "correct_answers": ["x"], "models": ["m", "n"]}
    given = [judged("a", "2", "3", "3", "3"), judged("b", "4", "N/A", "5", "3", model="n")]
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"completions": given}])
    (record,), _ = read_groups(path, "lists")
    assert record.scores == (4.0, 2.75)
    assert record.answers == (chat("a:b"), chat("a:a"))
    assert record.meta["aspects"]["honesty"] == [None, 3.0]
    assert record.meta["models"] == ["n", "m"]
    assert (record.meta["set"], record.meta["correct_answers"]) == ("flan", ["x"])
    bad = [{"model": "m"}, *given]
    mixed = write_jsonl(tmp_path / "b.jsonl", [row | {"completions": given}, row | {"completions": bad}])
    _, report = read_groups(mixed, "lists", max_bad_rows=0.5)
    assert report.rejects == {"an answer without a response": (1, (f"{mixed}:2",))}
