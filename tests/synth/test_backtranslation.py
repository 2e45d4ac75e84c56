"""Texts become answers: what is graded, what is selected, and what each model has learned.

A corpus whose instructions are known, after specs of instruction backtranslation: the backward model is right
in 60 %; M_0 gives 5 to a right pair with p = .5 and to a wrong one with .05, M_1 with .9 and .02; a tenth of
all replies has no grade.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from jaxalign.data.readers import read_records
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion
from jaxalign.llm.scripted import ScriptedLLM
from jaxalign.registry import BUILDERS
from jaxalign.synth import backtranslation
from jaxalign.synth.backtranslation import BacktranslationConfig, instruction
from jaxalign.synth.base import Builder
from jaxalign.synth.curation import grade, near_duplicates, scaling, selection_quality, text_fault
from jaxalign.synth.self_instruct import phrases
from jaxalign.synth.training import RECIPE, train_sft, training_keys
from tests.marker_world import asked, format_breaking
from tests.synth.bench import read_rows, run, write_rows

DOCS, RIGHT, MALFORMED = 400, 0.6, 0.1
CHANCES = [(0.5, 0.05), (0.9, 0.02)]  # of a 5, for (right, wrong) pairs, by M_0 and M_1
SEED_TAG, TEXT_TAG = "Answer in the style of an AI Assistant.", "Answer with knowledge from web search."


def doc(i: int) -> str:
    return f"Guide {i}. " + " ".join(f"Fact {i}-{k} is {i * k % 97}." for k in range(60))


def wanted(text: str) -> str:
    number = re.findall(r"Guide (\d+)", text)[-1]
    return f"Write the guide number {number}."


def backward(request, number, rng):
    return wanted(asked(request)) if rng.random() < RIGHT else "Say something about nothing."


def is_right(text: str) -> bool:
    """Whether the instruction in a request to grade, or in a row, is the text's own."""
    return wanted(text) in text


def judge(chances: tuple[float, float]):
    def graded(request, number, rng):
        p = chances[0] if is_right(asked(request)) else chances[1]
        return f"Because.\nScore: {5 if rng.random() < p else rng.integers(1, 5)}"

    return format_breaking(graded, MALFORMED)


@dataclass
class Trainer:
    """Hands out M_0, M_1, ..., and remembers what each learned."""

    lessons: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    models: list[ScriptedLLM] = field(default_factory=list)

    def __call__(self, base, rows, folder, keys, answering):
        self.lessons.append((folder.name, base, list(rows)))
        number = 0 if folder.name == "backward" else int(folder.name[1:])
        script = backward if folder.name == "backward" else judge(CHANCES[number])
        self.models.append(ScriptedLLM(script, name=folder.name, identity=folder.name))
        return self.models[-1]


@pytest.fixture
def trainer(monkeypatch):
    found = Trainer()
    monkeypatch.setattr(
        backtranslation,
        "BUILDER",
        Builder(BacktranslationConfig, partial(backtranslation.run, trainer=found), roles=("backward",)),
    )
    return found


def sources(tmp_path, docs: int = DOCS) -> tuple[Any, str]:
    texts = [{"id": f"d{i}", "text": doc(i)} for i in range(docs)]
    seeds = [
        {"id": f"s{i}", "instruction": f"Ask {i}?", "output": f"The answer is {i}, of course."}
        for i in range(20)
    ]
    return write_rows(tmp_path / "texts.jsonl", texts), str(write_rows(tmp_path / "seed.jsonl", seeds))


def unused(request, number, rng):
    raise AssertionError("the base itself is asked nothing")


def within(found: float, expected: float, sigma: float) -> bool:
    return abs(found - expected) <= 3 * sigma


def expectations(chances: tuple[float, float]) -> tuple[float, float, float]:
    """(pairs selected, their standard deviation, precision)."""
    good = RIGHT * chances[0]
    p = (good + (1 - RIGHT) * chances[1]) * (1 - MALFORMED)
    return DOCS * p, math.sqrt(DOCS * p * (1 - p)), good * (1 - MALFORMED) / p


