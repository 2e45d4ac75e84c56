"""A stage of a build over an endpoint that breaks: it goes on, and leaves what it would have left."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Question, Request
from jaxalign.llm.cache import Cached
from jaxalign.llm.http import open_http
from jaxalign.llm.settings import HttpConfig
from jaxalign.synth.stage import Ask, Choose, Outcome, Stage
from tests.llm.fake_endpoint import Answer, Call, Fake, refused, said

ITEMS = 40
HTTP = HttpConfig(max_wait=0.005, retries=20, concurrency=4, timeout=5)


def model(call: Call) -> Answer:
    """A function of prompt and seed; every fourth answer cannot be understood."""
    draw = random.Random(f"{call.text} {call.body['seed']}")
    return said("..." if draw.random() < 0.25 else f"{call.text} has {draw.randrange(100)}")


def parse(completions: tuple[Completion, ...]) -> tuple[int | None, str]:
    word = completions[0].text.split()[-1]
    return (int(word), "") if word.isdigit() else (None, "no number")


def run(server: Fake, folder: Path, cache: Path | None = None) -> Outcome:
    items = [Ask(f"i{k}", Request((Message("user", f"item {k}"),)), parse) for k in range(ITEMS)]
    llm = open_http(f"{server.url}/v1#toy", HTTP)
    return Stage("numbers", folder, llm if cache is None else Cached(llm, cache)).ask(items)


def left(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def shaky(call: Call) -> Answer:
    """Every third request fails, each in another way."""
    failures = [refused(500, "x"), Answer(broken=True), Answer(b"<html>"), refused(429, "x", Retry_After="0")]
    return failures[call.number // 3 % 4] if call.number % 3 == 0 else model(call)


def dying(after: int) -> Callable[[Call], Answer]:
    return lambda call: shaky(call) if call.number < after else refused(503, "gone")


@pytest.mark.parametrize("kept", [False, True])
def test_a_stage_over_an_endpoint_that_breaks_ends_byte_identical(server, tmp_path, kept):
    server.script = model
    whole = run(server, tmp_path / "whole")
    asked = len(server.calls)
    assert ITEMS < asked == whole.attempts
    cache = tmp_path / "cache.sqlite" if kept else None
    for after in (25, 30):
        server.calls.clear()
        server.script = dying(after)
        with pytest.raises(UserError, match=r"no usable answer: 503: gone; \d+ of \d+ requests") as error:
            run(server, tmp_path / "broken", cache)
        assert error.value.status == 75
    done = len((tmp_path / "broken" / "numbers.jsonl").read_text().splitlines())
    assert 0 < done < ITEMS
    server.calls.clear()
    server.script = shaky
    assert run(server, tmp_path / "broken", cache) == whole
    assert left(tmp_path / "broken") == left(tmp_path / "whole")
    assert len(set(server.asked)) <= ITEMS - done
    server.calls.clear()
    run(server, tmp_path / "broken", cache)
    assert server.calls == []


def test_choices_of_a_stage_come_from_the_endpoint(server, tmp_path):
    def script(call: Call) -> Answer:
        likely = "A" if call.text == "q0" else "B"
        top = [{"token": t, "logprob": -0.1 if t == likely else -2.4} for t in "AB"]
        logprobs = {"content": [top[0] | {"top_logprobs": top}]}
        return Answer({"choices": [{"message": {"content": "A"}, "logprobs": logprobs}]})

    server.script = script
    items = [Choose(f"i{k}", Question((Message("user", f"q{k}"),), ("A", "B"))) for k in range(2)]
    stage = Stage("choices", tmp_path, open_http(f"{server.url}/v1#toy", HTTP))
    values = stage.choose(items).values
    assert values["i0"][0] - values["i0"][1] == pytest.approx(2.3)
    assert values["i1"][0] - values["i1"][1] == pytest.approx(-2.3)
