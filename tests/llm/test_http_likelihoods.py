"""Log-probs that an endpoint tells: of single tokens after turns, of whole texts by echo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.llm.base import Likelihood, Question, choice_logprobs
from jaxalign.llm.http import HttpLLM, open_http
from jaxalign.llm.settings import HttpConfig
from tests.llm.fake_endpoint import Answer, Call, Fake, refused


def opened(server: Fake, **keys: Any) -> HttpLLM:
    return open_http(server.name, HttpConfig.model_validate({"max_wait": 0.01, "retries": 1} | keys))


def shares(found: list[Likelihood] | str) -> list[float]:
    """Probabilities of what could be told."""
    assert not isinstance(found, str), found
    assert all(f.tokens == 1 for f in found)
    return [math.exp(f.logp) for f in found]


def ask(text: str, *options: str) -> Question:
    return Question((Message("user", text),), options)


def next_token(known: Mapping[str, float], sampled: str = "") -> Answer:
    """The likeliest tokens with their probabilities; the sampled one may stand beside the list."""
    top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in known.items()]
    first = {"token": sampled or top[0]["token"], "logprob": top[0]["logprob"]}
    if sampled:
        top = top[1:]
    choice = {"message": {"content": "x"}, "logprobs": {"content": [first | {"top_logprobs": top}]}}
    return Answer({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 1}})


def echoed(tokens: Sequence[str], logps: Sequence[float | None], text: str = "") -> Answer:
    """A text that is sent back with its tokens."""
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    logprobs = {"tokens": tokens, "token_logprobs": logps, "text_offset": offsets, "top_logprobs": None}
    return Answer({"choices": [{"text": text or "".join(tokens), "logprobs": logprobs}]})


def test_one_request_scores_all_options_and_adds_their_spellings(server):
    server.script = lambda call: next_token({"A": 0.5, " A": 0.1, "B": 0.2, "B\n": 0.05, "the": 0.1})
    found = opened(server).likelihoods([ask("which?", "A", " B")])[0]
    assert shares(found) == pytest.approx([0.6, 0.25])
    assert len(server.calls) == 1
    body = server.calls[0].body
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    # what a judge reads of it: 0.6 / 0.85
    chosen = choice_logprobs(opened(server), [ask("which?", "A", "B")])[0]
    assert not isinstance(chosen, str)
    assert math.exp(chosen[0]) == pytest.approx(0.6 / 0.85)


def test_a_token_that_is_sampled_outside_the_list_counts_and_one_in_both_counts_once(server):
    server.script = lambda call: next_token({"Z": 0.01, "A": 0.5}, sampled="Z")
    found = opened(server).likelihoods([ask("which?", "A", "Z")])[0]
    assert shares(found) == pytest.approx([0.5, 0.01])
    server.script = lambda call: next_token({"A": 0.5, "Z": 0.01})
    found = opened(server).likelihoods([ask("which?", "A", "Z")])[0]
    assert shares(found) == pytest.approx([0.5, 0.01])


def test_what_cannot_be_told_has_a_reason_of_its_own(server):
    answers = {
        "q0": next_token({"A": 0.5}),
        "q1": refused(400, "context too long"),
        "q2": next_token({"A": 0.5, " A": 0.1}),
        "q3": Answer({"choices": [{"message": {}, "logprobs": {"content": []}}]}),
        "q4": Answer({"choices": [{"message": {}, "logprobs": {"content": ["x"]}}]}),
        "q5": next_token({"A": 0.5, "B": 0.5}),
    }
    server.script = lambda call: answers[call.text]
    options = {"q2": ("A", " A")}
    questions = [ask(text, *options.get(text, ("A", "B"))) for text in answers]
    found = opened(server).likelihoods(questions)
    assert found[:4] == [
        "'B' is not among the 20 likeliest next tokens",
        "400: context too long",
        "two options differ by blanks alone",
        "an answer that ends before its first token",
    ]
    assert str(found[4]).startswith("log-probs that cannot be read: ")
    assert shares(found[5]) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "answer",
    [
        Answer({"choices": [{"message": {"content": "A"}, "logprobs": None}]}),
        refused(400, "logprobs are not supported by this model"),
    ],
)
def test_an_endpoint_without_log_probs_is_refused(server, answer):
    server.script = lambda call: answer
    with pytest.raises(UserError, match=r"likelihoods: it.* log-?probs") as error:
        opened(server).likelihoods([ask("which?", "A")])
    assert error.value.remedy == "take a model on this machine"


def test_plain_text_is_scored_whole_by_echo(server):
    logps = {" it is": [-0.5, -0.25], " no": [-3.0]}

    def script(call: Call) -> Answer:
        option = call.text.removeprefix("Well, ")
        tokens = [" " + word for word in option.split()]
        return echoed(["Well", ",", *tokens], [None, -9.0, *logps[" " + option]])

    server.script = script
    found = opened(server).likelihoods([Question("Well,", (" it is", " no"))])[0]
    assert found == [Likelihood(-0.75, 2), Likelihood(-3.0, 1)]
    assert {c.path for c in server.calls} == {"/v1/completions"}
    assert server.calls[0].body == {
        "model": "toy",
        "prompt": "Well, it is",
        "echo": True,
        "max_tokens": 0,
        "logprobs": 0,
    }


def test_the_letters_of_a_bos_move_the_border(server):
    server.script = lambda call: echoed(["<s>", "ab", "cd", "ef"], [None, -1.0, -2.0, -4.0], "abcdef")
    assert opened(server).likelihoods([Question("abcd", ("ef",))]) == [[Likelihood(-4.0, 1)]]
    assert opened(server).likelihoods([Question("ab", ("cdef",))]) == [[Likelihood(-6.0, 2)]]


@pytest.mark.parametrize(
    ("prompt", "option", "reason"),
    [
        ("abc", "def", "the option does not begin with a token of its own"),
        ("", "abcdef", "its first token has no log-prob"),
        ("abcdef", "", "an empty option"),
    ],
)
def test_texts_that_cannot_be_told_apart_have_a_reason(server, prompt, option, reason):
    server.script = lambda call: echoed(["ab", "cd", "ef"], [None, -2.0, -4.0])
    assert opened(server).likelihoods([Question(prompt, (option,))]) == [reason]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (refused(400, "echo is not supported"), r"it refuses to tell log-probs \(400: echo is not"),
        (refused(422, "max_tokens must be at least 1"), "it refuses to tell log-probs"),
        (Answer({"choices": [{"text": " and on", "logprobs": None}]}), r"does not repeat .* \(echo\)"),
        (echoed(["a", "b", "c"], [None, -1.0, -1.0]), r"does not repeat .* \(echo\)"),
    ],
)
def test_an_endpoint_without_echo_is_refused(server, answer, cause):
    server.script = lambda call: answer
    with pytest.raises(UserError, match=cause) as error:
        opened(server).likelihoods([Question("a", ("b",))])
    assert error.value.remedy == "ask with turns, or take a model on this machine"


def test_a_pause_among_questions_says_that_they_are_asked_again(server):
    server.script = lambda call: next_token({"A": 1.0}) if call.text == "q0" else refused(503, "busy")
    questions = [ask(f"q{i}", "A") for i in range(3)]
    with pytest.raises(UserError, match="busy; 1 of these 3 questions were answered, and will be") as error:
        opened(server, concurrency=1).likelihoods(questions)
    assert error.value.status == 75
