"""As many rows of one class as of another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxalign.data.pieces import noted
from jaxalign.errors import UserError, nearest
from jaxalign.synth.base import Work
from jaxalign.synth.quality.items import Fault, Item, Sieved


def balance(items: Sequence[Item], work: Work) -> Sieved:
    """Rows over the cap of their class, by lot, and rows without a class. Raises `UserError` if none has one.

    A row's lot is a function of the seed and its id, whatever other rows there are.
    """
    key, seed = work.config.balance, work.config.seed
    classes = [noted(item.row, key) for item in items]
    counts = Counter(name for name in classes if name is not None)
    if items and not counts:
        known = sorted({name for item in items for name in _keys(item.row)})
        remedy = f"keys of the rows and their meta: {', '.join(known)}"
        raise UserError(f"no row has {key!r}{nearest(key, known)}", place="balance", remedy=remedy)
    cap = work.config.balance_cap or min(counts.values(), default=0)
    faults: dict[int, Fault] = {}
    for name in counts:
        members = [i for i, found in enumerate(classes) if found == name]
        members.sort(key=lambda i: (_lot(seed, items[i].id), i))
        faults |= {i: Fault(f"balance: over the cap of {key}", name) for i in members[cap:]}
    faults |= {i: Fault(f"balance: no {key}") for i, name in enumerate(classes) if name is None}
    before = dict(sorted(counts.items()))
    return Sieved(
        faults, {"cap": cap, "before": before, "after": {n: min(c, cap) for n, c in before.items()}}
    )


def _keys(row: Any) -> set[str]:
    meta = row.get("meta")
    return {str(key) for key in [*row, *(meta if isinstance(meta, dict) else ())]}


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
