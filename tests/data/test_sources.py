import json
import zipfile
from collections import Counter

import pytest

from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.readers import read_groups, read_prompts, read_records
from jaxalign.data.records import UnwantedRowError
from jaxalign.data.sources import oasst
from jaxalign.errors import UserError
from tests.data.test_readers import write_jsonl
from tests.data.toy import chat, shared

COUNTER = iter(range(10**6))


def node(role, text, *replies, rank=None, **extra):
    """A message with replies."""
    base = {"message_id": str(next(COUNTER)), "role": role, "text": text, "rank": rank, "lang": "en"}
    return base | {"replies": list(replies)} | extra


def tree(root, **extra):
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root} | extra


def small_tree():
    """Two ranked answers to the question, a second question after the better, three answers to that."""
    later = node("prompter", "and?", *(node("assistant", f"c{i}", rank=i) for i in (2, 0, 1)))
    first = node("assistant", "b", later, rank=0)
    return tree(node("prompter", "a", node("assistant", "worse", rank=1), first))


def flattened(nodes, parent=None):
    """The rows of a flat table, depth first."""
    for found in nodes:
        row = {k: v for k, v in found.items() if k != "replies"} | {"parent_id": parent}
        yield row
        yield from flattened(found["replies"], row["message_id"])


def test_every_message_with_ranked_answers_is_a_list(tmp_path):
    records, report = read_groups(write_jsonl(tmp_path / "a.jsonl", [small_tree()]), "lists")
    first, second = records
    assert first.prompt == chat("u:a")
    assert first.answers == (chat("a:b"), chat("a:worse"))
    assert second.prompt == chat("u:a", "a:b", "u:and?")
    assert second.answers == (chat("a:c0"), chat("a:c1"), chat("a:c2"))
    assert second.aux["scores"].tolist() == [0.0, -1.0, -2.0]
    assert first.family == second.family
    assert (report.rows, report.records, report.formats) == (1, 2, {"tree": 2})


def test_a_flat_table_of_messages_gives_the_same(tmp_path):
    made = small_tree()
    whole, _ = read_groups(write_jsonl(tmp_path / "tree.jsonl", [made]), "lists")
    nested, _ = read_groups(write_jsonl(tmp_path / "nested.jsonl", [made["prompt"]]), "lists")
    rows = list(flattened([made["prompt"]]))
    flat, _ = read_groups(write_jsonl(tmp_path / "flat.jsonl", rows), "lists")
    for other in (nested, flat):
        assert [(r.prompt, r.answers, r.family) for r in other] == [
            (r.prompt, r.answers, r.family) for r in whole
        ]
    lost = [row for row in rows if row["text"] != "and?"]
    path = write_jsonl(tmp_path / "lost.jsonl", lost)
    records, report = read_groups(path, "lists", max_bad_rows=0.9)
    assert len(records) == 1
    assert {r: n for r, (n, _) in report.rejects.items()} == {"a message whose parent is missing": 3}


@pytest.mark.parametrize(
    ("spoil", "left", "reason"),
    [
        (lambda t: t["prompt"].update(synthetic=True), 0, "a deleted or synthetic message in the thread"),
        (
            lambda t: t["prompt"]["replies"][0].update(deleted=True),
            1,
            "a deleted or synthetic message in the",
        ),
        (lambda t: t.update(tree_state="growing"), 0, "the tree is growing"),
        (lambda t: t["prompt"].update(review_result=False), 0, "the prompt failed review"),
    ],
)
def test_threads_that_are_not_wanted_are_skipped(spoil, left, reason, tmp_path):
    made = small_tree()
    spoil(made)
    records, report = read_groups(write_jsonl(tmp_path / "a.jsonl", [small_tree(), made]), "lists")
    assert len(records) == 2 + left
    assert all(name.startswith(reason) for name in report.skipped)
    assert report.skipped


