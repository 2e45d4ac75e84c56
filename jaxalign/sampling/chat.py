"""A conversation in the terminal; answers appear as they are sampled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count

from jaxalign.data.chat import Tokenizer
from jaxalign.data.records import Message
from jaxalign.errors import UserError
from jaxalign.sampling.engine import Engine, Sample
from jaxalign.sampling.load import load_engine
from jaxalign.sampling.settings import GenerateConfig

_HELP = "type a message; /reset begins again, /quit (or end of input) leaves"


def chat(
    model: str,
    config: GenerateConfig,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] = sys.stdout.write,
) -> None:
    """Talk to `model` until the end of input. `read` gets the prompt to show, `write` pieces of the answer.

    Raises `UserError` for a model without a usable chat template.
    """
    engine, tokenizer, _ = load_engine(model, config)
    engine.steps = 8  # short rounds, so that text appears as it comes
    tokenizer.render((Message("user", "?"),), generation_prompt=True)
    write(_HELP + "\n")
    messages: tuple[Message, ...] = ()
    for turn in count():
        try:
            line = read("> ").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        if line == "/reset":
            messages = ()
        elif line:
            asked = (*messages, Message("user", line))
            try:
                answer = _answer(engine, tokenizer, asked, config, turn, write)
            except UserError as error:
                write(f"{error}\n{_HELP}\n")
                continue
            messages = (*asked, Message("assistant", answer.text))


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    messages: tuple[Message, ...],
    config: GenerateConfig,
    turn: int,
    write: Callable[[str], object],
) -> Sample:
    """One answer, written as it grows."""
    shown = 0

    def show(request: int, index: int, tokens: list[int]) -> None:
        nonlocal shown
        text = tokenizer.decode(tokens)
        # A character whose bytes are not all there yet decodes to a replacement mark.
        if not text.endswith("�"):
            write(text[shown:])
            shown = len(text)

    params = config.model_copy(update={"n": 1}).params(turn)
    prompt = tokenizer.encode_prompt(messages)
    ((_, _, sample),) = engine.stream([prompt], [params], watch=show)
    write(sample.text[shown:] + "\n")
    return sample
