"""The command as a process of its own, on the real model, asked over a socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxalign.data.records import Message
from jaxalign.llm.base import Question, Request, answers
from jaxalign.llm.open import open_llm
from jaxalign.llm.settings import LLMConfig
from tests.serve.rig import CHAT, TEXT, events

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn", reason="needs the extra serve")

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
MAIN = "import sys; sys.argv[0] = 'jaxalign'; from jaxalign.cli import main; main()"
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "SERVE_TEST_KEY": "s3cret"}
QUESTIONS = [f"What is {n} plus {n}?" for n in range(10)]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """(a client, the process)."""
    words = ["serve", "-m", MODEL, "port=0", "dtype=f32", "api_key_env=SERVE_TEST_KEY"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"serving \S+ at (http://\S+)/v1\n", said)):
        line = process.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    headers = {"Authorization": "Bearer s3cret"}
    try:
        with httpx.Client(base_url=found[1], headers=headers, timeout=300, trust_env=False) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def chat(question: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": turns, "temperature": 0, "max_tokens": 24} | fields


def ask(client: Any, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(client: Any, question: str, **fields: Any) -> str:
    return ask(client, chat(question, **fields))["choices"][0]["message"]["content"]


def test_the_server_says_what_generate_writes(server: Any, tmp_path: Path) -> None:
    client, _ = server
    rows = [{"messages": [{"role": "user", "content": q}]} for q in QUESTIONS[:3]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", "-m", MODEL, "-d", "p.jsonl", "-o", "a.jsonl"]
    keys = ["temperature=0", "max_tokens=24", "dtype=f32"]
    subprocess.run([sys.executable, "-c", MAIN, *words, *keys], env=ENV, cwd=tmp_path, check=True)
    want = [json.loads(line)["completion"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [said(client, q) for q in QUESTIONS[:3]] == want
    assert "Paris" in said(client, "What is the capital of France?")


def test_a_stream_is_the_answer_in_parts(server: Any) -> None:
    client, _ = server
    body = chat("Name three colours.", max_tokens=40)
    with client.stream("POST", CHAT, json=body | {"stream": True}) as answer:
        parts = events("".join(answer.iter_text()))
    pieces = [part["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(pieces) == said(client, "Name three colours.", max_tokens=40)
    assert len([piece for piece in pieces if piece]) >= 3


def test_ten_at_once_are_faster_than_ten_in_turn(server: Any) -> None:
    client, _ = server
    stories = [f"Tell me a story about {n} birds." for n in range(2, 12)]

    def at_once() -> list[str]:
        with ThreadPoolExecutor(10) as pool:
            return list(pool.map(lambda q: said(client, q, max_tokens=48), stories))

    def in_turn() -> list[str]:
        return [said(client, q, max_tokens=48) for q in stories]

    times = {}
    for work in (at_once, in_turn, at_once, in_turn):  # the first ones compile
        start = time.monotonic()
        answers = work()
        times[work] = (time.monotonic() - start, answers)
    print(f"at once {times[at_once][0]:.2f} s, in turn {times[in_turn][0]:.2f} s")
    assert times[at_once][1] == times[in_turn][1]
    assert times[at_once][0] < 0.9 * times[in_turn][0]


def test_a_judge_and_a_reader_of_likelihoods_get_their_numbers(server: Any) -> None:
    client, _ = server
    body = chat("Is the sky blue? Say Yes or No.", max_tokens=1, logprobs=True, top_logprobs=20)
    (token,) = ask(client, body)["choices"][0]["logprobs"]["content"]
    assert token["top_logprobs"][0]["token"] == token["token"]
    assert {"Yes", "No"} & {one["token"] for one in token["top_logprobs"]}
    fields = {"max_tokens": 0, "echo": True, "logprobs": 0}
    texts = [f"The capital of France is {city}" for city in ("Paris", "Lisbon")]
    found = ask(client, {"model": MODEL, "prompt": texts, **fields}, TEXT)["choices"]
    sums = []
    for choice in found:
        columns = choice["logprobs"]
        own = zip(columns["text_offset"], columns["token_logprobs"], strict=True)
        sums.append(sum(logp for at, logp in own if at >= len("The capital of France is")))
    assert sums[0] > sums[1] + 2


def test_building_reads_it_as_it_reads_the_model_here(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of endpoints over a socket, beside the same weights in this process."""
    client, _ = server
    monkeypatch.setenv("JAXALIGN_API_KEY", "s3cret")
    config = LLMConfig(dtype="f32")
    far = open_llm(f"{str(client.base_url).rstrip('/')}/v1#{MODEL}", config, tmp_path / "asked.sqlite")
    near = open_llm(MODEL, config)
    requests = [Request((Message("user", q),), max_tokens=24, temperature=0) for q in QUESTIONS[:2]]
    requests += [Request((Message("user", QUESTIONS[2]),), max_tokens=16, temperature=1.0, seed=5)]
    texts = [[reply.completions[0].text for reply in answers(llm, requests)] for llm in (far, near)]
    assert texts[0] == texts[1]
    question = Question("The capital of France is", (" Paris", " Lisbon"))
    sums = []
    for llm in (far, near):
        (found,) = llm.likelihoods([question])
        assert not isinstance(found, str)
        sums.append([one.logp for one in found])
    assert sums[0] == pytest.approx(sums[1], abs=1e-3)


def test_what_cannot_be_answered_is_refused(server: Any) -> None:
    client, _ = server
    bad = client.post(CHAT, json=chat("x", temperature="hot"))
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "temperature")
    long = client.post(CHAT, json=chat("word " * 9000))
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert client.post(CHAT, json=chat("x", model="gpt-4")).status_code == 404
    assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401


def test_sigterm_lets_the_last_answer_come_to_its_end(server: Any) -> None:
    client, process = server
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(said, client, "Tell me a story.", max_tokens=64)
        while not client.get("/health").json()["requests"]:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert last.result()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read().endswith("stopped\n")
