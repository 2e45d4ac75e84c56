"""Labels of harm, pairs on two axes, filters, and the whole builder over scripts; published pairs too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign import api
from jaxalign.data.readers import read_groups
from jaxalign.llm.base import Completion, Request
from jaxalign.llm.scripted import ScriptedLLM
from jaxalign.synth.moderation import ASKED, CATEGORIES, parse_categories
from jaxalign.synth.refusals import is_refusal
from jaxalign.synth.safety import Labelled, balanced, pairs_of
from jaxalign.synth.safety_input import Item, read_items
from jaxalign.synth.two_axes import Rulings, parse_choice
from tests.data.toy import shared
from tests.marker_world import answer, asked, noisy, quality

HARM = {"self_harm", "privacy_violation"}


def moderate(request: Request, number: int, rng: np.random.Generator) -> str:
    """Reads `<comply:cat>` in the answer."""
    said = asked(request).split("Answer:\n")[1].split("\n\nReply")[0]
    found = [part.split(">")[0] for part in said.split("<comply:")[1:]]
    return ", ".join(found) or "None."


def _duel(text: str, slot: int) -> str:
    return text.split(f"[Answer {slot}]\n")[1].split(f"\n[End of answer {slot}]")[0]


def compare(request: Request, number: int, rng: np.random.Generator) -> str:
    """Helpful: more <ok>. Harmless: fewer <bug>."""
    text = asked(request)
    if "less harm?" in text:
        scores = [-_duel(text, slot).count("<bug") for slot in (1, 2)]
    else:
        scores = [_duel(text, slot).count("<ok") for slot in (1, 2)]
    return f"[[{0 if scores[0] == scores[1] else 1 + (scores[1] > scores[0])}]]"


def judge_script(request: Request, number: int, rng: np.random.Generator) -> str:
    return (compare if "[Answer 1]" in asked(request) else moderate)(request, number, rng)


def judge(script: Any = judge_script, scorer: Any = None) -> ScriptedLLM:
    return ScriptedLLM(script, scorer, name="judge", identity="judge")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build(folder: Path, rows: list[dict[str, Any]], model: ScriptedLLM, **keys: Any) -> dict[str, Any]:
    data = write(folder / "in.jsonl", rows)
    return api.build(
        "safety", model, data, folder / "out.jsonl", models={"judge": keys.pop("llm_judge", judge())}, **keys
    )


def rows_of(folder: Path, name: str = "") -> list[dict[str, Any]]:
    file = folder / "out.build" / name if name else folder / "out.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


SAFE = {"q": answer(ok=1), "b": answer(ok=3), "c": answer(bug=1)}
NEVER = ScriptedLLM(lambda r, n, rng: pytest.fail("nothing was to be asked of it"))


# ------------------------------------------------------------------------------------------- moderation


def parsed(text: str) -> list[str] | None:
    found, reason = parse_categories((Completion(text),))
    assert bool(reason) == (found is None)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", []),
        (" None. ", []),
        ("self_harm", ["self_harm"]),
        ("violence, animal_abuse", ["animal_abuse", "violence,aiding_and_abetting,incitement"]),
        ("Self-harm, Privacy violation.", ["privacy_violation", "self_harm"]),
        (
            "- theft\n- hate_speech",
            ["financial_crime,property_crime,theft", "hate_speech,offensive_language"],
        ),
        ("terrorism,organized_crime", ["terrorism,organized_crime"]),
        ("self_harm, self harm", ["self_harm"]),
        ("1. weapons\n2. `banned_substance`", ["drug_abuse,weapons,banned_substance"]),
        ("", None),
        ("none, self_harm", None),
        ("self_harm, rudeness", None),
        ("The answer falls under self_harm", None),
        ("I'm sorry, I can't", None),
    ],
)
def test_a_moderator_names_categories_of_a_closed_list(text: str, found: list[str] | None) -> None:
    assert parsed(text) == found


def test_the_categories_are_those_of_beavertails() -> None:
    file = shared("beavertails/BeaverTails-Evaluation.json")
    if file is None:
        pytest.skip("no published data here")
    rows = json.loads(file.read_text())
    named = dict(sorted({(row["category_id"], row["category"]) for row in rows}))
    assert named == dict(enumerate(CATEGORIES))
    assert set(Counter(r["category"] for r in rows).values()) == {50}
    assert len({name for name, _ in ASKED}) == 14
    assert all(
        parsed(name) == parsed(full) == [full] for (name, _), full in zip(ASKED, CATEGORIES, strict=True)
    )


def test_an_unknown_name_is_asked_again(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def script(request: Request, number: int, rng: np.random.Generator) -> str:
        if "[Answer 1]" in asked(request):
            return compare(request, number, rng)
        seen[asked(request)] += 1
        return "rudeness" if seen[asked(request)] < 3 else moderate(request, number, rng)

    rows = [{"prompt": "a question", "response": answer(ok=1)}]
    report = build(tmp_path, rows, NEVER, llm_judge=judge(script), records="labels")
    assert report["stages"]["moderate"]["attempts"] == 3
    assert list(seen.values()) == [3]
    assert [row["label"] for row in rows_of(tmp_path)] == [True]


# ----------------------------------------------------------------------------------------------- rankings


def _pairs(safe: tuple[bool | None, bool | None], said: tuple[int, int], axis: str = "harmless") -> list[Any]:
    item = Item("a", (), ("first", "second"))
    found = Labelled(item, tuple(None if s is None else () if s else ("self_harm",) for s in safe))
    return [(p.better, p.by) for p in pairs_of(found, axis, Rulings({"a:0-1": said}, 0))]


def test_both_orders_must_agree() -> None:
    assert _pairs((True, True), (1, 2)) == [(0, "judge")]
    assert _pairs((True, True), (2, 1)) == [(1, "judge")]
    for said in ((1, 1), (2, 2), (0, 0), (1, 0), (0, 2)):
        assert _pairs((True, True), said) == []


def test_the_safe_answer_is_the_harmless_one_whatever_the_judge_says() -> None:
    for said in ((1, 2), (2, 1), (1, 1), (0, 0)):
        assert _pairs((False, True), said) == [(1, "label")]
        assert _pairs((True, False), said) == [(0, "label")]
    assert _pairs((False, True), (1, 2), "helpful") == [(0, "judge")]  # the other axis is the judge's
    assert _pairs((None, True), (1, 2)) == [(0, "judge")]  # without a label nothing is decided


@pytest.mark.parametrize(
    ("text", "found"),
    [("[[1]]", 1), ("x [[2]].", 2), ("[[0]]", 0), ("[[1]] [[2]]", None), ("1", None), ("[[3]]", None)],
)
def test_a_choice_is_one_tag(text: str, found: int | None) -> None:
    assert parse_choice((Completion(text),))[0] == found


def test_rulings_tell_how_steady_the_judge_is() -> None:
    report = Rulings({"a": (1, 2), "b": (1, 1), "c": (0, 0), "d": (2, 1)}, 1).report()
    assert (report["duels"], report["wins"], report["ties"], report["without_verdict"]) == (5, 2, 2, 1)
    assert (report["consistent"]["passed"], report["consistent"]["n"]) == (3, 4)
    assert (report["first_slot"]["passed"], report["first_slot"]["n"]) == (4, 6)


# -------------------------------------------------------------------------------------------- the builder


ROWS = [
    {  # the unsafe answer is the more helpful one
        "id": "mixed",
        "prompt": "question <harm:self_harm>",
        "response_0": answer(ok=3) + " <comply:self_harm><comply:privacy_violation>",
        "response_1": answer(ok=1),
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    },
    {  # both safe: the judge tells
        "id": "safe",
        "prompt": "question two",
        "response_0": answer(ok=1),
        "response_1": answer(ok=2, bug=1),
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
]


def test_labels_pairs_and_answers_to_imitate(tmp_path: Path) -> None:
    report = build(tmp_path, ROWS, NEVER)
    pairs = rows_of(tmp_path)
    told = {(p["prompt"][0]["content"], p["meta"]["aspect"]): (p["chosen"], p["meta"]["by"]) for p in pairs}
    assert told == {
        ("question <harm:self_harm>", "helpful"): (ROWS[0]["response_0"], "judge"),
        ("question <harm:self_harm>", "harmless"): (ROWS[0]["response_1"], "label"),
        ("question two", "helpful"): (ROWS[1]["response_1"], "judge"),
        ("question two", "harmless"): (ROWS[1]["response_0"], "judge"),
    }
    mixed = next(p for p in pairs if p["meta"]["by"] == "label")
    assert mixed["meta"]["safe"] == {"chosen": True, "rejected": False}
    assert mixed["meta"]["categories"] == {"chosen": [], "rejected": ["privacy_violation", "self_harm"]}
    labels = rows_of(tmp_path, "labels.jsonl")
    assert [row["label"] for row in labels] == [False, True, True, True]
    assert labels[0]["meta"]["categories"] == ["privacy_violation", "self_harm"]
    imitate = [row["messages"][-1]["content"] for row in rows_of(tmp_path, "sft.jsonl")]
    assert imitate == [ROWS[0]["response_1"], ROWS[1]["response_1"]]
    metrics = report["metrics"]
    assert metrics["by_label"] == 1
    assert metrics["agreement"]["passed"] == 0
    assert metrics["agreement"]["n"] == 2
    assert (metrics["safe"]["passed"], metrics["safe"]["n"]) == (3, 4)
    assert (metrics["known"]["passed"], metrics["known"]["n"]) == (3, 4)  # the data calls one of them unsafe
    assert metrics["axes"]["harmless"]["duels"] == 1  # the mixed pair was not asked


def test_training_reads_what_it_writes(tmp_path: Path) -> None:
    build(tmp_path, ROWS, NEVER)
    pairs, _ = read_groups(tmp_path / "out.jsonl", "pairs")
    assert all(pair.aux["safe"].dtype == bool for pair in pairs)
    labels, _ = read_groups(tmp_path / "out.build" / "labels.jsonl", "binary")
    assert [bool(row.aux["label"]) for row in labels] == [False, True, True, True]


def test_answers_are_sampled_where_there_are_none(tmp_path: Path) -> None:
    model = ScriptedLLM(lambda r, n, rng: answer(ok=n))
    report = build(tmp_path, [{"instruction": "a question"}, {"prompt": "another"}], model, n=3)
    assert [r.n for r in model.asked] == [3, 3]
    assert report["n_in"] == 2
    helpful = [p for p in rows_of(tmp_path) if p["meta"]["aspect"] == "helpful"]
    assert len(helpful) == 6
    assert all(quality(p["chosen"]) > quality(p["rejected"]) for p in helpful)
    assert [p for p in rows_of(tmp_path) if p["meta"]["aspect"] == "harmless"] == []  # all tie
    assert [quality(r["messages"][-1]["content"]) for r in rows_of(tmp_path, "sft.jsonl")] == [2, 2]


def test_a_judge_of_slots_makes_no_pair(tmp_path: Path) -> None:
    def first(request: Request, number: int, rng: np.random.Generator) -> str:
        return "[[1]]" if "[Answer 1]" in asked(request) else "none"

    report = build(tmp_path, ROWS, NEVER, llm_judge=judge(first))
    assert rows_of(tmp_path) == []
    axis = report["metrics"]["axes"]["helpful"]
    assert (axis["first_slot"]["rate"], axis["consistent"]["rate"], axis["ties"]) == (1.0, 0.0, 2)


def test_a_noisy_judge_still_leaves_more_right_pairs_than_wrong(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "completions": [answer(ok=1), answer(ok=2)], "scores": [0, 0]} for i in range(60)
    ]
    spoilt = noisy(judge_script, 0.2, lambda text: {"[[1]]": "[[2]]", "[[2]]": "[[1]]"}.get(text, text))
    report = build(tmp_path, rows, NEVER, llm_judge=judge(spoilt))
    right = [quality(p["chosen"]) > quality(p["rejected"]) for p in rows_of(tmp_path)]
    # Both orders are right in 0.64 of the pairs, wrong in 0.04, and apart in 0.32: 38, 2 and 19 of 60.
    assert 30 <= sum(right) <= 47
    assert len(right) - sum(right) <= 7
    assert report["metrics"]["axes"]["helpful"]["ties"] == 60 - len(right)


# ------------------------------------------------------------------------------------------------ filters


def test_pairs_whose_rejected_answer_declines_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completions": [answer(ok=1), "I cannot help with that."], "scores": [1, 0]}]
    report = build(tmp_path, rows, NEVER)
    assert rows_of(tmp_path) == []
    assert report["dropped"] == {"the rejected answer declines": 1}
    kept = tmp_path / "kept"
    kept.mkdir()
    assert build(kept, rows, NEVER, drop_refusals=False)["n_out"] == 1


def test_a_margin_of_safety(tmp_path: Path) -> None:
    """P(safe) by the judge's log-probabilities: of the harmless pairs, those with the margin stay."""
    p_safe = {"first": 0.9, "second": 0.3, "third": 0.2}

    def scorer(prompt: Any, option: str) -> float:
        said = "\n".join(m.content for m in prompt).split("Answer:\n")[1].split(" ")[0]
        return float(np.log(p_safe[said] if option == "safe" else 1 - p_safe[said]))

    texts = [answer(words="first"), answer(bug=1, words="second"), answer(bug=2, words="third")]
    rows = [{"prompt": "q", "completions": texts, "scores": [0, 0, 0]}]
    report = build(tmp_path, rows, NEVER, llm_judge=judge(scorer=scorer), safe_margin=0.5)
    ends = {(p["chosen"].split()[0], p["rejected"].split()[0]) for p in rows_of(tmp_path)}
    assert ends == {("first", "second"), ("first", "third")}  # 0.6 and 0.7; second and third are 0.1 apart
    assert sum(report["dropped"].values()) == 1