def test_threads_to_imitate():
    made = small_tree()
    texts = lambda found: [r.messages[-1].content for r in found]  # noqa: E731
    assert texts(oasst.sft_from_tree(made)) == ["worse", "c2", "c0", "c1"]
    best = [r for r in oasst.sft_from_tree(made, top_k=1) if not isinstance(r, UnwantedRowError)]
    assert texts(best) == ["c0"]
    hanging = tree(
        node("prompter", "a", node("assistant", "b", node("prompter", "c"), node("prompter", "d"), rank=0))
    )
    assert texts(oasst.sft_from_tree(hanging)) == ["b"]


def test_published_trees():
    path = shared("oasst/en_100_tree.jsonl")
    if path is None:
        pytest.skip("oasst is not beside the checkout")
    lists, report = read_groups(path, "lists")
    sizes = Counter(len(r.answers) for r in lists)
    assert sizes == {2: 56, 3: 116, 4: 24, 5: 3, 6: 6, 8: 1, 9: 1}
    assert {r: n for r, (n, _) in report.skipped.items()} == {
        "a deleted or synthetic message in the thread": 212 - 207
    }
    threads, _ = read_records(path)
    assert len(threads) == 538
    assert all(r.messages[-1].role == "assistant" for r in threads)
    assert len(read_prompts(path)[0]) == 475
    nodes = [p[-1] for line in path.read_text().splitlines() for p in oasst.paths(json.loads(line))]
    assert (len(nodes), sum(n["role"] == "prompter" for n in nodes)) == (1167, 480)
    ranked = [n["role"] for n in nodes if n.get("rank") is not None]
    assert (len(ranked), set(ranked)) == (641, {"assistant"})
    told = Counter(what for n in nodes for what in ("synthetic", "deleted") if n.get(what))
    assert told == {"synthetic": 22}
    leaves = {n["message_id"] for n in nodes if not n["replies"]}
    assert Counter(r.id in leaves for r in threads) == {True: 383, False: 155}


def test_published_trees_flattened(tmp_path):
    path = shared("oasst/en_100_tree.jsonl")
    if path is None:
        pytest.skip("oasst is not beside the checkout")
    trees = [json.loads(line) for line in path.read_text().splitlines()]
    rows = list(flattened([t["prompt"] for t in trees]))
    assert len(read_groups(write_jsonl(tmp_path / "a.jsonl", rows), "lists")[0]) == 207


def test_published_labels():
    path = shared("pku-preference/train.json")
    if path is None:
        pytest.skip("pku-preference is not beside the checkout")
    records, report = read_groups(path, "pairs")
    by = {aspect: [r for r in records if r.meta["aspect"] == aspect] for aspect in ("helpful", "harmless")}
    assert report.contradictions == 19
    mixed = [r for r in by["harmless"] if r.meta["safe"]["chosen"] != r.meta["safe"]["rejected"]]
    assert len(mixed) == 5
    assert all(r.meta["safe"]["chosen"] for r in mixed)
    assert sum(sum(r.meta["safe"].values()) for r in by["harmless"]) == 27


def test_published_safety_pairs():
    path = shared("seed-safety/safety_values_150.xlsx")
    if path is None:
        pytest.skip("seed-safety is not beside the checkout")
    records, _ = read_groups(path, "pairs")
    assert len({r.family for r in records}) == 147
    assert len({r.meta["L2"] for r in records}) == 33
    assert sorted(Counter(r.meta["L1"] for r in records).values()) == [30, 75, 81, 108, 147]
    for hardness, counts in ((0, (74, 67, 66)), (31, (11, 10, 10))):
        found = Counter(r.meta["language"] for r in records if r.meta["difficulty"] == hardness)
        assert tuple(found[name] for name in ("zh", "tra", "en")) == counts
    for language, safer in (("zh", 147), ("en", 146)):
        probabilities = [r.meta["safe"] for r in records if r.meta["language"] == language]
        assert sum(p["chosen"] > p["rejected"] for p in probabilities) == safer


