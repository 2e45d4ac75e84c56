"""The bodies of requests. A field that is not named here is refused: what would be ignored might matter."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxalign.data.records import Message
from jaxalign.errors import nearest
from jaxalign.sampling.forced import TOP
from jaxalign.serve.errors import ApiError
from jaxalign.types import SamplingParams

R = TypeVar("R", bound="Asking")
Text = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """Of a request with `stream`."""

    include_usage: bool = False


class Asking(_Body):
    """What both endpoints take. top_k, min_p and repetition_penalty are not OpenAI's; other servers have them
    too."""

    model: str
    n: int = Field(default=1, ge=1, le=128)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: Text | list[Text] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    # Clients send these with the values that do nothing; the engine has no others.
    frequency_penalty: float = Field(default=0.0, ge=0, le=0)
    presence_penalty: float = Field(default=0.0, ge=0, le=0)

    def params(self, max_tokens: int) -> SamplingParams:
        """How one prompt is sampled; without a seed by a new one each time."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            n=self.n,
            seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
        )


class Part(_Body):
    """A piece of a turn."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]

    def message(self) -> Message:
        """The turn as the chat template takes it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatAsking(Asking):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=TOP)


class TextAsking(Asking):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=TOP)
    echo: bool = False


def read(kind: type[R], body: bytes) -> R:
    """The request. Null is as if the field were not there. Raises `ApiError` 400 that names the first field
    that is wrong, and in words all of them."""
    try:
        values = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        told = "; ".join(dict.fromkeys(_explain(kind, one) for one in wrong))
        raise ApiError(400, told, _field(wrong[0]["loc"])) from error


def _explain(kind: type[BaseModel], error: Any) -> str:
    field, text = _field(error["loc"]), error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        text = f"unknown field{nearest(field, kind.model_fields)}"
    elif error["type"] == "missing":
        text = "is needed"
    return f"{field}: {text}"


def _field(where: Sequence[int | str]) -> str:
    """`messages[0].role`. What stands behind a name in it tells only which kind of value was tried."""
    field = ""
    for part in where:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part not in ("str", "constrained-str") and "[" not in part:
            field += f".{part}" if field else part
    return field
