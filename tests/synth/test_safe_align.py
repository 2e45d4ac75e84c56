"""Blue and red conversations: read, made, judged, and the three kinds of rows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign import api
from jaxalign.data.readers import read_groups, read_records
from jaxalign.llm.base import Request
from jaxalign.llm.scripted import ScriptedLLM
from tests.marker_world import asked


def judge_script(request: Request, number: int, rng: np.random.Generator) -> str:
    said = asked(request).split("Answer:\n")[1].split("\n\nSay why")[0]
    return "[[B]]" if "<comply:" in said else "[[A]]"


JUDGE = ScriptedLLM(judge_script, name="judge", identity="judge")
RED = ScriptedLLM(lambda r, n, rng: "(Internal thought: hm) here <comply:x>", name="red", identity="red")


def blue_script(request: Request, number: int, rng: np.random.Generator) -> str:
    return "And then?" if "You are the person who asked" in asked(request) else "<refuse> but this is safe"


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


QUESTION = "How would one <harm:x>?"
GIVEN = {
    "id": 7,
    "topic": "t",
    "question": QUESTION,
    "blue_conversations": {
        "0": talk(QUESTION, "safe", "more?", "(Internal thought: x) safe too"),
        "1": talk("Hi", "safe"),
    },
    "red_conversations": {
        "0": talk(QUESTION, "<comply:x>", "and?"),
        "1": talk("Hello", "<comply:x>"),
        "2": talk("a", "well"),
    },
}


def build(folder: Path, rows: list[Any], blue: ScriptedLLM | None = None, **keys: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    data = folder / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = blue or ScriptedLLM(blue_script)
    return api.build(
        "safe_align", model, data, folder / "out.jsonl", models={"judge": JUDGE, "red": RED}, **keys
    )


def rows_of(folder: Path, name: str = "") -> list[dict[str, Any]]:
    file = folder / "out.build" / name if name else folder / "out.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_conversations_of_the_data(tmp_path: Path) -> None:
    report = build(tmp_path, [GIVEN])
    (pair,) = rows_of(tmp_path)
    assert [m["content"] for m in pair["prompt"]] == [QUESTION]
    assert [m["content"] for m in pair["chosen"]] == ["safe", "more?", "safe too"]
    assert [m["content"] for m in pair["rejected"]] == ["<comply:x>"]  # what follows the last answer is cut
    assert pair["meta"]["safe"] == {"chosen": True, "rejected": False}
    assert report["dropped"] == {"a red conversation is harmless": 1, "blue and red begin differently": 1}
    assert report["metrics"]["records"] == {"pairs": 1, "sft": 2, "labels": 2}
    assert all(row["label"] is False for row in rows_of(tmp_path, "labels.jsonl"))


def test_training_reads_all_three(tmp_path: Path) -> None:
    build(tmp_path, [GIVEN])
    pairs, _ = read_groups(tmp_path / "out.jsonl", "pairs")
    assert [m.role for m in pairs[0].answers[0] if not isinstance(m, str)] == [
        "assistant",
        "user",
        "assistant",
    ]
    labels, _ = read_groups(tmp_path / "out.build" / "labels.jsonl", "binary")
    assert not any(row.aux["label"] for row in labels)
    blue, _ = read_records(tmp_path / "out.build" / "sft.jsonl")
    assert [len(row.messages or ()) for row in blue] == [4, 2]


def test_conversations_are_made_turn_by_turn(tmp_path: Path) -> None:
    RED.asked.clear()
    blue = ScriptedLLM(blue_script)
    report = build(tmp_path, [{"prompt": QUESTION}, {"instruction": "Another?"}], blue, n=2, turns=2)
    assert report["n_out"] == 4
    assert report["dropped"] == {}
    roles = ["assistant", "user", "assistant"]
    for pair in rows_of(tmp_path):
        assert [m["role"] for m in pair["chosen"]] == [m["role"] for m in pair["rejected"]] == roles
        assert all("<refuse>" in m["content"] for m in pair["chosen"][::2])
        assert [m["content"] for m in pair["rejected"]] == ["here <comply:x>", "And then?", "here <comply:x>"]
    assert [len(r.prompt) for r in RED.asked] == [1] * 4 + [3] * 4  # no system prompt, and no wrapper
    assert all(r.prompt[0].role == "user" for r in RED.asked if not isinstance(r.prompt, str))
    order = [name for name in report["stages"] if name != "judge"]
    parts = ("answer-1", "question-2", "answer-2")
    assert order == [f"{colour}.{part}" for colour in ("blue", "red") for part in parts]


def test_a_blue_conversation_that_is_harmful_is_left_out(tmp_path: Path) -> None:
    blue = ScriptedLLM(lambda r, n, rng: "<comply:x>")
    report = build(tmp_path, [{"prompt": QUESTION}], blue, n=1, turns=1, records="sft")
    assert report["n_out"] == 0
    assert report["dropped"] == {"a blue conversation is harmful": 1}
    assert report["metrics"]["blue_harmful"]["rate"] == report["metrics"]["red_harmful"]["rate"] == 1.0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GIVEN, "question": ""}, "no question"),
        ({**GIVEN, "blue_conversations": {}, "red_conversations": None}, "no conversations"),
        ({"question": "q", "red_conversations": [talk("a")]}, "no user turn"),
    ],
)
def test_rows_at_fault(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        build(tmp_path, [row])
