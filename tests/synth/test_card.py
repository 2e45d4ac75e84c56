import hashlib
import json
import re

import pytest
import yaml

from jaxalign.llm.scripted import ScriptedLLM
from jaxalign.synth.card import card
from jaxalign.synth.quality.settings import FilterConfig
from jaxalign.synth.sample import drawn, sample_page
from tests.pages.markup import Page
from tests.synth.quality_corpus import Filtered, corpus, row

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


def scorer() -> ScriptedLLM:
    return ScriptedLLM(lambda *_: "", lambda prompt, option: -1.0 - len(option.split()) / (1 + len(prompt)))


def front(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def table(text: str, head: str) -> list[list[str]]:
    """The lines of the table whose first column is called so."""
    lines = text.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    found = Filtered(tmp_path, corpus(), dedup="exact", license="cc-by-4.0", source_name="org/some-set")
    text = (found.folder / "README.md").read_text(encoding="utf-8")
    assert front(text) == {
        "license": "cc-by-4.0",
        "pretty_name": "clean",
        "size_categories": ["n<1K"],
        "source_datasets": ["org/some-set"],
        "tags": ["jaxalign", "filter"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "clean.jsonl"}]}],
        "dataset_info": {
            "splits": [
                {
                    "name": "train",
                    "num_bytes": (tmp_path / "clean.jsonl").stat().st_size,
                    "num_examples": 6,
                }
            ]
        },
    }
    other = (Filtered(tmp_path, corpus(), "other", dedup="exact").folder / "README.md").read_text()
    assert front(other)["license"] == "unknown"
    assert "source_datasets" not in front(other)


@pytest.mark.parametrize(
    ("count", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**9, "n>1B")],
)
def test_sizes_have_the_hubs_names(tmp_path, count, size):
    out = tmp_path / "x.jsonl"
    out.touch()
    report = {"method": "m", "n_in": 0, "n_out": count, "dropped": {}, "rejects": {}, "stages": {}}
    report |= {"models": {}, "templates": {}, "seed": 0, "metrics": {}}
    text = card(report, {"data": {}, "settings": {}}, FilterConfig(), out)
    assert front(text)["size_categories"] == [size]


def test_the_card_says_how_many_and_from_what(tmp_path):
    rows = [*corpus(), dict(corpus()[0], id="again")]
    found = Filtered(tmp_path, rows, model=scorer(), dedup="exact", perplexity=[0, 1e6], seed=4)
    text = (found.folder / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert table(text, "what") == [
        ["items read", "7"],
        ["dropped: repeated: exact", "1"],
        ["records written", "6"],
    ]
    assert table(text, "input") == [["rows.jsonl", digest]]
    assert table(text, "model") == [["scorer", "script", "script"]]
    assert table(text, "stage") == [["given", "6", "6", "none", "0.0 %", "0", "0"]]
    assert "- seed: 4\n" in text
    metrics = json.loads(text.split("## Metrics\n\n```json\n")[1].split("\n```")[0])
    assert metrics == found.report["metrics"]


def test_stages_and_templates_stand_in_the_card(tmp_path):
    out = tmp_path / "x.jsonl"
    out.touch()
    stage = {"items": 9, "understood": 7, "rejects": {"no | score": 2}, "parse_failure_rate": 0.25}
    report = {"method": "m", "n_in": 9, "n_out": 7, "dropped": {}, "rejects": {"empty": 1}, "seed": 0}
    report |= {"models": {}, "templates": {"judge": "0123456789abcdef"}, "metrics": {"text": "```"}}
    report |= {"stages": {"judge-2": stage | {"prompt_tokens": 90, "tokens": 30}}}
    config = FilterConfig(source_name="a|b\n# c <b>")
    text = card(report, {"data": {}, "settings": {}}, config, out)
    assert table(text, "stage") == [["judge-2", "9", "7", r"2 x no \| score", "25.0 %", "90", "30"]]
    assert table(text, "template") == [["judge", "0123456789abcdef"]]
    assert ["rejected: empty", "1"] in table(text, "what")
    assert "\n````json\n" in text  # a fence that the text cannot close
    assert r"- source: a\|b \# c \<b\>" in text


def test_a_stopped_build_leaves_the_same_bytes(tmp_path):
    keys = {"perplexity": [0, 1e6], "dedup": "exact", "seed": 4}
    first = Filtered(tmp_path, corpus(), model=scorer(), **keys)
    names = ["README.md", "sample.html", "report.json", "dropped.jsonl"]
    before = {name: (first.folder / name).read_bytes() for name in names}
    stage = first.folder / "given.jsonl"
    stage.write_bytes(stage.read_bytes()[:300])  # killed in the middle of a line
    for name in names:
        (first.folder / name).unlink()
    again = Filtered(tmp_path, corpus(), model=scorer(), **keys)
    assert {name: (again.folder / name).read_bytes() for name in names} == before


def test_the_licence_may_change_without_a_new_build(tmp_path):
    Filtered(tmp_path, corpus(), dedup="exact")
    again = Filtered(tmp_path, corpus(), dedup="exact", license="mit")
    assert front((again.folder / "README.md").read_text())["license"] == "mit"


def test_every_text_of_a_record_is_escaped():
    plain = row(EVIL, EVIL, EVIL, source=EVIL, method=EVIL, note={EVIL: EVIL}, **{EVIL: EVIL})
    pair = {"prompt": EVIL, "chosen": EVIL + "1", "rejected": EVIL + "2"}
    page = Page(sample_page([plain, pair], EVIL, EVIL, 0))
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{}]  # the page's own
    assert not [
        attrs for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)
    ]
    assert page.text().count("alert(1)") > 10
    assert "{{ 7*7 }}" in page.text()
    assert page.with_attribute("data-source") == [EVIL, ""]


def test_the_page_loads_nothing():
    page = Page(sample_page(corpus(source="a"), "x.jsonl", "filter", 0))
    links = [url or "" for name in ("src", "href", "action", "data") for url in page.with_attribute(name)]
    assert all(url.startswith(("#", "data:")) for url in links)
    assert {f"#r{i}" for i in range(1, 7)} < set(links)
    assert "default-src 'none'" in (page.with_attribute("content")[3] or "")


def test_records_show_their_parts():
    scored = {"id": "s", "prompt": "Q?", "completions": ["good", "bad"], "scores": [2.5, None]}
    pair = {"prompt": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Q?"}]}
    pair |= {"chosen": "yes", "rejected": "no", "meta": {"source": "web", "method": "cnr", "margin": 2}}
    text = Page(sample_page([scored, pair], "x.jsonl", "cnr", 0)).text()
    assert "rank 1score 2.5 good no score bad" in text
    assert "system Be brief user Q? chosen yes rejected no" in text
    assert "margin2" in text


def test_the_sample_is_drawn_by_the_seed():
    rows = [row(f"r{i}", f"Question {i}", f"Answer {i}") for i in range(300)]
    one, same, other = (sample_page(rows, "x", "m", seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    shown = [int(name[1:]) for name in Page(one).with_attribute("id") if re.fullmatch(r"r\d+", name or "")]
    assert len(shown) == 200
    assert shown == sorted(shown) == [i + 1 for i in drawn(300, 0)]
    assert drawn(5, 0) == [0, 1, 2, 3, 4]
    counts = [sum(i in drawn(20, seed, 5) for seed in range(400)) for i in range(20)]
    assert all(60 < count < 140 for count in counts)  # 100 each, sd 8.7
    assert "200 of 300 records" in Page(one).text()


def test_an_empty_build_has_a_page():
    assert "No record." in Page(sample_page([], "x", "m", 0)).text()
