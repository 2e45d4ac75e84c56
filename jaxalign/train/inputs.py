"""From the data argument to batches: rows, tokens, the held-out part, and what became of every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxalign import distributed
from jaxalign.data.batching import BatchSource, eval_batches, permutation
from jaxalign.data.chat import Tokenizer
from jaxalign.data.readers import read_records
from jaxalign.data.tokenize import tokenize
from jaxalign.errors import UserError
from jaxalign.train.settings import TrainConfig
from jaxalign.types import Batch, Example

Data = str | Path | Sequence[str | Path]

HELD_OUT = 2**31  # the "epoch" whose order picks the held-out rows: none that training reaches


@dataclass(frozen=True)
class Inputs:
    """What a run trains on (`source`) and is evaluated on (`held_out`, maybe nothing), and the report."""

    source: BatchSource
    held_out: list[Example]
    report: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this data this data: a checkpoint of other data is refused, with what differs."""
        stats = self.source.stats
        return {"fingerprint": self.source.fingerprint, "examples": stats.examples, "tokens": stats.tokens}


def read_inputs(data: Data, tokenizer: Tokenizer, config: TrainConfig, say: Callable[[str], None]) -> Inputs:
    """Reads, tokenises and splits the data; `say` gets the report's lines. `config` must be resolved.

    Raises `UserError` for data that cannot be used, or that leaves nothing to train on.
    """
    examples, report = _examples(data, tokenizer, config, "data", say)
    held_out: list[Example] = []
    if config.eval_data is not None:
        held_out, report["eval"] = _examples(config.eval_data, tokenizer, config, "eval data", say)
    elif config.eval_fraction:
        examples, held_out = split(examples, config.eval_fraction, config.seed)
        say(f"data: {len(held_out)} of {len(held_out) + len(examples)} examples are held out for evaluation")
    source = BatchSource(
        examples,
        batch_size=config.batch_size or len(examples),
        accumulation=config.grad_accumulation,
        max_length=config.max_length,
        packing=config.packing,
        seed=config.seed,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        pad_id=tokenizer.pad_id,
    )
    report["batches"] = asdict(source.stats) | {
        "held_out": len(held_out),
        "row_lengths": list(source.lengths),
    }
    return Inputs(source, held_out, report)


def _examples(
    data: Data, tokenizer: Tokenizer, config: TrainConfig, name: str, say: Callable[[str], None]
) -> tuple[list[Example], dict[str, Any]]:
    records, loaded = read_records(data, max_bad_rows=config.max_bad_rows)
    examples, tokenized = tokenize(records, tokenizer, config.max_length, config.truncation, config.loss_on)
    for line in (*loaded.lines(), *tokenized.lines()):
        say(f"{name}: {line}")
    return examples, {"rows": asdict(loaded), "tokens": asdict(tokenized)}


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, each in the order of the data: a function of data, fraction and seed.

    At least one example is held out. Raises `UserError` when none is left to train on.
    """
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise UserError(
            f"eval_fraction={fraction:g} of {len(examples)} examples leaves none to train on",
            place="eval_fraction",
            remedy="lower it, or name held-out rows with eval_data",
        )
    picked = set(permutation(seed, HELD_OUT, len(examples))[:count].tolist())
    train = [e for i, e in enumerate(examples) if i not in picked]
    return train, [e for i, e in enumerate(examples) if i in picked]


def held_out_batches(inputs: Inputs, config: TrainConfig, pad_id: int, rows: int) -> list[Batch]:
    """The evaluation set as host batches [B_local, 1, T], `rows` rows each over all processes."""
    if not inputs.held_out:
        return []
    batches = eval_batches(
        inputs.held_out,
        batch_size=rows,
        max_length=config.max_length,
        packing=config.packing,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        pad_id=pad_id,
    )
    return list(batches)


def total_steps(config: TrainConfig, source: BatchSource) -> int:
    """Updates of the run: `max_steps`, or what `epochs` passes over the rows take."""
    return config.max_steps if config.max_steps is not None else source.steps(config.epochs)


def default_batch_size(shards: int, accumulation: int, least: int = 8) -> int:
    """The smallest number of rows from `least` on that forward passes can share out over `shards` devices."""
    unit = shards * accumulation
    return math.ceil(least / unit) * unit


def check_fit(inputs: Inputs, vocab_size: int, max_positions: int) -> None:
    """Raises `UserError` where the data has what the model has not: token ids, or positions."""
    examples = [*inputs.source.examples, *inputs.held_out]
    top = max(int(e.tokens.max()) for e in examples)
    if top >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {top}, the model knows 0 to {vocab_size - 1}",
            place="model",
            remedy="use the tokenizer files that belong to this model",
        )
    longest = max(len(e.tokens) for e in examples)
    if longest > max_positions:
        raise UserError(
            f"a row has {longest} tokens, the model has {max_positions} positions",
            place="max_length",
            remedy=f"set max_length={max_positions}",
        )