def test_the_expectations_are_those_of_the_specification():
    first, second = map(expectations, CHANCES)
    assert first[0] == pytest.approx(115.2)
    assert first[2] == pytest.approx(0.9375)
    assert second[0] == pytest.approx(197.28)
    assert second[2] == pytest.approx(0.985, abs=5e-4)


def test_two_rounds_select_as_many_as_they_should_and_ever_better(tmp_path, trainer):
    texts, seed = sources(tmp_path)
    keys = {"seed_data": seed, "train": True, "retries": 0, "min_chars": 100, "base": "the-base"}
    rows, report, _ = run(tmp_path, "backtranslation", texts, unused, **keys)
    candidates = read_rows(tmp_path / "out.build" / "candidates.jsonl")
    assert len(candidates) == DOCS
    precisions = []
    for number, chances in enumerate(CHANCES):
        chosen = [c for c in candidates if c["meta"]["scores"][number] == 5]
        count, sigma, precision = expectations(chances)
        hits = sum(is_right(str(c["messages"])) for c in chosen)
        assert within(len(chosen), count, sigma)
        assert within(hits / len(chosen), precision, math.sqrt(precision * (1 - precision) / len(chosen)))
        assert report["metrics"]["rounds"][number]["selected"] == len(chosen)
        precisions.append(hits / len(chosen))
        bad = report["stages"][f"grade-{number + 1}"]["parse_failure_rate"]
        assert within(bad, MALFORMED, math.sqrt(MALFORMED * (1 - MALFORMED) / DOCS))
    assert precisions[1] > precisions[0]
    last = {c["id"] for c in candidates if c["meta"]["scores"][1] == 5}
    seeds, kept = rows[:20], rows[20:]
    assert [r["messages"][0]["content"] for r in seeds] == [SEED_TAG] * 20
    assert [r["id"] for r in seeds] == [f"seed-s{i}" for i in range(20)]
    assert {r["id"] for r in kept} == last
    assert {r["messages"][0]["content"] for r in kept} == {TEXT_TAG}
    both = {c["id"] for c in candidates if c["meta"]["scores"] == [5, 5]}
    assert report["metrics"]["overlaps"] == [
        {
            "both": len(both),
            "jaccard": len(both) / len({c["id"] for c in candidates if 5 in c["meta"]["scores"]}),
        }
    ]


def test_every_model_begins_with_the_same_base(tmp_path, trainer):
    texts, seed = sources(tmp_path, docs=60)
    keys = {"seed_data": seed, "train": True, "min_chars": 100, "base": "the-base"}
    run(tmp_path, "backtranslation", texts, unused, **keys)
    candidates = read_rows(tmp_path / "out.build" / "candidates.jsonl")
    first = {c["id"] for c in candidates if c["meta"]["scores"][0] == 5}
    assert [(name, base) for name, base, _ in trainer.lessons] == [
        (name, "the-base") for name in ("backward", "m0", "m1")
    ]
    turned, m0, m1 = (lesson for _, _, lesson in trainer.lessons)
    said = [[m["content"] for m in row["messages"]] for row in turned]
    assert said == [[f"The answer is {i}, of course.", f"Ask {i}?"] for i in range(20)]
    assert {row["meta"]["source"] for row in m0} == {"seed"}
    assert {row["id"] for row in m1 if row["meta"]["source"] == "text"} == first
    assert m1[:20] == m0
    writer, judge_0, judge_1 = trainer.models
    assert [m.content for m in writer.asked[0].prompt] == [doc(0)]  # it was trained: no template
    assert (writer.asked[0].temperature, writer.asked[0].top_p) == (0.7, 0.9)
    for model in (judge_0, judge_1):
        assert model.asked[0].prompt[0].content == f"{SEED_TAG} {TEXT_TAG}"


