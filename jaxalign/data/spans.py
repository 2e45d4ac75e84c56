"""Which characters of a record's text are learned, and from there which tokens.

Assistant spans come from rendering the conversation step by step: the text up to a turn (with the generation
prompt) must begin the text with that turn, which must begin the whole. Masks are made from lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from jaxalign.data.chat import Tokenizer
from jaxalign.data.records import Message, RowError, SFTRecord
from jaxalign.errors import UserError, nearest
from jaxalign.types import Example

LossOn = Literal["completion", "assistant_turns", "all"]
LOSS_ON: tuple[LossOn, ...] = ("completion", "assistant_turns", "all")

_MARK = "whereanswerbegins"  # rendered in an answer's place, to see what the template writes before it

Span = tuple[int, int | None]  # first character, end character or None: up to the next stop token


@dataclass(frozen=True)
class Layout:
    """A record as text: `spans` are learned (all of it when `whole`); `plain` text gets BOS and EOS.

    `recovered` counts assistant turns that the template rewrites later on, whose end had to be looked up.
    """

    text: str
    spans: tuple[Span, ...]
    plain: bool
    whole: bool
    recovered: int = 0


@dataclass(frozen=True)
class Marked:
    """An encoded record and what was noticed: boundaries that cut a token, turns without a stop token."""

    example: Example
    splits: int
    unstopped: int
    turns: int


def check_loss_on(loss_on: str | None) -> None:
    """Raise `UserError` for an unknown value."""
    if loss_on is not None and loss_on not in LOSS_ON:
        known = ", ".join(LOSS_ON)
        raise UserError(f"unknown loss_on {loss_on!r}{nearest(loss_on, LOSS_ON)}", remedy=f"known: {known}")


def lay_out(record: SFTRecord, tokenizer: Tokenizer, loss_on: LossOn | None = None) -> Layout:
    """The record's text and its learned spans.

    `loss_on` None: what the record's form asks for (assistant turns, the completion, or all of a text).
    Raises `RowError` when the template refuses the row, `UserError` when `loss_on` does not fit text rows.
    """
    if record.messages is not None:
        return _chat_layout(record.messages, record.prompt_turns, tokenizer, loss_on)
    if record.text is not None:
        if loss_on not in (None, "all"):
            remedy = "leave loss_on out, or give prompt/completion or messages rows"
            raise UserError(
                f"loss_on={loss_on} needs an answer, and a text row has none",
                place=record.place,
                remedy=remedy,
            )
        return Layout(record.text, (), plain=True, whole=True)
    prompt, completion = record.prompt or "", record.completion or ""
    text = prompt + completion
    return Layout(text, ((len(prompt), len(text)),), plain=True, whole=loss_on == "all")


def _chat_layout(
    messages: tuple[Message, ...], prompt_turns: int, tokenizer: Tokenizer, loss_on: LossOn | None
) -> Layout:
    full = tokenizer.render(messages)
    if loss_on == "all":
        return Layout(full, (), plain=False, whole=True)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if prompt_turns and loss_on != "assistant_turns":
        turns = [i for i in turns if i >= prompt_turns]
    elif loss_on == "completion":
        turns = turns[-1:]
    spans = tuple(_turn_span(tokenizer, messages, full, i) for i in turns)
    recovered = sum(1 for start_end in spans if start_end[1] is None)
    return Layout(full, spans, plain=False, whole=False, recovered=recovered)


def _turn_span(tokenizer: Tokenizer, messages: tuple[Message, ...], full: str, index: int) -> Span:
    """Where the assistant's turn `index` lies in the rendered conversation `full`."""
    prompt = tokenizer.render(messages[:index], generation_prompt=True)
    turn = full if index == len(messages) - 1 else tokenizer.render(messages[: index + 1])
    if turn.startswith(prompt) and full.startswith(turn):
        return len(prompt), len(turn)
    # The template writes this turn differently once others follow (it drops thoughts, say), or opens it with
    # something it never writes otherwise. What stands in `full` is learned.
    if full.startswith(prompt):
        return len(prompt), None
    marked = tokenizer.render((*messages[:index], Message("assistant", _MARK)))
    head = marked[: marked.rfind(_MARK)]
    if _MARK not in marked or not full.startswith(head):
        raise RowError("the chat template rewrites what precedes an answer: it cannot be found")
    return len(head), None


