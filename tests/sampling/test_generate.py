"""Files in, files out, on an engine that needs no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.data.readers import read_prompts
from jaxalign.errors import UserError
from jaxalign.sampling import chat as chat_module
from jaxalign.sampling import generate as module
from jaxalign.sampling.engine import Sample
from jaxalign.sampling.generate import answer_file, generate
from jaxalign.sampling.settings import GenerateConfig
from tests.data.toy import toy

CONFIG = GenerateConfig(max_tokens=8, temperature=0.5)


class Echo:
    """Answers every prompt with its number of tokens, the last request first; dies after `limit` answers."""

    max_length = 48

    def __init__(self, limit: int = 10**6) -> None:
        self.limit, self.asked, self.steps = limit, [], 0

    def stream(self, prompts: Any, params: Any, watch: Any = None) -> Any:
        for request in reversed(range(len(prompts))):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append((tuple(prompts[request]), params[request].seed))
            for number in reversed(range(params[request].n)):
                if watch:
                    watch(request, number, [5])
                text = f"{len(prompts[request])}/{number}"
                logp = np.array([-0.5, -0.25], np.float32)
                yield request, number, Sample(np.array([5, 2]), logp, logp, "stop", text)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Echo:
    echo = Echo()
    for where in (module, chat_module):
        monkeypatch.setattr(where, "load_engine", lambda model, config: (echo, toy(), "hash-" + model))
    return echo


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"id": "chat", "messages": [{"role": "user", "content": "hello"}], "kept": 1},
        {"text": "hello there"},
        {"id": "long", "text": "hello " * 60},
        {"id": "p", "prompt": "hello"},
        {"nothing": 1},
    ]
    rows += [{"id": str(i), "text": f"hello {'you ' * i}"} for i in range(9)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_keep_their_keys_and_their_order(
    engine: Echo, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "new" / "out.jsonl"
    report = generate("m", prompts, out, CONFIG.model_copy(update={"n": 2}))
    rows = read(out)
    assert [row["id"] for row in rows if row["id"] in ("chat", "p", "0", "8")] == ["chat", "p", "0", "8"]
    assert rows[0]["kept"] == 1
    assert [c["text"][-2:] for c in rows[0]["completions"]] == ["/0", "/1"]
    assert rows[0]["completion"] == rows[0]["completions"][0]["text"]
    assert rows[0]["completions"][0] | {"text": ""} == {
        "text": "",
        "tokens": 2,
        "finish": "stop",
        "logp": -0.75,
    }
    assert (report.rows, report.answered, sum(report.rejects.values())) == (13, 12, 2)
    said = capsys.readouterr().err
    assert "prompts.jsonl:3" in said
    assert "longer than 40 tokens" in said
    assert "12 of 13 rows answered" in said


def test_token_ids_are_kept_where_they_are_wanted(engine: Echo, prompts: Path, tmp_path: Path) -> None:
    asked, _ = read_prompts(prompts)
    answer_file("m", asked, tmp_path / "with.jsonl", CONFIG, ids=True)
    assert {tuple(c["ids"]) for row in read(tmp_path / "with.jsonl") for c in row["completions"]} == {(5, 2)}
    answer_file("m", asked, tmp_path / "without.jsonl", CONFIG)
    assert not any("ids" in c for row in read(tmp_path / "without.jsonl") for c in row["completions"])
    with pytest.raises(UserError, match="ids None -> True"):
        answer_file("m", asked, tmp_path / "without.jsonl", CONFIG, ids=True)


def test_a_killed_run_goes_on_where_it_stopped(engine: Echo, prompts: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate("m", prompts, whole, CONFIG)
    asked = set(engine.asked)
    engine.asked, engine.limit = [], 5
    with pytest.raises(KeyboardInterrupt):
        generate("m", prompts, out, CONFIG)
    assert len(read(out)) == 5
    out.write_bytes(out.read_bytes() + b'{"id": "half writ')
    engine.limit = 10**6
    report = generate("m", prompts, out, CONFIG)
    assert (report.answered, report.resumed) == (7, 5)
    assert len(engine.asked) == 12
    assert set(engine.asked) == asked  # the same seeds, whatever is left to do
    assert out.read_text() == whole.read_text()


def test_other_settings_do_not_mix_in_one_file(engine: Echo, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate("m", prompts, out, CONFIG)
    before = out.read_text()
    generate("m", prompts, out, CONFIG.model_copy(update={"batch_size": 3}))
    with pytest.raises(UserError, match=r"temperature 0\.5 -> 0\.7"):
        generate("m", prompts, out, CONFIG.model_copy(update={"temperature": 0.7}))
    with pytest.raises(UserError, match="model 'm' -> 'other'"):
        generate("other", prompts, out, CONFIG)
    assert out.read_text() == before
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(UserError, match="was not made by generate"):
        generate("m", prompts, foreign, CONFIG)


def test_chat_keeps_the_conversation_and_forgets_it_on_reset(engine: Echo) -> None:
    lines, said = iter(["hello", "", "hello", "/reset", "hello", "/quit", "never"]), []
    chat_module.chat("m", CONFIG, read=lambda _: next(lines), write=said.append)
    lengths = [len(prompt) for prompt, _ in engine.asked]
    assert lengths[1] > lengths[0] == lengths[2]
    text = "".join(said)
    assert "/reset" in text
    assert f"{lengths[1]}/0" in text or "/0" in text
    assert next(lines) == "never"


def test_chat_ends_with_the_input(engine: Echo) -> None:
    def read(_: str) -> str:
        raise EOFError

    chat_module.chat("m", CONFIG, read=read, write=lambda _: None)
    assert engine.asked == []