def test_without_training_the_model_grades_once(tmp_path):
    texts, seed = sources(tmp_path, docs=60)
    writer = ScriptedLLM(backward)
    keys = {"seed_data": seed, "min_chars": 100, "models": {"backward": writer}}
    rows, report, llm = run(tmp_path, "backtranslation", texts, judge(CHANCES[1]), **keys)
    assert len(report["metrics"]["rounds"]) == 1
    assert all(doc(i) in asked(writer.asked[i]) for i in range(60))
    assert asked(writer.asked[0]) != doc(0)  # by the template
    assert all(r.prompt[0].role == "user" for r in llm.asked)
    assert len(rows) == 20 + report["metrics"]["rounds"][0]["selected"]
    assert report["metrics"]["rounds"][0]["not_graded"] == 0  # what could not be read was asked again


def test_pairs_of_an_earlier_build_are_graded_again(tmp_path):
    texts, seed = sources(tmp_path, docs=60)
    keys: dict[str, Any] = {"seed_data": seed, "min_chars": 100}
    run(tmp_path, "backtranslation", texts, judge((1, 1)), models={"backward": ScriptedLLM(backward)}, **keys)
    pairs = tmp_path / "out.build" / "candidates.jsonl"
    (tmp_path / "again").mkdir()
    rows, report, _ = run(tmp_path / "again", "backtranslation", pairs, judge((1, 0)), pairs=True, **keys)
    before = {row["id"]: row["messages"] for row in read_rows(pairs)}
    right = [name for name, turns in before.items() if is_right(str(turns))]
    assert [row["id"] for row in rows[20:]] == right
    assert all(row["messages"] == before[row["id"]] for row in rows[20:])
    assert "backward" not in report["stages"]


def test_a_dev_set_says_how_well_a_model_grades(tmp_path):
    texts, seed = sources(tmp_path, docs=10)
    dev = [
        {
            "id": f"v{i}",
            "prompt": [{"role": "user", "content": wanted(doc(i)) if i % 3 else "Say nothing."}],
            "completion": doc(i),
            "label": i % 5 == 0,
        }
        for i in range(60)
    ]
    keys = {"seed_data": seed, "min_chars": 100, "dev_data": str(write_rows(tmp_path / "dev.jsonl", dev))}
    models = {"backward": ScriptedLLM(backward)}
    _, report, _ = run(tmp_path, "backtranslation", texts, judge((1, 0)), models=models, **keys)
    found = report["metrics"]["rounds"][0]
    chosen = [i for i in range(60) if i % 3]
    hits = sum(i % 5 == 0 for i in chosen)
    assert (found["precision"]["passed"], found["precision"]["n"]) == (hits, len(chosen))
    assert (found["recall"]["passed"], found["recall"]["n"]) == (hits, 12)


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Good.\nScore: 5", 5),
        ("Good.\nscore: 1  \n\n", 1),
        ("Good. Score: 4", 4),
        ("Score: 5\nBut then again", None),
        ("Good.\nScore: 0", None),
        ("Good.\nScore: 8", None),
        ("Good.\nScore: 728", None),
        ("Good.\nScore: 4.5", None),
        ("Good.\nScore: 5/5", None),
        ("Good.\nScore: 15", None),
        ("Good.\nUnderscore: 5", None),
        ("Good.\n5", None),
        ("", None),
    ],
)
def test_a_grade_is_read_from_the_last_line_alone(text, found):
    value, reason = grade((Completion(text),))
    assert value == found
    assert bool(reason) is (found is None)


def test_a_grade_out_of_range_is_told_from_none():
    assert grade((Completion("Score: 728"),))[1] == "a score that is not 1 to 5"
    assert grade((Completion("no"),))[1] == "the last line has no score"


@pytest.mark.parametrize(
    ("text", "header", "reason"),
    [
        ("Fine text of some words.", "", ""),
        ("  ", "", "empty text"),
        ("LOUD TEXT OF SOME WORDS.", "", "all in capitals"),
        ("Fine text of some words.", "BUY NOW", "all in capitals"),
        ("Contact us:\nFine text of some words.", "", "navigation"),
        ("Fine text of some words.", "Site map", "navigation"),
        ("Short.", "", "text too short"),
        ("long " * 20, "", "text too long"),
    ],
)
def test_texts_that_do_not_do_as_answers(text, header, reason):
    assert text_fault(text, header, 10, 60, phrases("contact us\nsite map")) == reason


