"""The JSON that OpenAI-compatible endpoints read and write: bodies of requests, and what answers say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from jaxalign.data.records import RowError, as_text
from jaxalign.llm.base import Completion, Likelihood, Prompt, Question, Reply, Request

Body = dict[str, Any]
CHAT, PLAIN = "/chat/completions", "/completions"
TOP = 20  # tokens whose log-probs a chat endpoint tells at most
LENGTH = ("length", "max_tokens")  # what endpoints call an answer that was cut


class UnreadableError(Exception):
    """An answer that is not of the agreed form."""


class NoLikelihoodsError(Exception):
    """A sound answer without the log-probs that were asked for."""


def sampling_body(request: Request, model: str, n: int, seed: int) -> tuple[str, Body]:
    """Path and body of a request for `n` of its answers."""
    path, body = _about(request.prompt, model)
    body |= {"temperature": request.temperature, "top_p": request.top_p, "max_tokens": request.max_tokens}
    body |= {"seed": seed}
    if n > 1:
        body["n"] = n
    if request.stop:
        body["stop"] = list(request.stop)
    return path, body


def next_token_body(prompt: Prompt, model: str) -> tuple[str, Body]:
    """Asks for the likeliest next tokens after a prompt of turns; as the model has them, unscaled."""
    path, body = _about(prompt, model)
    tempered = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 1, "seed": 0}
    return path, body | tempered | {"logprobs": True, "top_logprobs": TOP}


def echo_body(text: str, model: str) -> tuple[str, Body]:
    """Asks for the log-probs of a given text."""
    return PLAIN, {"model": model, "prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}


def _about(prompt: Prompt, model: str) -> tuple[str, Body]:
    if isinstance(prompt, str):
        return PLAIN, {"model": model, "prompt": prompt}
    return CHAT, {"model": model, "messages": [{"role": m.role, "content": m.content} for m in prompt]}


def tokens_used(answer: Any) -> tuple[int, int] | None:
    """Tokens of the prompt and of all answers, None where the endpoint does not tell."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    return counts if all(isinstance(count, int) for count in counts) else None  # type: ignore[return-value]


def read_reply(answer: Any) -> Reply:
    """All completions of an answer; a fault where one was withheld. Raises `UnreadableError`."""
    choices = _choices(answer)
    if any(choice.get("finish_reason") == "content_filter" for choice in choices):
        return Reply(fault="withheld by the endpoint's content filter")
    texts = [_text(choice) for choice in choices]
    prompt_tokens, tokens = tokens_used(answer) or (0, 0)
    done = [
        Completion(text, "length" if choice.get("finish_reason") in LENGTH else "stop", count)
        for choice, text, count in zip(choices, texts, _shared(tokens, texts), strict=True)
    ]
    return Reply(tuple(done), prompt_tokens)


def _choices(answer: Any) -> Sequence[Mapping[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, Mapping) for c in choices):
        raise UnreadableError("an answer without choices")
    return choices


def _text(choice: Mapping[str, Any]) -> str:
    """A message without content, such as a thought that used up all tokens, is an empty text."""
    message = choice.get("message")
    if isinstance(message, Mapping):
        try:
            return as_text(message.get("content"), "the answer")
        except RowError as error:
            raise UnreadableError(str(error)) from None
    if isinstance(choice.get("text"), str):
        return choice["text"]
    raise UnreadableError("a choice without a text")


def _shared(tokens: int, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, of which the endpoint tells only the sum: in proportion to their lengths."""
    sizes = [len(text) + 1 for text in texts]
    ends = [round(tokens * end / sum(sizes)) for end in accumulate(sizes, initial=0)]
    return [right - left for left, right in pairwise(ends)]


def read_next_token(answer: Any, options: Sequence[str]) -> list[Likelihood] | str:
    """Log-probs of options that are one token each. Blanks around a token do not count: all its spellings are
    added. Raises `UnreadableError`, and `NoLikelihoodsError` where the answer tells none."""
    logprobs = _choices(answer)[0].get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list):
        raise NoLikelihoodsError("its answers have no log-probs")
    if not content:
        return "an answer that ends before its first token"
    try:
        first = content[0]
        known = {e["token"]: float(e["logprob"]) for e in (first, *(first.get("top_logprobs") or ()))}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UnreadableError("log-probs that cannot be read") from None
    wanted = [option.strip() or option for option in options]
    if len(set(wanted)) < len(wanted):
        return "two options differ by blanks alone"
    found = []
    for option, word in zip(options, wanted, strict=True):
        spellings = [p for token, p in known.items() if word in (token, token.strip()) and math.isfinite(p)]
        if not spellings:
            return f"{option!r} is not among the {TOP} likeliest next tokens"
        top = max(spellings)
        found.append(Likelihood(top + math.log(sum(math.exp(logp - top) for logp in spellings)), 1))
    return found


def read_echo(answer: Any, question: Question, option: str) -> Likelihood | str:
    """The likelihood of the end of a text, or why it cannot be told. Raises as `read_next_token` does."""
    choice, text = _choices(answer)[0], f"{question.prompt}{option}"
    logprobs = choice.get("logprobs")
    if choice.get("text") != text or not isinstance(logprobs, Mapping):
        raise NoLikelihoodsError("it does not repeat a text with log-probs (echo)")
    try:
        tokens, offsets = list(logprobs["tokens"]), [int(at) for at in logprobs["text_offset"]]
        pairs = list(zip(offsets, logprobs["token_logprobs"], strict=True))
    except (KeyError, TypeError, ValueError):
        raise UnreadableError("log-probs that cannot be read") from None
    border = len(question.prompt) + _shift(tokens, offsets, text)
    if not option or border not in offsets:
        return "the option does not begin with a token of its own" if option else "an empty option"
    logps = [logp for at, logp in pairs if at >= border]
    if not all(isinstance(logp, int | float) for logp in logps):
        return "its first token has no log-prob"
    return Likelihood(float(sum(logps)), len(logps))


def _shift(tokens: Sequence[str], offsets: Sequence[int], text: str) -> int:
    """By how much offsets are moved: vLLM counts the letters of a BOS that the text does not have."""
    bos = len(tokens) > 1 and bool(tokens[0]) and not text.startswith(tokens[0])
    return len(tokens[0]) if bos and offsets[1] == len(tokens[0]) else 0
