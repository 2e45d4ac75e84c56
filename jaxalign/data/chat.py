"""`Tokenizer`: the only place that turns text into token ids and messages into text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jaxalign.data.gguf_tokenizer import load_gguf_tokenizer
from jaxalign.data.records import Message, RowError
from jaxalign.errors import UserError
from jaxalign.types import ModelSource

# Rendered once per tokenizer, to see where the chat template puts things.
_QUESTION, _ANSWER = "wherequestionstands", "whereanswerstands"

_NO_TEMPLATE = (
    "give an instruct model, set chat_template, or use rows of text or prompt and completion strings"
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its chat template and stop tokens.

    hf          the transformers tokenizer (templates, saving)
    backend     its `tokenizers` object without post-processor: it never adds special tokens
    eos_id      ends plain text
    pad_id      fills rows; nothing is ever inferred from it
    bos_id      what plain text starts with, or None when this tokenizer puts nothing there
    lone_bos    BOS token that may stand at index 0 only, or None
    stop_tokens eos, the end-of-turn token of the chat template, and those of generation_config.json
    turn_end    the token with which the template ends an assistant turn, or None
    fault       why the chat template cannot be used, or ""
    """

    name: str
    hf: Any
    backend: Any
    eos_id: int
    pad_id: int
    bos_id: int | None
    lone_bos: int | None
    stop_tokens: tuple[int, ...]
    turn_end: int | None = None
    fault: str = ""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. The model's embedding may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of added tokens, which text is never cut across."""
        return frozenset(self.backend.get_added_tokens_decoder())

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it stands; nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def encode_head(self) -> Callable[[str], tuple[int, ...]]:
        """`encode` that remembers: the last words before an answer are the same in most rows."""
        return lru_cache(maxsize=4096)(lambda text: tuple(self.encode(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers.Encoding` (ids, offsets) of each text, on all cores."""
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, led by one BOS where this tokenizer puts one."""
        return self.checked(self.with_bos(self.encode(text)))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids led by BOS, unless there is none or it stands there already."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def checked(self, ids: list[int]) -> list[int]:
        """The ids. Raises `RowError` when a BOS stands anywhere but at index 0."""
        if self.lone_bos is not None and self.lone_bos in ids[1:]:
            raise RowError("a BOS token inside the text")
        return ids

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The messages as the chat template writes them. `generation_prompt` opens the assistant's turn.

        Raises `UserError` when there is no usable template, `RowError` when it refuses these messages.
        """
        if self.fault:
            raise UserError(self.fault, place=self.name, remedy=_NO_TEMPLATE)
        return self._render(messages, generation_prompt)

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise RowError(f"the chat template refuses it ({error})") from error

    def encode_prompt(self, prompt: Sequence[Message] | str) -> list[int]:
        """Ids that a model continues: messages through the template and its generation prompt, text as it is.

        Raises `UserError` when the template cannot render them.
        """
        try:
            if isinstance(prompt, str):
                return self.encode_text(prompt)
            return self.checked(self.encode(self.render(prompt, generation_prompt=True)))
        except RowError as reason:
            raise UserError(str(reason), place=self.name, remedy="mend the prompt") from reason

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of the ids; special tokens are left out unless `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
        self.hf.save_pretrained(str(folder))


def load_tokenizer(source: ModelSource, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or .gguf. `chat_template` (Jinja text) replaces its own, as does
    the template that an adapter was trained with.

    Raises `UserError` when there is no tokenizer, or none that can end an answer.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would ask for torch
    hf, add_bos, extra = _from_gguf(source.gguf) if source.gguf else _from_folder(source)
    trained_with = source.adapter and source.adapter / "chat_template.jinja"
    if chat_template is not None:
        hf.chat_template = chat_template
    elif trained_with and trained_with.exists():
        hf.chat_template = trained_with.read_text(encoding="utf-8")
    return make_tokenizer(hf, name=source.name, add_bos=add_bos, stop_tokens=extra)


def _from_gguf(path: Path) -> tuple[Any, bool, tuple[int, ...]]:
    """(transformers tokenizer, whether plain text gets BOS, further stop tokens) of a .gguf file."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    found = load_gguf_tokenizer(path)
    if found.add_bos and found.bos:  # for whoever loads the saved tokenizer: transformers adds BOS by this
        named = [(found.bos, found.backend.token_to_id(found.bos))]
        found.backend.post_processor = TemplateProcessing(single=f"{found.bos} $A", special_tokens=named)
    names = {"bos_token": found.bos, "eos_token": found.eos, "pad_token": found.pad, "unk_token": found.unk}
    hf: Any = PreTrainedTokenizerFast(
        tokenizer_object=found.backend, clean_up_tokenization_spaces=False, **names
    )
    hf.chat_template = found.chat_template
    turn_end = found.backend.token_to_id(found.end_of_turn) if found.end_of_turn else None
    return hf, found.add_bos, () if turn_end is None else (turn_end,)


def _from_folder(source: ModelSource) -> tuple[Any, bool, tuple[int, ...]]:
    """The same of a model folder, with the stop tokens of its generation_config.json."""
    from transformers import AutoTokenizer

    place = str(source.folder)
    try:
        hf: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "the folder needs tokenizer.json and tokenizer_config.json"
        raise UserError(f"no tokenizer could be loaded ({reason})", place=place, remedy=remedy) from error
    if not getattr(hf, "is_fast", False):
        remedy = "save it with transformers as a fast tokenizer (tokenizer.json)"
        raise UserError("a tokenizer without tokenizer.json", place=place, remedy=remedy)
    with_special = hf("a")["input_ids"]
    add_bos = hf.bos_token_id is not None and with_special[:1] == [hf.bos_token_id]
    return hf, add_bos, _generation_stops(source.folder)


def _generation_stops(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: none, one or several."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text()).get("eos_token_id")
    except json.JSONDecodeError as error:
        raise UserError(
            f"not JSON ({error.msg})", place=f"{path}:{error.lineno}", remedy="fetch it again"
        ) from error
    ids = found if isinstance(found, list) else [found]
    return tuple(int(i) for i in ids if i is not None)


def make_tokenizer(hf: Any, *, name: str, add_bos: bool, stop_tokens: tuple[int, ...] = ()) -> Tokenizer:
    """A `Tokenizer` around a fast transformers tokenizer. Raises `UserError` if nothing can end an answer."""
    from tokenizers import Tokenizer as Backend

    backend: Any = Backend.from_str(hf.backend_tokenizer.to_str())
    backend.post_processor = None  # it adds special tokens, and trims the offsets that masks are made from
    backend.no_truncation()
    backend.no_padding()
    bos = hf.bos_token_id
    ends = tuple(dict.fromkeys(i for i in (hf.eos_token_id, *stop_tokens) if i is not None))
    draft = Tokenizer(
        name=name,
        hf=hf,
        backend=backend,
        eos_id=ends[0] if ends else -1,
        pad_id=next((i for i in (hf.pad_token_id, *ends) if i is not None), 0),
        bos_id=bos if add_bos else None,
        lone_bos=None,
        stop_tokens=ends,
    )
    probed = _probe(draft, bos)
    if not probed.stop_tokens:
        remedy = "set eos_token in tokenizer_config.json: without one an answer never ends"
        raise UserError("a tokenizer without a stop token", place=name, remedy=remedy)
    return replace(probed, eos_id=probed.stop_tokens[0]) if probed.eos_id < 0 else probed


def _probe(draft: Tokenizer, bos: int | None) -> Tokenizer:
    """The tokenizer with what its chat template shows: the end of a turn, where BOS stands, or its fault."""
    lone = bos if bos is not None and bos not in draft.stop_tokens else None
    if not draft.hf.chat_template:
        return replace(draft, lone_bos=lone, fault="the model has no chat template")
    turn = (Message("user", _QUESTION), Message("assistant", _ANSWER))
    try:
        one, two = (draft._render(turn * n, generation_prompt=False) for n in (1, 2))
    except RowError as reason:
        return replace(
            draft, lone_bos=lone, fault=f"the chat template fails on one question and answer: {reason}"
        )
    for text, role in ((_QUESTION, "user"), (_ANSWER, "assistant")):
        if text not in one:
            return replace(draft, lone_bos=lone, fault=f"the chat template leaves out the {role} turn")
    # Some templates write BOS before every turn (Llama 2), and in ChatML bos may be <|im_start|> (SmolLM2).
    if lone in draft.encode(two)[1:]:
        lone = None
    tail = draft.encode(one[one.rindex(_ANSWER) + len(_ANSWER) :])
    known = draft.special_ids | set(draft.stop_tokens)
    turn_end = next((i for i in tail if i in known), None)
    stops = draft.stop_tokens if turn_end is None else tuple(dict.fromkeys((*draft.stop_tokens, turn_end)))
    return replace(draft, lone_bos=lone, turn_end=turn_end, stop_tokens=stops)
