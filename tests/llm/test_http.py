"""Whom an endpoint's answers reach, and what its failures become."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import Completion, Reply, Request, answers
from jaxalign.llm.http import HttpLLM, _retry_after, open_http
from jaxalign.llm.settings import HttpConfig
from tests.llm.fake_endpoint import Answer, Call, Fake, echo, in_turn, refused, said


def _close(stream: Any) -> None:
    stream.close()


QUICK = {"max_wait": 0.02, "timeout": 5.0}


def opened(server: Fake, **keys: Any) -> HttpLLM:
    return open_http(server.name, HttpConfig.model_validate(QUICK | keys))


def turns(text: str, **keys: Any) -> Request:
    return Request((Message("user", text),), **keys)


def numbered(count: int) -> list[Request]:
    return [turns(f"q{i}", seed=i) for i in range(count)]


def texts(replies: list[Reply]) -> list[list[str]]:
    return [[c.text for c in reply.completions] for reply in replies]


def test_turns_and_plain_strings_have_their_own_paths(server):
    system = Request((Message("system", "s"), Message("user", "hello there")), stop=("\n",), seed=7)
    plain = Request("once upon", temperature=0.0, top_p=0.9, max_tokens=3, seed=8)
    first, second = answers(opened(server, concurrency=1), [system, plain])
    assert [c.path for c in server.calls] == ["/v1/chat/completions", "/v1/completions"]
    assert server.calls[0].body == {
        "model": "toy",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello there"}],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 256,
        "seed": 7,
        "stop": ["\n"],
    }
    sampling = {"temperature": 0.0, "top_p": 0.9, "max_tokens": 3, "seed": 8}
    assert server.calls[1].body == {"model": "toy", "prompt": "once upon"} | sampling
    assert first == Reply((Completion("hello there 7", "stop", 3),), 10)
    assert second == Reply((Completion("once upon 8", "stop", 3),), 10)
    assert "Authorization" not in server.calls[0].headers


def test_a_cut_answer_says_so_and_a_withheld_one_is_a_fault(server):
    server.script = in_turn(
        [said("a b", finish="length"), said("a", "b", finish="content_filter"), said("", finish="tool_calls")]
    )
    cut, withheld, other = answers(opened(server, concurrency=1), numbered(3))
    assert cut.completions == (Completion("a b", "length", 2),)
    assert withheld == Reply(fault="withheld by the endpoint's content filter")
    assert other.completions[0].finish == "stop"


def test_several_answers_come_at_once_and_share_their_tokens(server):
    server.script = lambda call: said("one", "one two three", "x" * 40, tokens=19)
    llm = opened(server)
    reply = answers(llm, [turns("q", n=3)])[0]
    assert [c.text for c in reply.completions] == ["one", "one two three", "x" * 40]
    assert sum(c.tokens for c in reply.completions) == 19
    assert reply.completions[2].tokens > reply.completions[1].tokens > reply.completions[0].tokens
    assert server.calls[0].body["n"] == 3
    assert (llm.endpoint.limits.sent, llm.endpoint.limits.tokens) == (1, 29)


def test_missing_answers_are_asked_for_with_other_seeds(server):
    reply = answers(opened(server), [turns("q", n=3, seed=40)])[0]
    assert [c.text for c in reply.completions] == ["q 40", "q 41", "q 42"]
    assert [c.body.get("n", 1) for c in server.calls] == [3, 2, 1]
    assert reply.prompt_tokens == 10


def test_an_endpoint_that_refuses_several_is_asked_one_by_one(server):
    server.script = lambda call: refused(400, "'n' must be 1") if "n" in call.body else echo(call)
    assert texts(answers(opened(server), [turns("q", n=2, seed=5)])) == [["q 5", "q 6"]]
    server.script = lambda call: refused(400, "filtered")
    assert answers(opened(server), [turns("q", n=2)])[0] == Reply(fault="400: filtered")


def test_what_may_pass_is_repeated(server):
    server.script = in_turn(
        [refused(500, "a"), refused(502, "b"), Answer(broken=True), refused(429, "c"), refused(408, "d")]
    )
    llm = opened(server, concurrency=1)
    assert texts(answers(llm, numbered(2))) == [["q0 0"], ["q1 1"]]
    assert server.asked == ["q0"] * 6 + ["q1"]
    assert (llm.endpoint.limits.sent, llm.endpoint.limits.answered) == (7, 2)


@pytest.mark.parametrize(
    ("header", "least"), [("0.1", 0.3), (" 0 ", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)]
)
def test_retry_after_is_honoured(server, header, least):
    server.script = in_turn([refused(429, "slow", Retry_After=header)] * 3)
    start = time.monotonic()
    assert texts(answers(opened(server, max_wait=30.0), numbered(1))) == [["q0 0"]]
    assert least <= time.monotonic() - start < 4  # without the header it would be 1 + 2 + 4 s and more


def test_retry_after_is_cut_at_max_wait(server):
    server.script = in_turn([refused(503, "slow", Retry_After="3600")])
    start = time.monotonic()
    assert texts(answers(opened(server, max_wait=0.1), numbered(1))) == [["q0 0"]]
    assert 0.1 <= time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 09:28:30 +0200", 30.0),
        ("Wed, 21 Oct 2015 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
        ("", None),
    ],
)
def test_how_a_pause_is_read(header, seconds):
    assert _retry_after(header, datetime(2015, 10, 21, 7, 28, tzinfo=UTC)) == seconds


def test_a_request_that_hangs_is_sent_again(server):
    server.script = in_turn([Answer(delay=30)])
    start = time.monotonic()
    assert texts(answers(opened(server, timeout=0.2), numbered(1))) == [["q0 0"]]
    assert 0.2 <= time.monotonic() - start < 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_is_down_pauses_the_run_and_keeps_what_came(server, status):
    server.script = lambda call: echo(call) if call.number == 0 else refused(status, "no room")
    stream = opened(server, concurrency=1, retries=2).stream(numbered(5))
    assert texts([next(stream)[1]]) == [["q0 0"]]
    with pytest.raises(UserError, match=f"no usable answer: {status}: no room; 1 of 5 requests") as error:
        next(stream)
    assert error.value.status == 75
    assert "run the same command again" in error.value.remedy
    assert server.asked == ["q0", "q1", "q1", "q1"]


def test_an_endpoint_that_cannot_be_reached_pauses_the_run(server):
    llm = open_http("http://127.0.0.1:9/v1#toy", HttpConfig(max_wait=0.01, retries=1))
    with pytest.raises(UserError, match=r"ConnectError.* refused; 0 of 1 requests") as error:
        answers(llm, numbered(1))
    assert (error.value.status, error.value.place) == (75, "http://127.0.0.1:9/v1")


def test_one_request_that_always_fails_is_a_fault_while_others_are_answered(server):
    bad, slow = refused(500, "bad luck"), 0.02
    server.script = lambda call: bad if call.text == "q0" else Answer(echo(call).body, delay=slow)
    llm = opened(server, concurrency=2, retries=2, max_wait=0.15)  # 0.3 s in all, of the others' 1.2 s
    replies = answers(llm, numbered(60))
    assert replies[0] == Reply(fault="500: bad luck")
    assert texts(replies[1:]) == [[f"q{i} {i}"] for i in range(1, 60)]
    assert server.asked.count("q0") == 3


def test_a_limit_on_the_rate_is_never_the_fault_of_one_request(server):
    bad = refused(429, "slow")
    server.script = lambda call: bad if call.text == "q0" else Answer(echo(call).body, delay=0.02)
    with pytest.raises(UserError, match="no usable answer: 429: slow") as error:
        answers(opened(server, concurrency=2, retries=2, max_wait=0.15), numbered(60))
    assert error.value.status == 75


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"<html>" + b"busy " * 50, "an answer that is not JSON: '<html>" + "busy " * 14 + "busy'"),
        (b"\xff\xfe\xfa", "an answer that is not JSON"),
        ({"error": {"message": "odd"}}, """an answer without choices: '{"error": {"message": "odd"}}'"""),
        ({"choices": []}, "an answer without choices"),
        ({"choices": [{"index": 0}]}, "a choice without a text"),
        ([1], "an answer without choices: '[1]'"),
    ],
)
def test_garbage_is_asked_again_then_a_fault_that_shows_its_beginning(server, body, fault):
    server.script = in_turn([Answer(body), Answer(body)])
    assert texts(answers(opened(server, retries=2), numbered(1))) == [["q0 0"]]
    server.calls.clear()
    server.script = lambda call: Answer(body)
    reply = answers(opened(server, retries=2), numbered(1))[0]
    assert reply.fault.startswith(fault)
    assert len(reply.fault.partition(": ")[2]) <= 82
    assert len(server.calls) == 3


def test_what_an_endpoint_refuses_is_a_fault_of_that_request_alone(server):
    long = "This model's maximum context length is 8192 tokens"
    server.script = lambda call: refused(400, long) if call.text == "q1" else echo(call)
    replies = answers(opened(server), numbered(3))
    assert replies[1] == Reply(fault=f"400: {long}")
    assert texts(replies) == [["q0 0"], [], ["q2 2"]]
    assert server.asked.count("q1") == 1


@pytest.mark.parametrize(
    ("status", "key", "cause", "remedy"),
    [
        (401, "", r"it wants a key and there is none \(401: no\)", "JAXALIGN_API_KEY"),
        (401, "k" * 20, r"it refuses the key in JAXALIGN_API_KEY", "set JAXALIGN_API_KEY"),
        (402, "k" * 20, "it wants to be paid", "credit"),
        (403, "k" * 20, "the key in JAXALIGN_API_KEY may not use 'toy'", "another key, or a model"),
        (404, "", "no /chat/completions or no model 'toy'", "ends in /v1, and the name after '#'"),
        (308, "", "it redirects to http://elsewhere", "name that address"),
    ],
)
def test_what_all_requests_would_meet_ends_the_run(server, monkeypatch, status, key, cause, remedy):
    monkeypatch.setenv("JAXALIGN_API_KEY", key)
    server.script = lambda call: refused(status, "no", Location="http://elsewhere")
    with pytest.raises(UserError, match=cause) as error:
        answers(opened(server, concurrency=2), numbered(50))
    assert remedy in error.value.remedy
    assert (error.value.place, error.value.status) == (server.name.partition("#")[0], 2)
    assert len(server.calls) < 10


def test_answers_under_way_are_kept_when_the_run_ends(server):
    def script(call: Call) -> Answer:
        if call.text == "q1":
            return Answer(refused(401, "no").body, 401, delay=0.2)
        return Answer(echo(call).body, delay=0.5)

    server.script = script
    stream = opened(server, concurrency=2).stream(numbered(30))
    assert texts([next(stream)[1]]) == [["q0 0"]]
    with pytest.raises(UserError, match="it wants a key"):
        next(stream)
    assert sorted(server.asked) == ["q0", "q1"]


def test_a_budget_of_requests_stops_the_run_and_says_how_to_go_on(server):
    server.script = in_turn([refused(500, "x")])
    stream = opened(server, concurrency=2, max_requests=6).stream(numbered(20))
    came = []
    with pytest.raises(UserError, match=r"the budget max_requests is spent: 6 requests of 6; 5 of 20") as e:
        came.extend(iter(lambda: next(stream), None))
    assert e.value.status == 75
    assert "llm.http.max_requests" in e.value.remedy
    assert (len(came), len(server.calls)) == (5, 6)


def test_a_budget_of_tokens_spans_calls_and_needs_usage(server):
    llm = opened(server, concurrency=1, max_tokens_total=30)  # 12 tokens a request
    answers(llm, numbered(2))
    with pytest.raises(UserError, match=r"max_tokens_total is spent: 36 tokens of 30; 1 of 2") as error:
        answers(llm, numbered(2))
    assert error.value.status == 75
    server.script = lambda call: Answer({"choices": said("x").body["choices"]})
    with pytest.raises(UserError, match="does not tell how many tokens"):
        answers(opened(server, max_tokens_total=30), numbered(1))
    assert answers(opened(server), numbered(1))[0] == Reply((Completion("x"),))


def test_requests_are_under_way_together(server):
    eight = threading.Barrier(8, timeout=10)

    def script(call: Call) -> Answer:
        eight.wait()  # nobody goes on before eight are here
        return Answer(echo(call).body, delay=0.3)

    server.script = script
    start = time.monotonic()
    replies = answers(opened(server, concurrency=8), numbered(16))
    assert time.monotonic() - start < 2.4  # one after the other: 4.8 s
    assert server.most == 8
    assert texts(replies) == [[f"q{i} {i}"] for i in range(16)]


def test_replies_come_as_they_finish_and_do_not_depend_on_it(server):
    server.script = lambda call: Answer(echo(call).body, delay=0.3 if call.text == "q0" else 0.0)
    stream = opened(server, concurrency=4).stream(numbered(6))
    order = [index for index, reply in stream if texts([reply]) == [[f"q{index} {index}"]]]
    assert order[-1] == 0
    assert sorted(order) == list(range(6))


def test_a_pace_is_kept(server):
    start = time.monotonic()
    answers(opened(server, requests_per_minute=1200), numbered(9))
    assert 0.4 <= time.monotonic() - start < 3  # 8 pauses of 50 ms


def test_closing_early_drops_what_is_not_sent(server):
    server.script = lambda call: Answer(echo(call).body, delay=0.05)
    stream = opened(server, concurrency=2).stream(numbered(200))
    next(stream)
    start = time.monotonic()
    _close(stream)
    assert time.monotonic() - start < 1
    time.sleep(0.2)
    sent = len(server.calls)
    assert sent <= 6
    time.sleep(0.15)
    assert len(server.calls) == sent


def test_closing_early_ends_a_long_wait(server):
    server.script = lambda call: echo(call) if call.text == "q0" else refused(429, "x", Retry_After="60")
    stream = opened(server, concurrency=2, max_wait=60.0).stream(numbered(2))
    next(stream)
    before = {t for t in threading.enumerate() if t.name.startswith("llm")}
    _close(stream)
    for thread in before:
        thread.join(2)
    assert not any(t.is_alive() for t in before)


KEY = 'sk-planted/"9f8e7d6c5b4a'


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JAXALIGN_API_KEY", f" {KEY}\n")

    def tells(call: Call) -> str:
        return f"you sent {call.headers['Authorization']}; " + "x" * 290 + KEY

    scripts = {
        "fault": lambda call: refused(400, tells(call)),
        "plain": lambda call: Answer(("no JSON: " + tells(call)).encode()),
        "cut": lambda call: Answer(b"." * 70 + KEY.encode()),
        "long": lambda call: Answer(b"x" * 290 + KEY.encode(), 400),
        "escaped": lambda call: Answer(tells(call).replace("/", "\\/").encode(), 400),
        "answer": lambda call: said(tells(call)),
        "end": lambda call: refused(401, tells(call)),
        "down": lambda call: refused(503, tells(call)),
        "moved": lambda call: Answer({}, 302, {"Location": f"http://x/{KEY}"}),
    }
    shown = {}
    for name, script in scripts.items():
        server.script = script
        llm = opened(server, retries=1)
        try:
            shown[name] = repr(answers(llm, numbered(1)))
        except UserError as error:
            shown[name] = f"{error} {error.cause} {error.remedy}"
        shown[name] += f"{llm!r} {llm.identity} {llm.name}"
    assert all(call.headers["Authorization"] == f"Bearer {KEY}" for call in server.calls)
    assert len(server.calls) == 12  # three of them asked twice
    shown["log"] = caplog.text + "".join(capfd.readouterr())
    for name, text in shown.items():
        assert "planted" not in text, name
        assert "9f8e" not in text, name
    assert all("***" in shown[name] for name in ("fault", "plain", "escaped", "answer", "end", "down"))
    assert "POST" in shown["log"]


def test_a_placeholder_of_a_key_may_stand_in_answers(server, monkeypatch):
    monkeypatch.setenv("JAXALIGN_API_KEY", "EMPTY")
    server.script = lambda call: said("an EMPTY room") if call.text == "q0" else refused(400, "EMPTY!")
    replies = answers(opened(server), numbered(2))
    assert texts(replies) == [["an EMPTY room"], []]
    assert replies[1].fault == "400: ***!"


def test_which_key_goes_where(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.delenv("JAXALIGN_API_KEY", raising=False)

    def sent(name: str) -> str | None:
        return open_http(name, HttpConfig()).endpoint.client.headers.get("Authorization")

    assert sent("https://api.openai.com/v1#m") == "Bearer sk-openai"
    assert sent("https://api.openai.com.example.org/v1#m") is None
    assert sent("http://localhost:8000/v1#m") is None
    monkeypatch.setenv("JAXALIGN_API_KEY", "mine")
    assert sent("https://api.openai.com/v1#m") == "Bearer mine"
    assert sent("http://localhost:8000/v1#m") == "Bearer mine"
    monkeypatch.setenv("JAXALIGN_API_KEY", "two words-secret")
    with pytest.raises(UserError, match="JAXALIGN_API_KEY: the key holds blanks") as error:
        sent("http://localhost:8000/v1#m")
    assert "secret" not in str(error.value)


def test_the_name_becomes_the_identity():
    llm = open_http("HTTPS://Example.org:8443/Api/v1/#org/model@2", HttpConfig())
    assert llm.identity == llm.name == "https://example.org:8443/Api/v1#org/model@2"
    assert open_http("http://[::1]:80/v1#m", HttpConfig()).identity == "http://[::1]:80/v1#m"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("http://me:hush@host/v1#m", "a user, a password"),
        ("http://me@host/v1#m", "a user, a password"),
        ("http://host/v1?key=hush#m", "a query"),
        ("http://host:hush/v1#m", "cannot be read"),
        ("http://host/v1", "names no endpoint with a model"),
        ("http:///v1#m", "names no endpoint with a model"),
    ],
)
def test_addresses_that_are_refused(name, cause):
    with pytest.raises(UserError, match=cause) as error:
        open_http(name, HttpConfig())
    assert "hush" not in str(error.value)
    assert "http(s)://host/v1#model" in error.value.remedy
