"""Forward passes over a whole data set: every item once, results in the order of the items."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from jaxalign import distributed
from jaxalign.data.batching import by_length, local_rows
from jaxalign.data.rows import Item, arrange, in_blocks
from jaxalign.sharding import data_shards
from jaxalign.train.feed import place
from jaxalign.types import Batch


def each_item(
    items: Sequence[Item],
    forward: Callable[[Batch], Any],
    *,
    mesh: Mesh,
    rows: int,
    max_length: int,
    pad_id: int,
    what: str,
) -> list[np.ndarray]:
    """[G, ...] of every item: its row of what `forward` makes of placed batches [B, G, T], an array
    [B, G, ...] that every process holds whole. `rows` rows a pass, the shortest first; `what` names the
    progress bar."""
    table = arrange(items, max_length=max_length, share=True, pad_id=pad_id)
    found: list[Any] = [None] * len(items)
    mine = local_rows(rows, distributed.process_index(), distributed.process_count())
    seen = distributed.is_first() and sys.stderr.isatty()
    console = Console(stderr=True)
    passes = list(by_length(table, rows))
    table = in_blocks(table, rows // data_shards(mesh), passes)
    for wanted in track(passes, what, console=console, transient=True, disable=not seen):
        batch = place(table.batch(wanted, mine), mesh, 0)
        for row, values in zip(wanted.tolist(), np.asarray(forward(batch)), strict=True):
            if row >= 0:  # the last pass is filled up
                found[row] = values
    return found