def test_classes_are_balanced(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"q{i}",
            "completions": [answer(ok=1), answer()],
            "scores": [0, 0],
            "category": "a" if i < 6 else "b",
        }
        for i in range(8)
    ]
    report = build(tmp_path, rows, NEVER, per_class=2)
    assert Counter(p["meta"]["class"] for p in rows_of(tmp_path)) == {"a": 2, "b": 2}
    assert report["dropped"] == {"enough pairs of the class": 4}


def test_balance_is_a_function_of_the_seed() -> None:
    found = Labelled(Item("x", (), ("1", "2", "3", "4")), ((), (), (), ()))
    said = {f"x:{i}-{j}": (1, 2) for i in range(4) for j in range(i + 1, 4)}
    pairs = pairs_of(found, "helpful", Rulings(said, 0))
    assert len(pairs) == 6
    assert balanced(pairs, 3, 1) == balanced(pairs[::-1], 3, 1)[::-1]
    assert len({tuple(p.id for p in balanced(pairs, 3, seed)) for seed in range(8)}) > 1


def test_answers_that_decline() -> None:
    for text in (
        "I'm sorry, but no.",
        "I can\u2019t do this",
        "As an AI model, I am not able to",
        "抱歉，我无法回答",
        "<refuse>",
    ):
        assert is_refusal(text), text
    for text in ("Sure, here it is.", "You can say sorry to her.", "这是一个好问题。", "A can of beans", ""):
        assert not is_refusal(text), text


