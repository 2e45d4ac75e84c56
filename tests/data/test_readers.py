import csv
import gzip
import json

import pytest

from jaxalign.data.readers import hub_name, read_prompts, read_records
from jaxalign.errors import UserError
from tests.data.toy import chat, shared

QA = chat("u:hello", "a:hi")

# format -> (row, messages or plain parts it becomes)
ROWS = {
    "messages": (
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
        QA,
    ),
    "text parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
                },
                {"role": "assistant", "content": "hi"},
            ]
        },
        QA,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        QA,
    ),
    "sharegpt roles": (
        {"conversations": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
        QA,
    ),
    "system column": (
        {
            "system": "Be brief",
            "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
        },
        chat("s:Be brief", "u:hello", "a:hi"),
    ),
    "completion": ({"prompt": "hello", "completion": " hi"}, ("hello", " hi")),
    "completion turns": (
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "completion": [{"role": "assistant", "content": "hi"}],
        },
        QA,
    ),
    "alpaca": ({"instruction": "hello", "input": "", "output": "hi", "text": "unused"}, QA),
    "alpaca input": ({"instruction": "Add", "input": "1 2", "output": "3"}, chat("u:Add\n1 2", "a:3")),
    "alpaca history": (
        {"instruction": "b", "output": "d", "history": [["a", "c"]], "system": "s"},
        chat("s:s", "u:a", "a:c", "u:b", "a:d"),
    ),
    "text": ({"text": "once upon"}, "once upon"),
    "preference": (
        {
            "conversations": [{"from": "human", "value": "hello"}],
            "chosen": {"from": "gpt", "value": "hi"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        QA,
    ),
    "preference repeated": (
        {
            "prompt": "hello",
            "chosen": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            "rejected": [],
        },
        QA,
    ),
    "preference text": ({"prompt": "hello", "chosen": " hi", "rejected": " no"}, ("hello", " hi")),
    "preference implicit": (
        {
            "chosen": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            "rejected": [],
        },
        QA,
    ),
    "transcript": ({"chosen": "\n\nHuman: hello\n\nAssistant: hi", "rejected": ""}, QA),
    "ends on the user": (
        {
            "conversations": [
                {"from": w, "value": v} for w, v in (("human", "hello"), ("gpt", "hi"), ("human", "so"))
            ]
        },
        QA,
    ),
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_row_format(name, tmp_path):
    row, expected = ROWS[name]
    (record,), report = read_records(write_jsonl(tmp_path / "a.jsonl", [row]))
    found = {
        "messages": record.messages,
        "completion": (record.prompt, record.completion),
        "text": record.text,
    }
    assert found[record.form] == expected
    assert (report.rows, report.records, report.rejects) == (1, 1, {})


def test_the_prompt_of_a_prompt_completion_row_is_remembered(tmp_path):
    names = (
        "messages",
        "completion turns",
        "preference",
        "preference repeated",
        "preference implicit",
        "transcript",
    )
    records, report = read_records(write_jsonl(tmp_path / "a.jsonl", [ROWS[name][0] for name in names]))
    assert [r.prompt_turns for r in records] == [0, 1, 1, 1, 1, 1]
    assert report.formats == {"messages": 1, "completion": 1, "preference": 4}


BAD = {
    "unknown columns (question, answer)": {"question": "a", "answer": "b"},
    "the row is not an object": ["a"],
    "empty text": {"text": "  "},
    "empty completion": {"prompt": "a", "completion": "\n"},
    "no user turn": {"messages": [{"role": "assistant", "content": "a"}]},
    "no assistant turn": {"messages": [{"role": "user", "content": "a"}]},
    "no assistant turn in the answer": {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "completion": [{"role": "user", "content": "c"}],
    },
    "turn order: assistant first": {
        "conversations": [{"from": w, "value": "x"} for w in ("gpt", "human", "gpt")]
    },
    "turn order: user after user": {
        "conversations": [{"from": w, "value": "x"} for w in ("human", "human", "gpt")]
    },
    "turn order: system after the start": {
        "conversations": [{"from": w, "value": "x"} for w in ("human", "system", "gpt")]
    },
    "empty assistant turn": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    },
    "unknown role 'wizard'": {"messages": [{"role": "wizard", "content": "a"}]},
    "tool calls are not supported": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
    "user message is not text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "no messages": {"messages": []},
    "chosen has no prompt and is not a Human/Assistant transcript": {"chosen": "hi", "rejected": "no"},
}


@pytest.mark.parametrize("reason", BAD)
def test_every_bad_row_is_counted_with_its_reason_and_place(reason, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS["text"][0], BAD[reason], ROWS["text"][0]])
    records, report = read_records(path, max_bad_rows=0.5)
    assert len(records) == 2
    assert report.rejects == {reason: (1, (f"{path}:2",))}
    assert f"rejected 1: {reason} ({path}:2)" in report.lines()


