from collections import Counter

import pytest

from jaxalign.data.convert import best_to_sft, pair_to_binary, scored_to_binary, scored_to_pairs
from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.preferences import PreferenceRecord, pair_record, scored_record
from jaxalign.data.readers import kind_of, read_groups, read_records
from jaxalign.data.records import RowError
from jaxalign.errors import UserError
from tests.data.test_readers import write_jsonl
from tests.data.toy import chat

QUESTION, HI, NO = chat("u:hello"), chat("a:hi"), chat("a:no")


def turn(role, content):
    return {"role": role, "content": content}


ASKED, GOOD, BAD_TURN = turn("user", "hello"), turn("assistant", "hi"), turn("assistant", "no")
TURNS = (QUESTION, HI, NO)

# name -> (row, (prompt, chosen, rejected), margin)
PAIRS = {
    "messages": ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD_TURN]}, TURNS, None),
    "canonical": (
        {"prompt": [ASKED], "chosen": "hi", "rejected": "no", "meta": {"margin": 0.5, "aspect": "a"}},
        TURNS,
        0.5,
    ),
    "text": ({"prompt": "hello", "chosen": " hi", "rejected": " no"}, ("hello", " hi", " no"), None),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "hello"}],
            "chosen": {"from": "gpt", "value": "hi"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        TURNS,
        None,
    ),
    "system column": (
        {"system": "Be brief", "prompt": [ASKED], "chosen": "hi", "rejected": "no", "margin": "2"},
        (chat("s:Be brief", "u:hello"), HI, NO),
        2.0,
    ),
    "implicit": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD_TURN]}, TURNS, None),
    "prompt repeated, with scores": (
        {
            "prompt": "hello",
            "chosen": [ASKED, GOOD],
            "rejected": [ASKED, BAD_TURN],
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        },
        TURNS,
        1.5,
    ),
    "transcript": (
        {
            "chosen": "\n\nHuman: hello\n\nAssistant: hi",
            "rejected": "\n\nHuman: hello\n\nAssistant: no",
        },
        TURNS,
        None,
    ),
    "instruction": ({"instruction": "hello", "input": "", "chosen": "hi", "rejected": "no"}, TURNS, None),
    "empty system turn": (
        {"prompt": [turn("system", ""), ASKED], "chosen": "hi", "rejected": "no"},
        TURNS,
        None,
    ),
    "ranking": (
        {"instruction": "hello", "input": "nan", "output1": "no", "output2": "hi", "ranking": "(b)"},
        TURNS,
        None,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_form_of_a_pair(name, tmp_path):
    row, expected, margin = PAIRS[name]
    (record,), report = read_groups(write_jsonl(tmp_path / "a.jsonl", [row]), "pairs")
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, *record.answers) == expected
    assert record.margin == margin
    assert (report.rows, report.records, report.rejects) == (1, 1, {})


def pair_of(**changes):
    return {"prompt": [ASKED], "chosen": "hi", "rejected": "no"} | changes


# (reason, row)
BAD = [
    ("chosen and rejected are equal", pair_of(rejected=" hi\n")),
    ("empty answer: chosen", pair_of(chosen=" ")),
    ("empty answer: rejected", pair_of(rejected="")),
    ("empty answer: rejected", {"prompt": "hello", "chosen": "hi", "rejected": "\n"}),
    ("negative margin: the rejected answer has the higher score", pair_of(margin=-0.5)),
    ("negative margin: the rejected answer has the higher score", pair_of(score_chosen=1, score_rejected=2)),
    ("the margin is not a number: 'wide'", pair_of(margin="wide")),
    ("the margin is not a number: nan", pair_of(margin=float("nan"))),
    ("the margin is not a number: True", pair_of(margin=True)),
    (
        "chosen and rejected have different prompts",
        {"chosen": [ASKED, GOOD], "rejected": [turn("user", "hullo"), BAD_TURN]},
    ),
    (
        "turn order: assistant after assistant (rejected)",
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, BAD_TURN]},
    ),
    ("turn order: user after user (chosen)", pair_of(prompt=[ASKED, ASKED])),
    ("rejected ends with the user's turn", pair_of(rejected=[BAD_TURN, ASKED])),
    ("no user turn (chosen)", {"chosen": [GOOD], "rejected": [BAD_TURN], "messages": [GOOD]}),
    ("turn order: assistant first (chosen)", pair_of(prompt=[GOOD, ASKED])),
    ("no prompt", {"chosen": [GOOD], "rejected": [BAD_TURN]}),
    (
        "chosen has no prompt and is not a Human/Assistant transcript",
        {"chosen": "hi", "rejected": "no"},
    ),
    ("unknown columns (text)", {"text": "a"}),
    ("an answer with a label does not make pairs", {"prompt": "a", "completion": "b", "label": True}),
    ("the row is not an object", [1]),
]


