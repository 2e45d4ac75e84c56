"""From the data argument to batches: rows, tokens, the held-out part, and what became of every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import distributed
from jaxalign.data.batching import BatchSource, eval_batches, permutation
from jaxalign.data.chat import Tokenizer
from jaxalign.data.readers import LoadReport, read_groups, read_records
from jaxalign.data.rows import Item, members_of
from jaxalign.data.tokenize import TokenizeReport, tokenize, tokenize_groups
from jaxalign.errors import UserError
from jaxalign.train import needs
from jaxalign.train.settings import TrainConfig
from jaxalign.train.stages import check_stages, make_order
from jaxalign.types import Batch, Example, Group

Data = str | Path | Sequence[str | Path]

HELD_OUT = 2**31  # the "epoch" whose order picks the held-out rows: none that training reaches


@dataclass(frozen=True)
class Inputs:
    """What a run trains on (`source`) and is evaluated on (`held_out`, maybe nothing), and the report."""

    source: BatchSource
    held_out: list[Item]
    report: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this data this data: a checkpoint of other data is refused, with what differs."""
        stats = self.source.stats
        return {"fingerprint": self.source.fingerprint, "examples": stats.examples, "tokens": stats.tokens}

    def in_blocks(self, blocks: int) -> Inputs:
        """The same rows, laid out for micro-batches that lie on so many devices."""
        source = self.source.in_blocks(blocks)
        batches = self.report["batches"] | _laid_out(source)
        return replace(self, source=source, report=self.report | {"batches": batches})

    def with_source(self, source: BatchSource) -> Inputs:
        """The same rows in another order."""
        return replace(self, source=source, report=self.report | {"stages": source.order.report()})


def read_inputs(
    data: Data, tokenizer: Tokenizer, config: TrainConfig, objective: Any, say: Callable[[str], None]
) -> Inputs:
    """Reads, tokenises and splits the data; `say` gets the report's lines. `config` must be resolved.

    Raises `UserError` for data that cannot be used, that lacks what the objective needs, or that leaves
    nothing to train on.
    """
    _check_keys(config, objective)
    reader = _Reader(tokenizer, config, objective, say)
    read = reader.imitated if objective.data == "sft" else reader.compared
    items, report = read(data, "data")
    held_out: list[Item] = []
    if config.eval_data is not None:
        held_out, report["eval"] = read(config.eval_data, "eval data")
    elif config.eval_fraction:
        items, held_out = split(items, config.eval_fraction, config.seed)
        say(f"data: {len(held_out)} of {len(held_out) + len(items)} examples are held out for evaluation")
    inputs = Inputs(make_source(items, config, objective, tokenizer.pad_id), held_out, report)
    report["batches"] = _laid_out(inputs.source) | {
        "held_out": len(held_out),
        "one_sided_steps": needs.one_sided(inputs.source, objective, say),
    }
    return inputs.with_source(inputs.source)


def _laid_out(source: BatchSource) -> dict[str, Any]:
    """What the report says of rows and padding."""
    layouts = [list(shape) for shape in source.layouts]
    return asdict(source.stats) | {"row_lengths": list(source.lengths), "shared_rows": layouts}


def read_examples(
    data: Data, tokenizer: Tokenizer, config: TrainConfig, say: Callable[[str], None], name: str
) -> list[Example]:
    """Rows to imitate, in tokens; `name` is what messages call them. Raises `UserError` as `read_inputs`."""
    items, _ = _Reader(tokenizer, config, None, say).imitated(data, name)
    return [item for item in items if isinstance(item, Example)]


def make_source(
    items: Sequence[Item], config: TrainConfig, objective: Any, pad_id: int, gaps: np.ndarray | None = None
) -> BatchSource:
    """The training batches of this process. `config` must be resolved; `gaps` are those of `make_order`."""
    return BatchSource(
        items,
        batch_size=config.batch_size or len(items),
        accumulation=config.grad_accumulation,
        max_length=config.max_length,
        packing=config.packing,
        group=objective.group,
        share=_share(config),
        seed=config.seed,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        pad_id=pad_id,
        order=make_order(items, config, gaps),
    )


def _share(config: TrainConfig) -> bool:
    # NEFTune's noise is scaled by the length of a segment, which a shared prompt cuts in two.
    return getattr(config, "share_prompt", False) and not config.neftune_alpha


def _check_keys(config: TrainConfig, objective: Any) -> None:
    """Raises `UserError` for settings that do not go with the objective."""
    check_stages(config, objective)
    needs.check_batches(config, objective)
    if objective.data != "sft" and config.loss_on is not None:
        raise UserError(
            "the answers that are compared are what is learned",
            place="loss_on",
            remedy="leave it out; it belongs to sft",
        )


