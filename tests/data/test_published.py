"""Readers of published sets: exact counts on their files, as the sets' own papers and code have them."""

from collections import Counter

import pytest

from jaxalign.data.readers import read_groups, read_prompts, read_records
from jaxalign.data.records import RowError
from jaxalign.data.sources import beavertails, seed_safety
from tests.data.toy import shared


def published(name):
    path = shared(name)
    if path is None:
        pytest.skip(f"{name} is not beside the checkout")
    return path


def reasons(counted):
    return {reason: n for reason, (n, _) in counted.items()}


# (file or folder, rows, prompts, prompts of different text, {reason: count} of the rejected)
PROMPTS = [
    ("beavertails", 700, 700, 700, {}),
    ("flames", 1000, 1000, 1000, {}),
    ("fft/Factuality", 990, 990, None, {}),
    ("fft/Fairness", 600, 600, None, {}),
    ("fft/Toxicity", 526, 526, None, {}),
    ("fft", 2116, 2116, None, {}),
    ("harmfulqa/harmfulqa.json", 1960, 1960, 1938, {}),
    ("harmfulqa/catqa_english.json", 550, 550, None, {}),
    ("harmfulqa/dangerousqa.json", 200, 200, 200, {}),
    ("fake-alignment/safety.jsonl", 90, 90, 90, {}),
    ("fake-alignment/dna_training_set.jsonl", 939, 938, None, {"no question": 1}),
    ("seed-safety", 147, 441, None, {}),
    ("pku-preference", 32, 32, None, {}),
]


@pytest.mark.parametrize(("name", "rows", "count", "unique", "rejects"), PROMPTS)
def test_published_prompts(name, rows, count, unique, rejects):
    prompts, report = read_prompts(published(name))
    assert (report.rows, report.records, len(prompts)) == (rows, count, count)
    assert reasons(report.rejects) == rejects
    assert all(p.messages is not None and [m.role for m in p.messages] == ["user"] for p in prompts)
    assert len({p.id for p in prompts}) == count
    if unique is not None:
        assert len({p.messages for p in prompts}) == unique


def test_published_beavertails():
    prompts, _ = read_prompts(published("beavertails"))
    counts = Counter((p.row["category_id"], p.row["category"]) for p in prompts)
    assert counts == dict.fromkeys(enumerate(beavertails.CATEGORIES), 50)
    assert len(counts) == 14


def test_published_flames():
    prompts, _ = read_prompts(published("flames"))
    assert Counter((p.row["dimension"], p.row["subcomponent"]) for p in prompts) == {
        ("Fairness", "Bias and discrimination"): 195,
        ("Fairness", "Toxic language"): 54,
        ("Safety", "Non-anthropomorphism"): 242,
        ("Safety", "Physical harm"): 70,
        ("Safety", "Property safety"): 65,
        ("Safety", "Mental harm"): 52,
        ("Morality", "Chinese values"): 76,
        ("Morality", "Disobey social norm"): 71,
        ("Morality", "Non-environmental friendly"): 54,
        ("Legality", "Law violation"): 46,
        ("Data protection", "Personal data"): 54,
        ("Data protection", "Sensitive information"): 21,
    }
    lengths = [len(p.messages[0].content) for p in prompts]
    assert (min(lengths), max(lengths)) == (8, 212)


def test_published_fft():
    path = published("fft")
    prompts, report = read_prompts(path)
    places = [f"{path}/Fairness/{name}_Identity_Preference.json:121" for name in ("Gender", "Religion")]
    assert report.mended == {"no closing ] of the array": (2, tuple(places))}
    assert Counter(p.row["task"] for p in prompts) == {
        "yes_no": 345,
        "open": 345,
        "counterfact": 300,
        "credit": 170,
        "criminal": 170,
        "disease": 170,
        "preference": 90,
        "toxicity": 526,
    }
    decisions = [p.row for p in prompts if "identity" in p.row]
    assert Counter(row["group"] for row in decisions) == {"gender": 120, "race": 210, "religion": 180}
    assert set(Counter(row["identity"] for row in decisions).values()) == {30}
    listed = {name for p in prompts for name in p.row.get("identities", ())}
    assert {row["identity"] for row in decisions} == listed
    assert len(listed) == 17
    assert "american indian" in listed
    for task in ("credit", "criminal", "disease"):
        # the same ten cases for each identity, five of each answer
        golds = Counter((row["case"], row["gold"]) for row in decisions if row["task"] == task)
        assert sorted(case for case, _ in golds) == list(range(10))
        assert set(golds.values()) == {17}
        assert sum(gold for _, gold in golds) == 5
    yes_no, open_ended = ([p.row for p in prompts if p.row["task"] == t] for t in ("yes_no", "open"))
    assert {row["file"] for row in yes_no} == {"Yes_no_facts"}
    assert [(r["case"], r["statement"]) for r in yes_no] == [(r["case"], r["statement"]) for r in open_ended]
    assert sum(row["type"] == "quote" and "true_name" in row for row in yes_no) == 50


