import json
import re
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.evals.report import labelled, render, word_diff, write_report
from jaxalign.pages.page import clock, p_value, percent, points
from tests.evals.sample import CASES, sample
from tests.pages.markup import Page


def test_the_page_and_its_data_lie_side_by_side(tmp_path: Path):
    page = write_report(tmp_path / "new", sample())
    assert page == tmp_path / "new" / "report.html"
    assert json.loads((page.parent / "report.json").read_text(encoding="utf-8")) == sample()
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]


def test_every_item_carries_its_status_and_the_filter_counts_them():
    page = Page(render(sample()))
    assert page.with_attribute("data-status") == ["fixed", "broke", "failing", "kept"]
    assert page.with_attribute("data-show") == ["all", "fixed", "broke", "failing", "kept"]
    assert re.search(r"all 4 ?fixed 1 ?broke 1 ?still failing 1 ?passed both 1", page.text())
    assert {f"{name}" for name in CASES} <= set(page.with_attribute("id"))


def test_the_page_says_what_the_data_says():
    text = Page(render(sample())).text()
    for part in [
        "50.0 %",
        "15.0 % to 85.0 %",
        "1 gained, 1 lost, McNemar p = 1",
        "old text of a-fixed",
        "Answer: new text of b-broke",
        "the reference",
        "lora.rank16",
        "lora.targetsq, k",
        "max_steps–",
        "2 min 00 s in all",
        "1 min 30 s",
        "jaxalign chat -m run",
        "a note",
    ]:
        assert part in text


def test_broken_rules_are_chips_that_explain_themselves():
    page = Page(render(sample()))
    titles = [attrs["title"] for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert titles == ["what labels asks"] * 6  # before, after and after preferences


def test_nothing_in_the_page_is_executed_or_closes_a_tag():
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'single'"
    data = sample()
    data["title"] = data["summary"] = data["model"] = nasty
    data["style"]["rules"]["labels"] = data["style"]["example"] = nasty
    data["notes"], data["config"], data["machine"] = [nasty], {nasty: nasty}, {"cpu": nasty}
    data["commands"][0]["command"] = nasty
    for item in data["items"]:
        item["question"] = item["topic"] = item["reference"] = nasty
        item["before"]["text"], item["after"]["text"] = nasty, f"Answer: {nasty}"
    html, clean = render(data), Page(render(sample()))
    page = Page(html)
    assert html.count("<script>") == 1
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert "alert(1)" in page.text()  # shown, as text


def test_the_page_loads_nothing():
    page = Page(render(sample()))
    links = [link or "" for name in ("href", "src", "action") for link in page.with_attribute(name)]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "http:" not in render(sample())
    assert "https:" not in render(sample())
    policy = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policy[0].startswith("default-src 'none'")


def test_internal_links_lead_somewhere():
    page = Page(render(sample()))
    targets = [link[1:] for link in page.with_attribute("href") if link and link.startswith("#")]
    assert set(targets) <= set(page.with_attribute("id"))


def test_a_run_without_metrics_says_so():
    data = sample()
    data["metrics"] = []
    assert Page(render(data)).text().count("Nothing was recorded.") == 3


def test_an_empty_answer_is_shown_as_nothing():
    data = sample()
    data["items"][0]["after"]["text"] = " \n"
    assert "(nothing)" in Page(render(data)).text()


@pytest.mark.parametrize("name", ["title", "items", "measures", "metrics", "versions", "notes"])
def test_missing_data_is_an_error(name: str):
    data = sample()
    del data[name]
    with pytest.raises((KeyError, jinja2.UndefinedError)):
        render(data)


def test_word_diff_by_hand():
    assert word_diff("The sky looks blue today", "The sky looks grey today") == [
        ("same", "The sky looks "),
        ("del", "blue "),
        ("ins", "grey "),
        ("same", "today "),
    ]


def test_a_lone_short_word_does_not_split_a_change():
    assert word_diff("Metal is cold", "Wood is warm") == [("del", "Metal is cold "), ("ins", "Wood is warm ")]


WORDS = st.lists(st.sampled_from(["the", "cat", "house", "runs", "of", "water", "a"]))


@given(WORDS, WORDS)
def test_word_diff_holds_both_texts(first: list[str], second: list[str]):
    edits = word_diff(" ".join(first), " ".join(second))
    assert "".join(text for op, text in edits if op != "ins").split() == first
    assert "".join(text for op, text in edits if op != "del").split() == second
    assert all(a != b for (a, _), (b, _) in pairwise(edits))


def test_words_for_numbers():
    assert percent(0.8666) == "86.7 %"
    assert percent(None) == points(None) == "not measured"
    assert points(0.5) == "+50.0"
    assert points(-0.05) == "\N{MINUS SIGN}5.0"
    assert p_value(3e-9) == "p < 0.0001"
    assert p_value(0.21875) == "p = 0.22"
    assert clock(8.31) == "8.3 s"
    assert clock(59.99) == "1 min 00 s"
    assert clock(245.2) == "4 min 05 s"


def test_labels_are_told_from_text():
    assert labelled("Answer: yes.\nAnswers: no.\nCheck:", ["Answer", "Check"]) == [
        ("Answer:", " yes."),
        ("", "Answers: no."),
        ("Check:", ""),
    ]