@dataclass(frozen=True)
class _Reader:
    """From the data argument to tokens; `say` gets the lines of the reports."""

    tokenizer: Tokenizer
    config: Any
    objective: Any
    say: Callable[[str], None]

    def imitated(self, data: Data, name: str) -> tuple[list[Item], dict[str, Any]]:
        """Examples to imitate, and the report."""
        c = self.config
        records, loaded = read_records(data, max_bad_rows=c.max_bad_rows)
        examples, tokenized = tokenize(records, self.tokenizer, c.max_length, c.truncation, c.loss_on)
        return list(examples), self._report(name, loaded, tokenized)

    def compared(self, data: Data, name: str) -> tuple[list[Item], dict[str, Any]]:
        """Groups of answers that are compared or judged, and the report."""
        c, kind = self.config, self.objective.data
        records, loaded = read_groups(data, kind, options=c.options, max_bad_rows=c.max_bad_rows)
        groups, tokenized = tokenize_groups(records, self.tokenizer, c.max_length, c.truncation)
        report = self._report(name, loaded, tokenized)
        kept, faults = needs.fit_needs(groups, self.objective, name, c.max_bad_rows)
        for line in needs.lines(faults, len(groups)):
            self.say(f"{name}: {line}")
        return list(kept), report | {"needs": faults}

    def _report(self, name: str, loaded: LoadReport, tokenized: TokenizeReport) -> dict[str, Any]:
        for line in (*loaded.lines(), *tokenized.lines()):
            self.say(f"{name}: {line}")
        return {"rows": asdict(loaded), "tokens": asdict(tokenized)}


def split(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items, each in the order of the data: a function of data, fraction and seed.

    Groups of one family stay together, so that no held-out prompt is trained on. At least one item is held
    out. Raises `UserError` when none is left to train on.
    """
    names = [item.family if isinstance(item, Group) else item.id for item in items]
    families = list(dict.fromkeys(names))
    count = max(1, round(fraction * len(families)))
    if count >= len(families):
        raise UserError(
            f"eval_fraction={fraction:g} of {len(items)} examples leaves none to train on",
            place="eval_fraction",
            remedy="lower it, or name held-out rows with eval_data",
        )
    picked = {families[i] for i in permutation(seed, HELD_OUT, len(families))[:count]}
    train = [item for item, name in zip(items, names, strict=True) if name not in picked]
    return train, [item for item, name in zip(items, names, strict=True) if name in picked]


def held_out_batches(
    inputs: Inputs, config: TrainConfig, objective: Any, pad_id: int, rows: int, blocks: int
) -> list[Batch]:
    """The evaluation set as host batches [B_local, G, T], `rows` rows each over all processes, in `blocks`
    blocks."""
    if not inputs.held_out:
        return []
    batches = eval_batches(
        inputs.held_out,
        batch_size=rows,
        max_length=config.max_length,
        packing=config.packing,
        group=objective.group,
        share=_share(config),
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
        pad_id=pad_id,
        blocks=blocks,
    )
    return list(batches)


def total_steps(config: TrainConfig, source: BatchSource) -> int:
    """Updates of the run: `max_steps`, or what `epochs` passes over the rows take."""
    return config.max_steps if config.max_steps is not None else source.steps(config.epochs)


def default_batch_size(shards: int, accumulation: int, least: int = 8) -> int:
    """The smallest number of rows from `least` on that forward passes can share out over `shards` devices."""
    unit = shards * accumulation
    return math.ceil(least / unit) * unit


def check_fit(inputs: Inputs, vocab_size: int, max_positions: int, virtual: int = 0) -> None:
    """Raises `UserError` where the data has what the model has not: token ids, or positions. `virtual` tokens
    of an adapter stand before every row."""
    examples = [e for item in (*inputs.source.examples, *inputs.held_out) for e in members_of(item)]
    top = max(int(e.tokens.max()) for e in examples)
    if top >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {top}, the model knows 0 to {vocab_size - 1}",
            place="model",
            remedy="use the tokenizer files that belong to this model",
        )
    longest = max(len(e.tokens) for e in examples)
    if longest + virtual > max_positions:
        more = f" behind {virtual} virtual ones" if virtual else ""
        raise UserError(
            f"a row has {longest} tokens{more}, the model has {max_positions} positions",
            place="max_length",
            remedy=f"set max_length={max_positions - virtual}",
        )
