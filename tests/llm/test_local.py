"""A tiny model as an LLM: replies do not depend on the company, likelihoods are those of its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.records import Message
from jaxalign.llm.base import Question, Request, answers, choice_logprobs
from jaxalign.llm.local import load_local
from jaxalign.llm.settings import LLMConfig
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from tests.train.tiny import write_model

ASK = (Message("user", "Who?"),)
QUESTIONS = [
    Question(ASK, ("A", "B", "both of them")),
    Question("one two", (" three",)),
    Question((Message("system", "Be brief."), *ASK), ("yes", "no")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", sharpness=4.0)


@pytest.fixture(scope="module")
def llm(folder):
    return load_local(str(folder), LLMConfig(dtype="f32", batch_size=8, mesh={"data": 1}))


@pytest.fixture(scope="module")
def by_hand(folder):
    """log p(tokens | those before them), by one plain forward pass."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loaded = load_model(resolve(str(folder)), mesh, param_dtype=jnp.float32)

    def logp(prompt, option):
        ids = jnp.array([prompt + option])
        ones, at = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
        hidden, _ = loaded.model.hidden(None, loaded.base, ids, ones, at)
        logps = jax.nn.log_softmax(loaded.model.logits(loaded.base, hidden))[0]
        return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(option))

    return logp


def test_replies_are_functions_of_their_requests(llm):
    requests = [Request(ASK, n=2, max_tokens=5 + i, seed=i) for i in range(5)] + [Request("ab", max_tokens=3)]
    together = answers(llm, requests)
    for request, reply in zip(requests, together, strict=True):
        assert answers(llm, [request]) == [reply]
        assert len(reply.completions) == request.n
        assert all(c.tokens <= request.max_tokens for c in reply.completions)
        assert all(np.isfinite(c.logp) for c in reply.completions)
    assert [r.prompt_tokens for r in together[-2:]] == [len(llm.tokenizer.encode_prompt(ASK)), 2]
    assert together[0].completions != together[1].completions


def test_what_cannot_be_asked_is_a_fault_and_disturbs_nobody(llm):
    fine, long, also = (
        Request("a", max_tokens=4),
        Request("b" * 600, max_tokens=4),
        Request("c", max_tokens=509),
    )
    found = answers(llm, [long, fine, also])
    assert found[0].fault == "a prompt of 600 tokens, longer than 508"
    assert found[1] == answers(llm, [fine])[0]
    assert not found[2].fault


def test_likelihoods_are_those_of_the_weights(llm, by_hand):
    found = llm.likelihoods(QUESTIONS)
    for question, options in zip(QUESTIONS, found, strict=True):
        prompt = llm.tokenizer.encode_prompt(question.prompt)
        for text, likelihood in zip(question.options, options, strict=True):
            tokens = llm.tokenizer.encode(text)
            assert likelihood.tokens == len(tokens)
            assert likelihood.logp == pytest.approx(by_hand(prompt, tokens), abs=1e-4)


def test_choices_compare_tokens_and_not_lengths(llm):
    letters, words, _ = choice_logprobs(llm, [QUESTIONS[0], Question(ASK, ("ab", "abab")), QUESTIONS[2]])
    ((a, b, both),) = llm.likelihoods(QUESTIONS[:1])
    scores = np.array([a.logp, b.logp, both.logp / both.tokens])
    assert np.exp(letters).sum() == pytest.approx(1)
    assert np.diff(letters) == pytest.approx(np.diff(scores), abs=1e-5)
    assert np.exp(words).sum() == pytest.approx(1)


def test_bad_questions_are_told_apart(llm):
    found = llm.likelihoods([Question(ASK, ("a", "")), QUESTIONS[0], Question("x" * 510, ("abc",))])
    assert found[0] == "an empty option"
    assert found[2] == "longer than 512 tokens"
    assert found[1][0].logp == pytest.approx(llm.likelihoods(QUESTIONS)[0][0].logp, abs=1e-4)


def test_a_limit_on_length_and_a_name_for_the_weights(folder, llm):
    short = load_local(str(folder), LLMConfig(dtype="f32", max_length=32))
    assert short.identity == llm.identity
    assert len(short.identity) > 64
    assert "longer than 28" in answers(short, [Request("b" * 30, max_tokens=4)])[0].fault