def test_near_duplicates_have_most_of_their_5_grams_in_common():
    first = [f"w{i}" for i in range(24)]  # 20 5-grams
    half = [*first[:14], *(f"v{i}" for i in range(10))]  # 10 of them: Jaccard 1/3
    nearly = [*first, "more", "words"]  # 20 of 22
    texts = [" ".join(t) for t in (first, half, nearly)] + ["one", "one", "two"]
    assert near_duplicates(texts, 0.7) == {2, 4}
    assert near_duplicates(texts, 0.3) == {1, 2, 4}


def test_precision_and_recall_count_what_has_no_grade_as_not_selected():
    labels = {"a": True, "b": True, "c": False, "d": True}
    found = selection_quality({"a": 5, "b": 4, "c": 5}, labels, 4.5)
    assert (found["precision"]["passed"], found["precision"]["n"]) == (1, 2)
    assert (found["recall"]["passed"], found["recall"]["n"]) == (1, 3)


def test_scaling_recovers_what_was_planted():
    """alpha = 6.95, as the paper fits it for selected pairs."""
    sizes = [100, 400, 1600, 6400, 25600]
    alpha, constant = scaling(sizes, [6.95 * math.log(n) + 12.5 for n in sizes])
    assert alpha == pytest.approx(6.95)
    assert constant == pytest.approx(12.5)


def test_an_instruction_that_does_not_end_is_none():
    assert instruction((Completion("Say it", "length"),))[0] is None
    assert instruction((Completion(" Request: Say it. "),)) == ("Say it.", "")


def test_keys_of_training_are_the_papers_unless_given():
    found = training_keys(3300, {})
    assert (found.batch_size, found.max_steps) == RECIPE[3200]
    assert training_keys(90, {"max_steps": 7}).max_steps == 7
    with pytest.raises(UserError, match="max_step"):
        training_keys(90, {"max_step": 7})


def test_a_mistake_in_the_training_keys_is_found_before_any_work(tmp_path, trainer):
    texts, seed = sources(tmp_path, docs=10)
    keys = {"seed_data": seed, "train": True, "min_chars": 100, "training": {"epoch": 1}}
    with pytest.raises(UserError, match="epoch"):
        run(tmp_path, "backtranslation", texts, unused, **keys)
    assert trainer.lessons == []


def test_an_endpoint_cannot_be_trained(tmp_path, trainer):
    texts, seed = sources(tmp_path, docs=10)
    keys = {"seed_data": seed, "train": True, "min_chars": 100, "base": "https://host/v1#model"}
    with pytest.raises(UserError, match="an endpoint cannot be trained"):
        run(tmp_path, "backtranslation", texts, unused, **keys)


def test_the_registry_trains_for_real():
    assert BUILDERS["backtranslation"].run.keywords == {"trainer": train_sft}


@pytest.mark.slow
def test_the_real_trainer_starts_from_the_base_each_time(tmp_path, monkeypatch):
    """One lesson gives one model whatever was trained in between, and the base stays what it was."""
    from tests.train.tiny import write_model

    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    base = write_model(tmp_path / "base")
    _, seed = sources(tmp_path, docs=1)
    records, _ = read_records(seed)
    rows = [backtranslation._seed_row(BacktranslationConfig(seed_data=seed), r) for r in records]
    keys = {"max_steps": 2, "batch_size": 8, "max_length": 96, "dtype": "f32", "learning_rate": 1e-2}
    answering = BacktranslationConfig(seed_data=seed, llm={"dtype": "f32"}).llm  # type: ignore[arg-type]
    train = lambda name, lesson: train_sft(str(base), lesson, tmp_path / name, keys, answering)  # noqa: E731
    first, second, again = train("m0", rows), train("m1", rows[:9]), train("m2", rows)
    ids = [model.identity.split("+") for model in (first, second, again)]
    assert ids[0][0] == ids[1][0] == ids[2][0]
    assert ids[0][1] != ids[1][1]
    assert ids[0][1] == ids[2][1]
    assert read_rows(tmp_path / "m1.jsonl") == json.loads(json.dumps(rows[:9]))