def test_published_harmful_questions():
    prompts, _ = read_prompts(published("harmfulqa/harmfulqa.json"))
    topics = Counter(p.row["topic"] for p in prompts)
    short = {"Science and Technology": 180, "Philosophy and Ethics": 180}
    assert len(topics) == 10
    assert {topic: n for topic, n in topics.items() if n != 200} == short
    assert set(Counter((p.row["topic"], p.row["subtopic"]) for p in prompts).values()) == {20}
    assert len({p.row["subtopic"] for p in prompts}) == 98
    categories, _ = read_prompts(published("harmfulqa/catqa_english.json"))
    assert set(Counter(p.row["topic"] for p in categories).values()) == {50}
    by = Counter((p.row["topic"], p.row["subtopic"]) for p in categories)
    assert (len(by), set(by.values())) == (55, {10})


def test_published_fake_alignment():
    pairs, _ = read_groups(published("fake-alignment/safety.jsonl"), "pairs")
    names = ("Fairness", "Individual Harm", "Legality", "Privacy", "Civic Virtue")
    assert Counter(r.meta["category"] for r in pairs) == dict.fromkeys(names, 18)
    path = published("fake-alignment/dna_training_set.jsonl")
    pairs, report = read_groups(path, "pairs")
    assert (report.rows, len(pairs)) == (939, 938)
    assert report.rejects == {"no question": (1, (f"{path}:430",))}  # upstream left it empty
    counts = sorted(Counter(r.meta["category"] for r in pairs).values(), reverse=True)
    assert counts == [248 - 1, 243, 176, 155, 117]
    imitated, _ = read_records(path)
    assert [r.messages for r in imitated] == [r.prompt + r.chosen for r in pairs]


def test_published_safety_preferences_to_imitate():
    records, report = read_records(published("pku-preference"))
    # (is0, is1, better, safer) whose better answer is safe: TT11 4, TT00 4, TT10 2, TT01 1 and FT11 1
    assert (len(records), reasons(report.skipped)) == (12, {"the better answer is not safe": 20})


def test_published_difficulty_is_the_mask_of_the_panel():
    records, _ = read_groups(published("seed-safety/safety_values_150.xlsx"), "pairs")
    masks = [seed_safety.difficulty_mask(r.meta["panel"]) for r in records]
    assert sum(mask == r.meta["difficulty"] for mask, r in zip(masks, records, strict=True)) == 441
    panels = [r.meta["panel"] for r in records if r.meta["language"] == "zh"]
    accuracy = {j: sum(p[j] == "1\n2" for p in panels) / 147 for j in ("4B", "7B", "14B", "14B_4K", "72B")}
    assert [round(value, 3) for value in accuracy.values()] == [0.510, 0.816, 0.830, 0.871, 0.789]
    assert sum(p["4B"] == "2\n2" for p in panels) / 147 == pytest.approx(0.43, abs=0.005)
    refused = [r for r in records if r.meta["language"] == "en" and r.meta["rejected_type"] == "拒绝为主"]
    assert len(refused) == 47


def test_difficulty_is_the_sum_of_the_weights_of_the_judges_that_were_wrong():
    weights = {"small": 1, "large": 16}
    for cells, expected in [
        (("1\n2", "1\n2"), 0),
        (("2\n2", "1\n2"), 1),
        (("1\n2", "sorry,\n2"), 16),
        (("2\n1", "answer 1\n2"), 17),
    ]:
        assert seed_safety.difficulty_mask(dict(zip(weights, cells, strict=True)), weights) == expected
    with pytest.raises(RowError, match="no verdict of judge large"):
        seed_safety.difficulty_mask({"small": "1\n2", "other": "1\n2"}, weights)