@pytest.mark.parametrize(("reason", "row"), BAD)
def test_every_bad_pair_is_counted_by_name(reason, row, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair_of(), row, pair_of(chosen="hey")])
    records, report = read_groups(path, "pairs", max_bad_rows=0.5)
    assert len(records) == 2
    assert report.rejects == {reason: (1, (f"{path}:2",))}


def test_too_many_bad_pairs_stop_and_name_the_known_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair_of(), pair_of(margin=-1)])
    with pytest.raises(
        UserError, match=r"1 of 2 rows cannot be used.*\n.*negative margin.*\n.*mend these rows"
    ):
        read_groups(path, "pairs")
    strange = write_jsonl(tmp_path / "b.jsonl", [pair_of(), {"question": "?"}])
    with pytest.raises(
        UserError, match=r"1 of 2 rows.*\n.*unknown columns \(question\).*\n.*ultrafeedback"
    ) as caught:
        read_groups(strange, "pairs")
    assert "mend these rows" not in str(caught.value)
    with pytest.raises(UserError, match=r"unknown kind of rows 'pair'; did you mean 'pairs'"):
        read_groups(path, "pair")
    with pytest.raises(UserError, match=r"unknown pairs 'ajacent'; did you mean 'adjacent'"):
        read_groups(path, "pairs", options=GroupOptions(pairs="ajacent"))


def test_pairs_that_contradict_each_other_are_reported(tmp_path):
    rows = [pair_of(), pair_of(chosen="no", rejected="hi"), pair_of(chosen="hey")]
    _, report = read_groups(write_jsonl(tmp_path / "a.jsonl", rows), "pairs")
    assert report.contradictions == 1
    assert any("both ways round" in line for line in report.lines())


BINARY = {
    "messages": ({"messages": [ASKED, GOOD], "label": True}, (QUESTION, HI, True)),
    "conversations": (
        {
            "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "no"}],
            "kto_tag": False,
        },
        (QUESTION, NO, False),
    ),
    "prompt and completion": (
        {"prompt": [ASKED], "completion": [GOOD], "label": True},
        (QUESTION, HI, True),
    ),
    "text": ({"prompt": "hello", "completion": " no", "label": "False"}, ("hello", " no", False)),
    "safety": ({"prompt": "hello", "response": "hi", "is_safe": True}, ("hello", "hi", True)),
}


@pytest.mark.parametrize("name", BINARY)
def test_every_form_of_a_labelled_row(name, tmp_path):
    row, expected = BINARY[name]
    (record,), _ = read_groups(write_jsonl(tmp_path / "a.jsonl", [row]), "binary")
    assert (record.prompt, record.answers[0], record.aux["label"]) == expected


@pytest.mark.parametrize("label", ["yes", 1, 0.5, None, [True]])
def test_a_label_is_true_or_false(label, tmp_path):
    good = {"messages": [ASKED, GOOD], "label": True}
    path = write_jsonl(tmp_path / "a.jsonl", [good, good | {"label": label}])
    records, report = read_groups(path, "binary", max_bad_rows=0.5)
    assert len(records) == 1
    assert list(report.rejects) == [f"the label is neither true nor false: {label!r}"]


SCORED = {
    "completions": {"prompt": [ASKED], "completions": ["no", "hi"], "scores": [1, 3.5]},
    "responses": {"messages": [ASKED], "responses": [[BAD_TURN], [GOOD]], "scores": ["1", "3.5"]},
    "a score is missing": {
        "prompt": [ASKED],
        "completions": ["no", "hi", "so"],
        "scores": [1, 3.5, None],
    },
    "ultrafeedback": {
        "instruction": "hello",
        "completions": [
            {"response": "no", "annotations": {}, "overall_score": 1.0},
            {
                "response": "hi",
                "annotations": {
                    "helpfulness": {"Rating": "4", "Type": ["x"]},
                    "honesty": {"Rating": "N/A"},
                    "truthfulness": {"Rating": "3"},
                },
                "overall_score": 9.0,
            },
        ],
    },
}


