"""The two endpoints: what is asked of each, and what its answers look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jaxalign.data.records import Message
from jaxalign.serve.given import Choice, Piece
from jaxalign.serve.schema import Asking, ChatAsking, TextAsking

Json = dict[str, Any]


class Shape(Protocol):
    """An endpoint. Its methods get requests of its own `asking`."""

    asking: type[Asking]
    field: str  # where prompts stand
    prefix: str
    whole: str  # the `object` of an answer
    chunk: str  # and of its parts

    def prompts(self, asked: Any) -> list[Sequence[Message] | str]: ...  # noqa: D102

    def max_tokens(self, asked: Any, room: int) -> int:
        """The longest answer, where the prompt leaves `room` tokens."""
        ...

    def top(self, asked: Any) -> int | None:
        """How many alternatives to each token are wanted; None: no log-probabilities."""
        ...

    def echo(self, asked: Any) -> bool: ...  # noqa: D102

    def choice(self, index: int, choice: Choice) -> Json: ...  # noqa: D102

    def opening(self, index: int) -> list[Json]:
        """Choices of a stream before its first text."""
        ...

    def delta(self, index: int, text: str, finish: str | None, pieces: Sequence[Piece] | None) -> list[Json]:
        """Choices of a stream that add `text`; `finish` ends the answer."""
        ...


class Chat:
    """POST /v1/chat/completions."""

    asking: type[Asking] = ChatAsking
    field, prefix, whole, chunk = "messages", "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def prompts(self, asked: ChatAsking) -> list[Sequence[Message] | str]:
        """One conversation."""
        return [tuple(turn.message() for turn in asked.messages)]

    def max_tokens(self, asked: ChatAsking, room: int) -> int:
        """As much as there is room for, unless the client says."""
        return asked.max_completion_tokens or asked.max_tokens or room

    def top(self, asked: ChatAsking) -> int | None:
        """`logprobs` switches them on."""
        return asked.top_logprobs if asked.logprobs else None

    def echo(self, asked: ChatAsking) -> bool:
        """Never."""
        return False

    def choice(self, index: int, choice: Choice) -> Json:
        """One whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": _content(choice.pieces),
            "finish_reason": choice.finish,
        }

    def opening(self, index: int) -> list[Json]:
        """Who speaks."""
        return [_delta(index, {"role": "assistant", "content": ""}, None, None)]

    def delta(self, index: int, text: str, finish: str | None, pieces: Sequence[Piece] | None) -> list[Json]:
        """The text, and apart from it the end."""
        said = [_delta(index, {"content": text}, _content(pieces), None)] if text or pieces else []
        return said + ([_delta(index, {}, None, finish)] if finish else [])


def _delta(index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _content(pieces: Sequence[Piece] | None) -> Json | None:
    if pieces is None:
        return None
    rows = [
        _token(p.text, p.logp) | {"top_logprobs": [_token(text, logp) for text, logp in p.top]}
        for p in pieces
    ]
    return {"content": rows, "refusal": None}


def _token(text: str, logp: float | None) -> Json:
    """A token that is no whole character has a replacement mark for text, and no bytes that it could name."""
    return {"token": text, "logprob": logp, "bytes": None if "\ufffd" in text else list(text.encode())}


class Text:
    """POST /v1/completions."""

    asking: type[Asking] = TextAsking
    field, prefix, whole, chunk = "prompt", "cmpl-", "text_completion", "text_completion"

    def prompts(self, asked: TextAsking) -> list[Sequence[Message] | str]:
        """Texts to continue."""
        return [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)

    def max_tokens(self, asked: TextAsking, room: int) -> int:
        """What the client says, or 16."""
        return asked.max_tokens

    def top(self, asked: TextAsking) -> int | None:
        """`logprobs` says how many."""
        return asked.logprobs

    def echo(self, asked: TextAsking) -> bool:
        """Where it is wanted."""
        return asked.echo

    def choice(self, index: int, choice: Choice) -> Json:
        """One whole answer."""
        return _text(index, choice.text, choice.finish, choice.pieces)

    def opening(self, index: int) -> list[Json]:
        """Nothing."""
        return []

    def delta(self, index: int, text: str, finish: str | None, pieces: Sequence[Piece] | None) -> list[Json]:
        """The text, with the end where it has come."""
        return [_text(index, text, finish, pieces)] if text or finish else []


def _text(index: int, text: str, finish: str | None, pieces: Sequence[Piece] | None) -> Json:
    return {"index": index, "text": text, "logprobs": _columns(pieces), "finish_reason": finish}


def _columns(pieces: Sequence[Piece] | None) -> Json | None:
    """Alternatives are a mapping by text, in which the token itself stands too, as OpenAI's has it."""
    if pieces is None:
        return None
    wanted = any(p.top for p in pieces)
    tops = [_by_text(p) if p.top else None for p in pieces] if wanted else None
    return {
        "tokens": [p.text for p in pieces],
        "token_logprobs": [p.logp for p in pieces],
        "top_logprobs": tops,
        "text_offset": [p.start for p in pieces],
    }


def _by_text(piece: Piece) -> dict[str, float]:
    """Of tokens with the same text the likeliest."""
    found = dict(reversed(piece.top))
    assert piece.logp is not None, "only a first token has none"
    found.setdefault(piece.text, piece.logp)
    return found


SHAPES: dict[str, Shape] = {"/v1/chat/completions": Chat(), "/v1/completions": Text()}
