"""The endpoints, over a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxalign.data.records import Message
from jaxalign.sampling.forced import forced
from jaxalign.types import SamplingParams
from tests.serve.rig import CHAT, LIMIT, TEXT, app, chat, engine, events, parts, text

TestClient = pytest.importorskip("starlette.testclient", reason="needs the extra serve").TestClient


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with TestClient(app()) as found:
        yield found


def ask(client: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: Any, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


def tokens_of(prompt: str) -> list[int]:
    return parts()[2].encode_prompt((Message("user", prompt),))


def test_health_and_models(client: Any) -> None:
    assert client.get("/health").json() == {"status": "ok", "requests": 0}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", LIMIT)


def test_a_chat_answer_is_what_the_engine_says(client: Any) -> None:
    prompt = tokens_of("hello")
    (want,) = engine().generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0]
    found = ask(client, CHAT, chat())
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text}
    assert (choice["finish_reason"], choice["logprobs"]) == (want.finish, None)
    counts = (len(prompt), len(want.tokens))
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert found["usage"] == dict(zip(names, (*counts, sum(counts)), strict=True))
    assert (found["object"], found["model"], found["id"][:9]) == ("chat.completion", "tiny", "chatcmpl-")


def test_turns_may_come_in_parts(client: Any) -> None:
    pieces = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = chat() | {"messages": [{"role": "user", "content": pieces}]}
    assert ask(client, CHAT, body)["choices"] == ask(client, CHAT, chat())["choices"]


def test_prompts_of_a_list_are_answered_n_times_each_in_order(client: Any) -> None:
    asked = {"temperature": 1.0, "seed": 5, "n": 2}
    found = ask(client, TEXT, text(["hello", "a world"], **asked))
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    apart = [ask(client, TEXT, text(p, **asked))["choices"] for p in ("hello", "a world")]
    assert texts == [choice["text"] for choices in apart for choice in choices]
    assert len(set(texts)) == 4


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 3, "n": 2}])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (TEXT, text)])
def test_a_stream_adds_up_to_the_whole_answer(client: Any, path: str, body: Any, fields: Any) -> None:
    asked = body(max_tokens=40, **fields)
    whole = ask(client, path, asked)
    answer = client.post(path, json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, last = events(answer.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in found)
    assert len({(part["id"], part["created"]) for part in [*found, last]}) == 1
    for choice in whole["choices"]:
        mine = [c for part in found for c in part["choices"] if c["index"] == choice["index"]]
        pieces = [c["delta"].get("content", "") if path == CHAT else c["text"] for c in mine]
        assert "".join(pieces) == (choice["message"]["content"] if path == CHAT else choice["text"])
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["finish_reason"]
        assert len([piece for piece in pieces if piece]) > 2  # it did not come in one piece


def test_a_stop_string_is_neither_in_the_answer_nor_in_the_stream(client: Any) -> None:
    asked = {"max_tokens": 40, "temperature": 1.0, "seed": 11}
    whole = ask(client, TEXT, text(**asked))["choices"][0]["text"]
    stop = next(whole[i : i + 2] for i in range(12, 38) if "\ufffd" not in whole[i : i + 2])
    (short,) = ask(client, TEXT, text(**asked, stop=["never", stop]))["choices"]
    assert (short["text"], short["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    found = events(client.post(TEXT, json=text(**asked, stop=stop, stream=True)).text)
    assert "".join(part["choices"][0]["text"] for part in found) == short["text"]


def test_company_changes_nothing(client: Any) -> None:
    bodies = [
        chat("hello " * i, temperature=i % 3 / 2, seed=i, max_tokens=6 + 3 * i, n=1 + i % 2)
        for i in range(10)
    ]
    alone = [ask(client, CHAT, body)["choices"] for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda body: ask(client, CHAT, body)["choices"], bodies))
    assert together == alone
    assert client.get("/health").json()["requests"] == 0


def test_without_a_seed_answers_differ_and_with_one_they_do_not(client: Any) -> None:
    say = lambda **seed: ask(client, TEXT, text(temperature=1.0, **seed))["choices"][0]["text"]  # noqa: E731
    assert say() != say()
    assert say(seed=7) == say(seed=7)
    assert say(seed=7) != say(seed=8)


def test_echo_gives_the_prompt_s_own_log_probs(client: Any) -> None:
    prompt = "hello world, a w\u00f6rld"
    body = text(prompt, max_tokens=0, echo=True, logprobs=3)
    found = ask(client, TEXT, body)
    (choice,) = found["choices"]
    got, tokens = choice["logprobs"], parts()[2].encode(prompt)
    assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
    assert found["usage"]["completion_tokens"] == 0
    (want,) = forced(engine(), [tokens])
    assert got["token_logprobs"][0] is None
    np.testing.assert_allclose(got["token_logprobs"][1:], want.logp[1:], atol=1e-5)
    assert got["text_offset"][:4] == [0, 5, 8, 9]  # "hello", " wo", "r", "l"
    assert [prompt[at:][: len(t)] for at, t in zip(got["text_offset"], got["tokens"], strict=True)] == got[
        "tokens"
    ]
    assert got["top_logprobs"][0] is None
    for top, own, piece in zip(got["top_logprobs"][1:], want.logp[1:], got["tokens"][1:], strict=True):
        assert len(top) >= 1
        assert top[piece] == pytest.approx(own, abs=1e-5)
    assert (
        got
        == ask(client, TEXT, text(["a", prompt], **{k: body[k] for k in ("max_tokens", "echo", "logprobs")}))[
            "choices"
        ][1]["logprobs"]
    )


def test_echo_before_an_answer(client: Any) -> None:
    plain = ask(client, TEXT, text(logprobs=0))["choices"][0]
    for fields in ({}, {"stream": True}):
        answer = client.post(TEXT, json=text(logprobs=0, echo=True, **fields))
        (both,) = events(answer.text)[0]["choices"] if fields else answer.json()["choices"]
        assert both["text"] == "hello" + plain["text"]
        assert both["logprobs"]["token_logprobs"][0] is None
        assert both["logprobs"]["text_offset"][:2] == [0, 5]
        mine, theirs = both["logprobs"]["token_logprobs"][1:], plain["logprobs"]["token_logprobs"]
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
        assert both["logprobs"]["top_logprobs"] is None
    found = events(client.post(TEXT, json=text(echo=True, stream=True)).text)
    assert "".join(part["choices"][0]["text"] for part in found) == "hello" + plain["text"]


def test_log_probs_of_a_chat_come_with_their_alternatives(client: Any) -> None:
    (choice,) = ask(client, CHAT, chat(logprobs=True, top_logprobs=5))["choices"]
    prompt = tokens_of("hello")
    (sample,) = engine().generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0]
    content = choice["logprobs"]["content"]
    np.testing.assert_allclose([c["logprob"] for c in content], sample.logp, atol=1e-4)
    for one in content:
        values = [alternative["logprob"] for alternative in one["top_logprobs"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert one["top_logprobs"][0] | {"top_logprobs": 0} == one | {"top_logprobs": 0}  # it was greedy
    spoken = [c for c in content if c["bytes"] is not None]
    assert all(bytes(c["bytes"]).decode() == c["token"] for c in spoken)
    (plain,) = ask(client, CHAT, chat(logprobs=True))["choices"]
    assert all(c["top_logprobs"] == [] for c in plain["logprobs"]["content"])
    (part,) = [
        p["choices"][0]
        for p in events(client.post(CHAT, json=chat(logprobs=True, top_logprobs=5, stream=True)).text)
        if p["choices"][0]["logprobs"]
    ]
    assert (part["delta"]["content"], part["logprobs"]) == (choice["message"]["content"], choice["logprobs"])


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, chat(temprature=1), "temprature", "unknown field; did you mean 'temperature'?"),
        (CHAT, chat(temperature="hot"), "temperature", "valid number"),
        (CHAT, chat(temperature=-1), "temperature", "greater than or equal to 0"),
        (CHAT, chat(top_p=0), "top_p", "greater than 0"),
        (CHAT, chat(n=0), "n", "greater than or equal to 1"),
        (CHAT, chat(stop=[1]), "stop", "stop[0]: input should be a valid string"),
        (CHAT, chat(stop=""), "stop", "at least 1 character"),
        (CHAT, chat(frequency_penalty=0.5), "frequency_penalty", "less than or equal to 0"),
        (CHAT, chat(top_logprobs=21), "top_logprobs", "less than or equal to 20"),
        (CHAT, chat(messages=[]), "messages", "at least 1 item"),
        (CHAT, chat(messages=[{"role": "bot", "content": "x"}]), "messages[0].role", "'system'"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content", "is needed"),
        (CHAT, chat(max_tokens=LIMIT), "messages", f"pass the limit of {LIMIT}"),
        (CHAT, chat("hello " * LIMIT), "messages", f"pass the limit of {LIMIT}"),
        (CHAT, {"messages": chat()["messages"]}, "model", "is needed"),
        (TEXT, text(prompt=5), "prompt", "valid string"),
        (TEXT, text(prompt=""), "prompt", "no tokens"),
        (TEXT, text(max_tokens=0), "max_tokens", "with echo"),
        (TEXT, text("x" * LIMIT), "prompt", f"pass the limit of {LIMIT}"),
        (TEXT, text(stream=1), "stream", "valid boolean"),
        (TEXT, [], None, "not a JSON object"),
    ],
)
def test_what_is_wrong_is_named(client: Any, path: str, body: Any, param: str | None, words: str) -> None:
    error = refused(client, path, body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_a_prompt_that_is_too_long_says_so_by_its_code(client: Any) -> None:
    assert refused(client, TEXT, text("x" * LIMIT))["code"] == "context_length_exceeded"


def test_null_is_as_if_it_were_not_there(client: Any) -> None:
    nulls = dict.fromkeys(("seed", "stop", "user", "stream_options", "top_p", "logprobs"))
    assert ask(client, CHAT, chat(**nulls))["choices"] == ask(client, CHAT, chat())["choices"]


def test_without_max_tokens_a_chat_may_use_all_the_room(client: Any) -> None:
    found = ask(client, CHAT, chat(max_tokens=None))
    assert found["usage"]["total_tokens"] == LIMIT or found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] > 12


def test_other_models_paths_and_bodies_are_refused(client: Any) -> None:
    error = refused(client, CHAT, chat(model="gpt-4"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert client.post("/v1/nothing", json={}).status_code == 404
    assert client.get(CHAT).status_code == 405
    bad = client.post(CHAT, content=b"{")
    assert bad.status_code == 400
    assert "not JSON" in bad.json()["error"]["message"]


def test_a_key_is_asked_for_where_one_is_set() -> None:
    with TestClient(app(key="s3cret")) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            for answer in (
                client.get("/v1/models", headers=headers),
                client.post(CHAT, json={}, headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer s3cret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post(CHAT, json=chat(max_tokens=1), headers=right).status_code == 200
        assert client.get("/health").status_code == 200