@pytest.mark.parametrize("name", SCORED)
def test_every_form_of_a_list(name, tmp_path):
    (record,), _ = read_groups(write_jsonl(tmp_path / "a.jsonl", [SCORED[name]]), "lists")
    assert record.prompt == QUESTION
    assert record.answers == (HI, NO)  # the best first
    assert record.aux["scores"].tolist() == [3.5, 1.0]
    assert record.aux["scores"].dtype.name == "float32"


def test_ultrafeedback_rows_keep_their_aspects(tmp_path):
    (record,), _ = read_groups(write_jsonl(tmp_path / "a.jsonl", [SCORED["ultrafeedback"]]), "lists")
    assert record.answers == (HI, NO)  # the best first, and its ratings with it
    assert record.meta["aspects"] == {"helpfulness": [4.0, None], "truthfulness": [3.0, None]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": [1]}, "not one score for every answer"),
        ({"scores": None}, "not one score for every answer"),
        ({"scores": [1, None]}, "fewer than two answers with a score"),
        ({"scores": [1, "best"]}, "a score is not a number: 'best'"),
        ({"completions": []}, "no answers"),
        ({"completions": ["hi", " "]}, "empty answer: answer 2"),
    ],
)
def test_bad_lists(changes, reason, tmp_path):
    good = SCORED["completions"]
    path = write_jsonl(tmp_path / "a.jsonl", [good, good | changes])
    _, report = read_groups(path, "lists", max_bad_rows=0.5)
    assert list(report.rejects) == [reason]


def test_a_pair_has_no_scores_for_a_list(tmp_path):
    with pytest.raises(UserError, match="a pair does not make lists"):
        read_groups(write_jsonl(tmp_path / "a.jsonl", [pair_of()]), "lists")


def ranked(*scores, name="q"):
    answers = [chat(f"a:answer {i}") for i in range(len(scores))]
    return scored_record(QUESTION, answers, list(scores), meta={"id": name})


def places(record, policy, **options):
    return [
        tuple(map(int, r.id.split(":")[1].split(">"))) for r in scored_to_pairs(record, policy, **options)
    ]


def test_policies_of_pairs():
    record = ranked(7, 9, 9, 3)
    assert places(record, "all_pairs") == [(1, 0), (1, 3), (2, 0), (2, 3), (0, 3)]
    assert places(record, "adjacent") == [(2, 0), (0, 3)]
    assert places(record, "best_vs_worst") == [(1, 3)]
    assert places(record, "best_vs_rest") == [(1, 3), (1, 0)]
    assert places(ranked(1, 4, 2, 3), "best_vs_rest") == [(1, 0), (1, 2), (1, 3)]
    assert [pair.margin for pair in scored_to_pairs(ranked(1, 4, 2, 3), "best_vs_rest")] == [3, 2, 1]
    assert places(record, "all_pairs", best=3) == [(1, 0), (2, 0)]
    for policy in ("all_pairs", "adjacent", "best_vs_worst", "best_vs_rest", "best_vs_random_lower"):
        assert scored_to_pairs(ranked(5, 5), policy) == []
    with pytest.raises(RowError, match="fewer than two answers with a score"):
        scored_to_pairs(ranked(5, None), "adjacent")


def test_margins_are_score_gaps_and_ids_name_the_parent():
    (pair,) = scored_to_pairs(ranked(1, 4.5), "adjacent")
    assert isinstance(pair, PreferenceRecord)
    assert (pair.margin, pair.parent, pair.method, pair.id) == (3.5, "q", "adjacent", "q:1>0")
    assert (pair.chosen, pair.rejected) == (chat("a:answer 1"), chat("a:answer 0"))
    assert pair.family == ranked(1, 4.5).family


