"""Prompts and answers as a client sees them: pieces of text with their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isnan

from jaxalign.data.chat import Tokenizer
from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.sampling.engine import Sample
from jaxalign.sampling.forced import Forced
from jaxalign.serve.errors import ApiError


@dataclass(frozen=True)
class Piece:
    """One token. `start` is where its text begins, in characters; `logp` is None for the first of a prompt;
    `top` are the likeliest tokens in its place with their log-probabilities, the likeliest first."""

    text: str
    start: int
    logp: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One answer, with what of the prompt is to be repeated before it. `pieces` are there where the client
    wants log-probabilities."""

    text: str
    finish: str
    pieces: tuple[Piece, ...] | None = None


class Reader:
    """Text to tokens and back, as this server's clients see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Some decoders strip the blank from the first token of a text: none of ours stands first.
        self._anchor = tokenizer.encode("a")[-1:]
        self.piece = lru_cache(maxsize=65536)(self._piece)

    def encode(self, prompt: Sequence[Message] | str, field: str) -> list[int]:
        """Its tokens. Raises `ApiError` 400 where there are none, or the chat template refuses it."""
        try:
            tokens = self.tokenizer.encode_prompt(prompt)
        except UserError as error:
            raise ApiError(400, f"{field}: {error.cause}", field) from error
        if not tokens:
            raise ApiError(400, f"{field}: it has no tokens", field)
        return tokens

    def _piece(self, token: int) -> str:
        before = self.tokenizer.decode(self._anchor)
        return self.tokenizer.decode([*self._anchor, token], special=True)[len(before) :]

    def of_prompt(self, text: str, tokens: list[int], forced: Forced, top: int) -> list[Piece]:
        """The pieces of a prompt, whose tokens are those of `forced`'s text from its beginning on."""
        spans = self.tokenizer.encode_batch([text])[0].offsets
        lead = len(tokens) - len(spans)  # a BOS
        texts = [self.piece(token) for token in tokens[:lead]] + [text[a:b] for a, b in spans]
        starts = [0] * lead + [a for a, _ in spans]
        each = enumerate(zip(texts, starts, strict=True))
        return [self._forced(piece, start, forced, i, top) for i, (piece, start) in each]

    def of_answer(self, sample: Sample, start: int, forced: Forced | None, top: int) -> list[Piece]:
        """The pieces of an answer, its stop token included, that begins at the character `start`; with the
        sampler's own log-probabilities, or those of the forced text that it is the end of."""
        found, tokens = [], sample.tokens.tolist()
        before = 0 if forced is None else len(forced.logp) - len(tokens)
        for i, token in enumerate(tokens):
            piece = self.piece(token)
            if forced is None:
                found.append(Piece(piece, start, float(sample.logp[i])))
            else:
                found.append(self._forced(piece, start, forced, before + i, top))
            start += len(piece)
        return found

    def _forced(self, text: str, start: int, forced: Forced, at: int, top: int) -> Piece:
        logp = float(forced.logp[at])
        if isnan(logp):
            return Piece(text, start, None)
        likeliest = zip(forced.ids[at, :top].tolist(), forced.tops[at, :top].tolist(), strict=True)
        return Piece(text, start, logp, tuple((self.piece(token), value) for token, value in likeliest))


@dataclass
class Growing:
    """The text of an answer under way, piece by piece, without what may yet be cut off."""

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    shown: int = 0

    def more(self, tokens: list[int]) -> str:
        """What the tokens so far add for certain."""
        # A character whose bytes are not all there yet decodes to replacement marks.
        text = self.tokenizer.decode(tokens).rstrip("\ufffd")
        return self._until(text, len(text) - _begun(text, self.stop))

    def rest(self, text: str) -> str:
        """What the finished text adds."""
        return self._until(text, len(text))

    def _until(self, text: str, end: int) -> str:
        piece = text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    longest = max((len(s) for s in stop), default=1)
    ends = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in ends if any(s.startswith(text[-n:]) for s in stop)), 0)