# ------------------------------------------------------------------------------------------ published data


def test_items_of_published_pairs() -> None:
    file = shared("pku-preference/train.json")
    if file is None:
        pytest.skip("no published data here")
    rows = json.loads(file.read_text())
    items, _ = read_items(file)
    by_prompt = {item.question: item for item in items}
    assert len(items) == len({row["prompt"] for row in rows})
    assert sum(len(i.answers) for i in items) == 64
    assert sum(sum(item.known.values()) for item in items) == 27  # specification [10](f)
    for row in rows:
        item = by_prompt[row["prompt"]]
        told = {row[f"response_{k}"]: row[f"is_response_{k}_safe"] for k in (0, 1)}
        assert {a: item.known[i] for i, a in enumerate(item.answers) if a in told} == told


def test_the_rule_agrees_with_people_on_mixed_pairs() -> None:
    """Specification [10](f): in all five mixed rows the safer answer is the safe one."""
    file = shared("pku-preference/train.json")
    if file is None:
        pytest.skip("no published data here")
    rows = json.loads(file.read_text())
    mixed = [row for row in rows if row["is_response_0_safe"] != row["is_response_1_safe"]]
    assert len(mixed) == 5
    for row in mixed:
        safe = (row["is_response_0_safe"], row["is_response_1_safe"])
        assert _pairs(safe, (0, 0)) == [(row["safer_response_id"], "label")]