def encode_layout(layout: Layout, encoding: Any, tokenizer: Tokenizer, name: str) -> Marked:
    """Tokens and mask of a laid-out record; `encoding` is that of its whole text.

    Where the text before a span has other ids alone than here (a token reaches across, or a space is split
    otherwise), the text is cut and encoded in two, so that a prompt's ids are those a model is asked with.
    """
    ids, (starts, ends) = list(encoding.ids), _offsets(encoding)
    cuts = [start for start, _ in layout.spans if _differs(layout.text, ids, starts, ends, start, tokenizer)]
    if cuts:
        ids, starts = _encode_cut(layout.text, cuts, tokenizer)
    return replace(mark(layout, ids, starts, tokenizer, name), splits=len(cuts))


def mark(layout: Layout, ids: list[int], starts: np.ndarray, tokenizer: Tokenizer, name: str) -> Marked:
    """The laid-out record as tokens with their mask; `starts` [T] is the first character of every token."""
    mask = np.full(len(ids), layout.whole)
    unstopped = 0
    for start, end in () if layout.whole else layout.spans:
        first, last, stopped = _token_span(ids, starts, start, end, tokenizer)
        mask[first:last] = True
        unstopped += not (stopped or layout.plain)
    if layout.plain:
        ids, mask = _with_ends(ids, mask, tokenizer)
    tokenizer.checked(ids)
    mask[:1] = False  # nothing precedes it
    example = Example(name, np.asarray(ids, np.int32), mask)
    return Marked(example, 0, unstopped, 0 if layout.plain else len(layout.spans))


def _offsets(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _differs(
    text: str, ids: list[int], starts: np.ndarray, ends: np.ndarray, start: int, tokenizer: Tokenizer
) -> bool:
    """Whether `text[:start]` has other ids by itself than as the beginning of the text.

    No token reaches across an added one, so that what follows the last of them is enough to compare.
    """
    first = int(np.searchsorted(starts, start, side="left"))
    if first and int(ends[first - 1]) > start:
        return True
    added = next((i for i in range(first - 1, -1, -1) if ids[i] in tokenizer.special_ids), None)
    begin = 0 if added is None else int(starts[added])
    return tokenizer.encode_head(text[begin:start]) != tuple(ids[added or 0 : first])


def _encode_cut(text: str, cuts: list[int], tokenizer: Tokenizer) -> tuple[list[int], np.ndarray]:
    """Ids and first characters of a text encoded in pieces. EOS before a later piece keeps it from being
    treated as the start of a text (sentencepiece puts a space there)."""
    pieces = [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    encodings = tokenizer.encode_batch([text[: cuts[0]], *(anchored(piece, tokenizer) for piece in pieces)])
    return join_pieces(encodings, cuts, tokenizer)


def anchored(text: str, tokenizer: Tokenizer) -> str:
    """A later piece of a text, to be encoded by itself."""
    return tokenizer.backend.id_to_token(tokenizer.eos_id) + text


def join_pieces(
    encodings: Sequence[Any], cuts: Sequence[int], tokenizer: Tokenizer
) -> tuple[list[int], np.ndarray]:
    """Ids and first characters of a text out of the encodings of its pieces: the first as it is, those that
    begin at `cuts` as `anchored`."""
    anchor = len(anchored("", tokenizer))
    ids, starts = list(encodings[0].ids), [_offsets(encodings[0])[0]]
    for begin, piece in zip(cuts, encodings[1:], strict=True):
        ids += piece.ids[1:]
        starts.append(_offsets(piece)[0][1:] - anchor + begin)
    return ids, np.concatenate(starts)


def _token_span(
    ids: list[int], starts: np.ndarray, start: int, end: int | None, tokenizer: Tokenizer
) -> tuple[int, int, bool]:
    """(first token, end token, whether it ends in a stop token) of a span of characters.

    What the template writes after the stop token (a line break) is not learned: no model is asked for it.
    """
    first = int(np.searchsorted(starts, start, side="left"))
    last = len(ids) if end is None else int(np.searchsorted(starts, end, side="left"))
    stops = [i for i in range(first, last) if ids[i] in tokenizer.stop_tokens]
    if end is None and not stops:
        raise RowError("the chat template rewrites an answer and its end cannot be found")
    if not stops:
        return first, last, False
    return first, (stops[0] if end is None else stops[-1]) + 1, True


def _with_ends(ids: list[int], mask: np.ndarray, tokenizer: Tokenizer) -> tuple[list[int], np.ndarray]:
    """Plain text with one BOS in front, where this tokenizer has one, and one learned EOS behind."""
    led = tokenizer.with_bos(ids)
    mask = np.concatenate([np.zeros(len(led) - len(ids), bool), mask])
    if led[-1:] == [tokenizer.eos_id]:
        mask[-1] = True
        return led, mask
    return [*led, tokenizer.eos_id], np.append(mask, True)
