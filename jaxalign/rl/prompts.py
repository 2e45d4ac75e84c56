"""The prompts of a method that samples: read, encoded, split and checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxalign.data.chat import Tokenizer
from jaxalign.data.order import permutation
from jaxalign.data.readers import read_prompts
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.train.inputs import HELD_OUT

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """A prompt and its token ids."""

    prompt: Prompt
    tokens: list[int]


@dataclass(frozen=True)
class Prompts:
    """Prompts to learn from and held out; `report` is what became of the rows."""

    learned: list[Asked]
    held_out: list[Asked]
    report: dict[str, Any] = field(default_factory=dict)


def read_asked(data: Any, tokenizer: Tokenizer, config: Any, say: Say) -> Prompts:
    """The prompts of `data`, those that leave room for `max_tokens` within `max_length`.

    Raises `UserError` where none is left, where too many are too long, or where nothing ends an answer.
    """
    if not tokenizer.stop_tokens:
        raise UserError(
            "no token ends an answer: every one would run into max_tokens",
            place="model",
            remedy="use a model whose tokenizer has an end-of-sequence token",
        )
    found, report = _encoded(data, tokenizer, config, "prompts", say)
    if config.eval_data is not None:
        held_out, report["eval"] = _encoded(config.eval_data, tokenizer, config, "eval prompts", say)
        return Prompts(found, held_out, report)
    learned, held_out = divide(found, config.eval_fraction, config.seed)
    if held_out:
        say(f"prompts: {len(held_out)} of {len(found)} are held out for evaluation")
    return Prompts(learned, held_out, report)


def divide(items: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(the rest, the held-out share): a function of the arguments. Raises `UserError` for no rest."""
    count = round(fraction * len(items))
    if count >= len(items):
        raise UserError(
            f"eval_fraction={fraction:g} of {len(items)} prompts leaves none to learn from",
            place="eval_fraction",
            remedy="lower it, or name held-out prompts with eval_data",
        )
    picked = set(permutation(seed, HELD_OUT, len(items))[:count].tolist())
    return (
        [x for i, x in enumerate(items) if i not in picked],
        [x for i, x in enumerate(items) if i in picked],
    )


def _encoded(
    data: Any, tokenizer: Tokenizer, config: Any, name: str, say: Say
) -> tuple[list[Asked], dict[str, Any]]:
    prompts, report = read_prompts(data, max_bad_rows=config.max_bad_rows)
    for line in report.lines():
        say(f"{name}: {line}")
    room = config.max_length - config.max_tokens
    asked = [Asked(p, tokenizer.encode_prompt(p.text if p.messages is None else p.messages)) for p in prompts]  # type: ignore[arg-type]
    fit = [a for a in asked if len(a.tokens) <= room]
    long = [a for a in asked if len(a.tokens) > room]
    if long:
        longest = max(long, key=lambda a: len(a.tokens))
        cause = (
            f"{len(long)} of {len(asked)} prompts have more than {room} tokens (max_length="
            f"{config.max_length} less max_tokens={config.max_tokens}), the longest {len(longest.tokens)}"
        )
        if not fit or len(long) > config.max_bad_rows * len(asked):
            remedy = "raise max_length, lower max_tokens, or raise max_bad_rows to leave them out"
            raise UserError(cause, place=longest.prompt.place or name, remedy=remedy)
        say(f"{name}: {cause}: left out")
    lengths = np.array([len(a.tokens) for a in fit])
    return fit, {
        "rows": len(prompts),
        "too_long": len(long),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
    }