def test_too_many_bad_rows_stop_and_say_which(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "a"}) + "\n"
    path.write_text(good * 8 + "{broken\n" + good)
    records, report = read_records(path)
    assert (len(records), report.rejected) == (9, 1)
    path.write_text(good * 8 + "{broken\n" + "\xff\n" + '{"text": ""}\n')
    with pytest.raises(UserError, match=r"3 of 11 rows cannot be used, more than max_bad_rows=0.1") as caught:
        read_records(path)
    assert f"{path}:9" in str(caught.value)
    assert "not JSON" in str(caught.value)


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "\xff"}\n')
    records, report = read_records(path, max_bad_rows=0.5)
    assert [r.text for r in records] == ["a"]
    assert report.rejects == {"not UTF-8": (1, (f"{path}:3",))}


def test_unwanted_answers_are_skipped_without_being_faults(tmp_path):
    turns = ROWS["messages"][0]["messages"]
    rows = [{"messages": turns, "label": True}, {"messages": turns, "label": False}]
    records, report = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(records) == 1
    assert report.rejected == 0
    assert report.rows == 2
    assert list(report.skipped) == ["label is false: an unwanted answer is not learned"]


def test_json_array_gives_the_lines_of_its_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n\n {"text": "b"},\n {"text": ""}\n]')
    records, report = read_records(path, max_bad_rows=0.5)
    assert [r.place for r in records] == [f"{path}:2", f"{path}:4"]
    assert report.rejects == {"empty text": (1, (f"{path}:5",))}


def test_json_array_without_its_closing_bracket_keeps_its_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": "b"},\n')
    records, report = read_records(path, max_bad_rows=0.5)
    assert len(records) == 2
    assert report.rejected == 1
    path.write_text('[{"text": "a"},\n{"text": "b"\n')
    with pytest.raises(UserError, match=f"{path}:3: not JSON"):
        read_records(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [{"text": "a"}], "n": 1}',
        '{"things": [{"text": "a"}]}',
        '{"text": "a"}',
        '\n{"text": "a"}\n{"text": "a"}',
    ],
)
def test_json_objects(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    records, _ = read_records(tmp_path / "a.json")
    assert {r.text for r in records} == {"a"}


def test_csv_parquet_gzip_and_folders_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a,\n'b'", "completion": "é漢"}, {"prompt": "c", "completion": "d"}]
    write_jsonl(tmp_path / "one.jsonl", rows)
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress((tmp_path / "one.jsonl").read_bytes()))
    (tmp_path / "three.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    with (tmp_path / "four.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "five.parquet")
    ids = {tuple(r.id for r in read_records(path)[0]) for path in tmp_path.iterdir()}
    assert len(ids) == 1
    records, report = read_records(tmp_path)
    assert report.records == 10
    assert len({r.id for r in records}) == 10
    assert records[2].id == f"{records[0].id}#2"
    both, _ = read_records([tmp_path / "one.jsonl", tmp_path / "four.csv"])
    assert len(both) == 4


def test_csv_rows_of_another_width_and_json_columns(tmp_path):
    path = tmp_path / "a.csv"
    turns = json.dumps(ROWS["messages"][0]["messages"]).replace('"', '""')
    path.write_text(f'messages,n\n"{turns}",1\n"{turns}"\n')
    records, report = read_records(path, max_bad_rows=0.5)
    assert [r.messages for r in records] == [QA]
    assert report.rejects == {"1 fields under a header of 2": (1, (f"{path}:3",))}