def test_published_ratings_and_rankings():
    names = (
        "feedback_rankings_sample_generation.csv",
        "feedback_rankings_for_rm_sample.json",
        "feedback_ratings_sample_generation.csv",
    )
    paths = [shared(f"sparse-feedback/{name}") for name in names]
    if None in paths:
        pytest.skip("sparse-feedback is not beside the checkout")
    rankings, report = read_groups(paths[0], "pairs")
    assert {r: n for r, (n, _) in report.skipped.items()} == {"a tie": 118 - 80}
    sentences, _ = read_groups(paths[1], "pairs")
    shipped = Counter(r.answers for r in sentences)
    assert Counter(tuple(a[0].content for a in r.answers) for r in rankings) == shipped
    assert len({r.prompt for r in sentences}) == 20
    ratings, report = read_groups(paths[2], "lists", max_bad_rows=0.5)
    assert {r: n for r, (n, _) in report.skipped.items()} == {"a repeated row": 2}
    rejected = sum(n for n, _ in report.rejects.values())
    assert sum(len(r.completions) for r in ratings) == 97
    assert (len(ratings) + rejected, report.rows) == (report.rows - 2, report.rows)


def test_pairs_without_a_prompt_of_their_own_give_that_of_their_transcripts(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    rows = [{"chosen": talk + "yes", "rejected": talk + "no"}, {"chosen": "nothing", "rejected": "of this"}]
    prompts, report = read_prompts(write_jsonl(tmp_path / "hh.jsonl", rows), max_bad_rows=0.5)
    assert [[m.content for m in p.messages] for p in prompts] == [["a", "b", "c"]]
    assert report.rejected == 1
    path = shared("hh-rlhf/harmless-base-test.jsonl.gz")
    prompts, report = read_prompts(path)
    assert (len(prompts), report.rejected) == (2299, 13)
    assert all(p.messages[-1].role == "user" for p in prompts)


def test_ratings_and_rankings_without_a_header(tmp_path):
    (tmp_path / "rankings.csv").write_text("q,nan,one,two,(b)\nq,nan,one,two,(a)\nq,,one,three,equal\n")
    (record,), report = read_groups(tmp_path / "rankings.csv", "pairs")
    assert record.answers == (chat("a:two"), chat("a:one"))
    assert set(report.skipped) == {"a repeated row", "a tie"}
    (tmp_path / "ratings.csv").write_text("q,x,one,5\nq,x,two,7\nother,nan,three,1\nother,,four,2\n")
    lists, _ = read_groups(tmp_path / "ratings.csv", "lists")
    assert [(r.prompt, r.aux["scores"].tolist()) for r in lists] == [
        (chat("u:q\nx"), [7.0, 5.0]),
        (chat("u:other"), [2.0, 1.0]),
    ]


def write_xlsx(path, rows):
    """A workbook with one sheet: strings shared, numbers as they are, None left out."""
    texts = sorted({v for row in rows for v in row if isinstance(v, str)})
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    link = "http://schemas.openxmlformats.org/package/2006/relationships"

    def cell(at, number, value):
        name = f"{'ABCDEFGH'[at]}{number}"
        if isinstance(value, str):
            return f'<c r="{name}" t="s"><v>{texts.index(value)}</v></c>'
        return "" if value is None else f'<c r="{name}"><v>{value}</v></c>'

    sheet = "".join(
        f'<row r="{n}">{"".join(cell(i, n, v) for i, v in enumerate(row))}</row>'
        for n, row in enumerate(rows, start=1)
    )
    strings = "".join(f"<si><r><t>{t[:1]}</t></r><r><t>{t[1:]}</t></r></si>" for t in texts)
    parts = {
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{office}"><sheets><sheet name="a" r:id="r7"/></sheets>'
        "</workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{link}">'
        '<Relationship Id="r7" Target="worksheets/one.xml"/></Relationships>',
        "xl/sharedStrings.xml": f"<sst {main}>{strings}</sst>",
        "xl/worksheets/one.xml": f"<worksheet {main}><sheetData>{sheet}</sheetData></worksheet>",
    }
    with zipfile.ZipFile(path, "w") as book:
        for name, content in parts.items():
            book.writestr(name, content)
    return path


def test_workbooks(tmp_path):
    rows = [
        ["prompt", "chosen", "rejected", "margin", "id"],
        ["hello", "hi", "no", 1.5, 7],
        ["hello", "hey", None, None, 8],
        ["hello", "漢", "so_x000D_", None, None],
    ]
    path = write_xlsx(tmp_path / "a.xlsx", rows)
    records, report = read_groups(path, "pairs", max_bad_rows=0.5)
    assert [(r.answers, r.margin) for r in records] == [(("hi", "no"), 1.5), (("漢", "so\r"), None)]
    assert records[0].id == "7"
    assert [places for _, places in report.rejects.values()] == [(f"{path}:row 3",)]
    (tmp_path / "b.xlsx").write_bytes(b"no workbook")
    with pytest.raises(UserError, match=r"not a whole .xlsx file"):
        read_groups(tmp_path / "b.xlsx", "pairs")


def test_languages_of_a_safety_row_are_selected(tmp_path):
    row = {"ID": 3, "L1": "one", "en_difficulty": 4}
    for language in ("zh", "tra", "en"):
        row |= {f"{k}_{language}": f"{k} {language}" for k in ("Question", "good_response", "bad_response")}
    options = GroupOptions(select={"language": "en"})
    (record,), _ = read_groups(write_jsonl(tmp_path / "a.jsonl", [row]), "pairs", options=options)
    assert record.prompt == chat("u:Question en")
    assert record.answers == (chat("a:good_response en"), chat("a:bad_response en"))
    assert (record.id, record.family, record.meta["difficulty"]) == ("3:en", "3", 4)


# (file, kind, options, records, {reason: count} of the rejected); goldens from the sets' own extraction
PUBLISHED = [
    (
        "hh-rlhf/harmless-base-test.jsonl.gz",
        "pairs",
        {},
        2299,
        {
            "empty answer: chosen": 4,
            "turn order: assistant after assistant (chosen)": 8,
            "turn order: assistant after assistant (rejected)": 1,
        },
    ),
    ("llama-factory/dpo_en_demo.json", "pairs", {}, 300, {}),
    ("llama-factory/kto_en_demo.json", "binary", {}, 300, {}),
    ("pku-preference/train.json", "pairs", {}, 64, {}),
    ("pku-preference/train.json", "pairs", {"select": {"aspect": "helpful"}}, 32, {}),
    ("pku-preference/train.json", "pairs", {"select": {"aspect": "harmless"}}, 32, {}),
    ("seed-safety/safety_values_150.xlsx", "pairs", {}, 441, {}),
    ("seed-safety/safety_values_150.xlsx", "pairs", {"select": {"language": "en"}}, 147, {}),
    ("seed-safety/safety_values_150.xlsx", "binary", {}, 882, {}),
    ("sparse-feedback/feedback_rankings_sample_generation.csv", "pairs", {}, 80, {}),
    ("sparse-feedback/feedback_rankings_for_rm_sample.json", "pairs", {}, 80, {}),
    *(
        (f"oasst/en_100_{form}.jsonl", kind, options, count, {})
        for form in ("tree", "message")
        for kind, options, count in (
            ("lists", {}, 207),
            ("pairs", {}, 732),
            ("pairs", {"best": 5}, 658),
            ("pairs", {"pairs": "adjacent"}, 417),
            ("pairs", {"pairs": "best_vs_worst"}, 207),
        )
    ),
]


@pytest.mark.parametrize(("name", "kind", "options", "count", "rejects"), PUBLISHED)
def test_published_files(name, kind, options, count, rejects):
    path = shared(name)
    if path is None:
        pytest.skip(f"{name} is not beside the checkout")
    records, report = read_groups(path, kind, options=GroupOptions(**options))
    assert (len(records), report.records) == (count, count)
    assert {reason: n for reason, (n, _) in report.rejects.items()} == rejects
    assert json.dumps([r.meta for r in records], ensure_ascii=False)