@pytest.mark.parametrize(
    ("policy", "admissible"),
    [("best_vs_random_lower", {0, 3}), ("best_vs_random_other", {0, 2, 3})],
)
def test_random_rejected_answers_are_uniform_and_seeded(policy, admissible):
    """A generator seeded alike for every row would always draw the same place."""
    rows, counts = 3000, Counter()
    for i in range(rows):
        ((chosen, rejected),) = places(ranked(7, 9, 9, 3, name=f"row {i}"), policy)
        assert chosen == 1
        counts[rejected] += 1
    assert set(counts) == admissible
    share = 1 / len(admissible)
    sigma = (rows * share * (1 - share)) ** 0.5
    assert all(abs(count - rows * share) < 3.5 * sigma for count in counts.values())
    draws = [
        [places(ranked(7, 9, 9, 3, name=f"row {i}"), policy, seed=s) for i in range(50)] for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_equal_answers_in_a_list_are_counted(tmp_path):
    row = {"prompt": [ASKED], "completions": ["hi", "hi ", "no"], "scores": [3, 2, 1]}
    records, report = read_groups(write_jsonl(tmp_path / "a.jsonl", [row]), "pairs", max_bad_rows=0.5)
    assert len(records) == 2
    assert {reason: count for reason, (count, _) in report.rejects.items()} == {
        "chosen and rejected are equal": 1
    }


def test_pairs_and_lists_become_labels(tmp_path):
    pair = pair_record(QUESTION, HI, NO, meta={"id": "p"})
    found = [(r.id, r.completion, r.label, r.parent) for r in pair_to_binary(pair)]
    assert found == [("p:chosen", HI, True, "p"), ("p:rejected", NO, False, "p")]
    assert [r.label for r in scored_to_binary(ranked(1, 3, None, 2), 2.0)] == [False, True, True]
    path = write_jsonl(tmp_path / "a.jsonl", [SCORED["completions"]])
    with pytest.raises(UserError, match=r"scores become labels only with a threshold \(threshold="):
        read_groups(path, "binary")
    records, _ = read_groups(path, "binary", options=GroupOptions(threshold=2))
    assert [bool(r.aux["label"]) for r in records] == [False, True]


def test_the_best_answer_becomes_a_row_to_imitate():
    made = best_to_sft(ranked(1, 5, 3))
    assert made.messages == QUESTION + chat("a:answer 1")
    assert (made.prompt_turns, made.id, made.parent) == (1, "q", "q")
    plain = best_to_sft(pair_record("hello", " hi", " no"))
    assert (plain.prompt, plain.completion) == ("hello", " hi")


def test_fine_tuning_reads_the_best_of_a_list_and_leaves_unwanted_answers_out(tmp_path):
    rows = [SCORED[name] for name in SCORED] + [BINARY[name][0] for name in BINARY]
    records, report = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [r.messages for r in records[:4]] == [QUESTION + HI] * 4
    assert len(records) == 4 + sum(label for *_, label in (expected for _, expected in BINARY.values()))
    assert sorted(report.skipped) == [
        "kto_tag is false: an unwanted answer is not learned",
        "label is false: an unwanted answer is not learned",
    ]


def test_select_keeps_rows_by_their_meta(tmp_path):
    rows = [pair_of(meta={"aspect": "a"}), pair_of(chosen="hey", meta={"aspect": "b"}), pair_of(chosen="ho")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    records, report = read_groups(path, "pairs", options=GroupOptions(select={"aspect": "b"}))
    assert [r.answers[0] for r in records] == [chat("a:hey")]
    assert set(report.skipped) == {"aspect is a, not b", "aspect is None, not b"}


def test_family_is_the_prompt(tmp_path):
    rows = [pair_of(), pair_of(chosen="hey"), pair_of(prompt=[turn("user", "other")])]
    records, _ = read_groups(write_jsonl(tmp_path / "a.jsonl", rows), "pairs")
    assert records[0].family == records[1].family != records[2].family
    assert len({r.id for r in records}) == 3


def test_kind_of_a_file(tmp_path):
    kinds = {
        "pairs": pair_of(),
        "binary": BINARY["messages"][0],
        "lists": SCORED["completions"],
        "sft": {"text": "a"},
    }
    for kind, row in kinds.items():
        assert kind_of(write_jsonl(tmp_path / f"{kind}.jsonl", [row])) == kind
    bad_first = write_jsonl(tmp_path / "a.jsonl", [pair_of(chosen=""), pair_of()])
    assert kind_of(bad_first) == "pairs"