def test_ids_are_the_rows_own_or_a_hash_of_the_content(tmp_path):
    rows = [{"text": "a", "id": 7}, {"text": "a"}, {"text": "b"}, {"text": "a", "other": 1}]
    records, _ = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert records[0].id == "7"
    assert records[1].id != records[2].id
    assert records[3].id == f"{records[1].id}#2"


def test_missing_files_name_near_ones(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"no such file; did you mean 'train.jsonl'"):
        read_records(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no folder"):
        read_records(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"cannot read .md"):
        read_records(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files"):
        read_records(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", b"", "no usable row"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'{"a": [1], "b": [2]}', "cannot be used"),
        ("a.csv", b"", "an empty file"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.jsonl.gz", b"plain", "not a whole gzip file"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_files_that_cannot_be_read(name, content, cause, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=cause):
        read_records(tmp_path / name)


def test_hub_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    found = hub_name("org/set:test[:10]@main")
    assert found is not None
    assert (found["id"], found["split"], found["config"]) == ("org/set", "test[:10]", "main")
    assert hub_name("hf:squad") is not None
    for path in ("data/trian", "org/rows.jsonl", "data", "squad", "./x/y", "/a/b"):
        assert hub_name(path) is None, path


def test_hub_sets_are_loaded_by_datasets(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r.text for r in read_records("org/set")[0]] == ["a", "b"]
    records, _ = read_records("org/set:test@main")
    assert asked == [("org/set", None, None), ("org/set", "main", "test")]
    assert records[1].place == "org/set:test@main:row 1"


def test_hub_without_network_is_a_user_error(monkeypatch):
    import datasets

    def load(name, config, split):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="neither a file here nor a data set that could be loaded"):
        read_records("org/set")


def test_limit_stops_early(tmp_path):
    records, report = read_records(
        write_jsonl(tmp_path / "a.jsonl", [{"text": c} for c in "abcdef"]), limit=2
    )
    assert (len(records), report.rows) == (2, 2)


def test_prompts(tmp_path):
    turns = ROWS["messages"][0]["messages"]
    rows = [
        {"id": "x", "messages": turns[:1], "extra": 1},
        {"messages": turns},
        {"prompt": "Once"},
        {"text": "upon"},
        {"instruction": "Add", "input": "1 2"},
        {"prompt": turns[:1]},
    ]
    prompts, report = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows))
    assert prompts[0].id == "x"
    assert prompts[0].row["extra"] == 1
    question = QA[:1]
    assert [p.messages for p in prompts] == [question, question, None, None, chat("u:Add\n1 2"), question]
    assert [p.text for p in prompts] == [None, None, "Once", "upon", None, None]
    assert len({p.id for p in prompts}) == 6
    assert report.records == 6


def test_bad_prompts(tmp_path):
    rows = [{"prompt": "a"}] * 3 + [
        {"prompt": ""},
        {"answer": "b"},
        {"messages": [{"role": "system", "content": "a"}]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts, report = read_prompts(path, max_bad_rows=0.5)
    assert len(prompts) == 3
    assert set(report.rejects) == {"empty prompt", "unknown columns (answer)", "no user turn"}
    with pytest.raises(UserError, match="3 of 6 rows"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "rows", "records", "rejected", "skipped"),
    [
        ("llama-factory/dpo_en_demo.json", 300, 300, 0, 0),
        ("llama-factory/kto_en_demo.json", 300, 150, 0, 150),
        ("hh-rlhf/harmless-base-test.jsonl.gz", 2312, 2300, 12, 0),
    ],
)
def test_published_files(name, rows, records, rejected, skipped):
    path = shared(name)
    if path is None:
        pytest.skip(f"{name} is not beside the checkout")
    found, report = read_records(path)
    assert (report.rows, len(found), report.rejected) == (rows, records, rejected)
    assert sum(count for count, _ in report.skipped.values()) == skipped
    assert {r.form for r in found} == {"messages"}
