"""Which rows a method over compared or judged answers can learn from, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxalign.data.batching import BatchSource
from jaxalign.data.readers import tally
from jaxalign.errors import UserError
from jaxalign.types import Group

Faults = dict[str, tuple[int, tuple[str, ...]]]  # {what is wrong with rows: (how many, first places)}

# What a group may have beside its kind's own aux, where a loss needs it: the name, and how rows say it.
_EXTRA = {"safe": "whether each answer is safe (`is_response_0_safe`, or `safe` in meta)"}


def fit_needs(
    groups: Sequence[Group], objective: Any, name: str, max_bad_rows: float = 0.0
) -> tuple[list[Group], Faults]:
    """(the groups that the objective can learn from, with the aux that it reads and no other; what is wrong
    with the rest). `name` is what messages call the data.

    Raises `UserError` where more than the share `max_bad_rows` is at fault, none is left, or all labels are
    the same.
    """
    faults: Faults = {}
    kept = []
    for group in groups:
        fault = _fault(group.aux, objective)
        if fault is None:
            kept.append(replace(group, aux=_read(group.aux, objective)))
        else:
            tally(faults, fault, group.place or group.id)
    if not kept or len(groups) - len(kept) > max_bad_rows * len(groups):
        raise UserError(
            "; ".join(_said(fault, faults, len(groups)) for fault in faults),
            place=name,
            remedy="mend the rows, leave them out (`select`, another file, or up to the share max_bad_rows), "
            "or train by a method that does not need it",
        )
    _check_labels(kept, objective, name)
    return kept, faults


def lines(faults: Faults, total: int) -> list[str]:
    """The faults in plain lines."""
    return [f"left out {_said(fault, faults, total, ' that')}" for fault in faults]


def _said(fault: str, faults: Faults, total: int, that: str = "") -> str:
    count, places = faults[fault]
    shown = ", ".join(places) + (", ..." if count > len(places) else "")
    return f"{count} of {total} rows{that} {fault}: {shown}"


def _fault(aux: Mapping[str, Any], objective: Any) -> str | None:
    """Why the objective cannot learn from a group with this aux; None where it can."""
    needs = objective.needs
    missing = next((extra for extra in _EXTRA if extra in needs and extra not in aux), None)
    if missing is not None:
        return f"do not say {_EXTRA[missing]}"
    if "margin" in needs and not np.isfinite(aux["margin"]):
        return "have no margin (`margin`, or two scores)"
    if "safe" in needs and aux["safe"][1] and not aux["safe"][0]:
        return "prefer an unsafe answer to a safe one"
    return objective.fault(aux)


def _read(aux: Mapping[str, Any], objective: Any) -> dict[str, Any]:
    return {k: v for k, v in aux.items() if k not in _EXTRA or k in objective.needs}


def _check_labels(groups: Sequence[Group], objective: Any, name: str) -> None:
    if objective.data == "binary" and len({bool(g.aux["label"]) for g in groups}) == 1:
        raise UserError(
            f"all {len(groups)} rows have the label {bool(groups[0].aux['label'])}",
            place=name,
            remedy="the method compares wanted with unwanted answers: add rows of the other label",
        )


def check_batches(config: Any, objective: Any) -> None:
    """Raises `UserError` where a loss over the rows of an update together does not get them together."""
    if "whole_batch" not in objective.needs:
        return
    if config.grad_accumulation > 1:
        raise UserError(
            "the loss looks at all rows of an update at once, which grad_accumulation cuts into parts",
            place="grad_accumulation",
            remedy="set it to 1, and remat=full or more devices if memory is short",
        )
    for key in ("batch_size", "eval_batch_size"):
        if getattr(config, key) == 1:
            raise UserError(
                f"the loss compares the rows of a batch with each other, and {key}=1 holds no other",
                place=key,
                remedy="set it to 2 or more; 16 is a good start",
            )


def one_sided(source: BatchSource, objective: Any, say: Callable[[str], None]) -> int:
    """How many updates of the first epoch hold answers of one label only, where the loss looks at those of a
    whole batch; `say` hears of it. The loss of such an update is finite, and compares nothing."""
    if objective.data != "binary" or "whole_batch" not in objective.needs:
        return 0
    wanted = np.asarray([bool(group.aux["label"]) for group in source.examples])
    steps = range(source.steps_per_epoch)
    labels = (wanted[[source.rows[row][0] for row in source.row_indices(i).ravel()]] for i in steps)
    count = sum(bool(label.all() or not label.any()) for label in labels)
    if count:
        say(
            f"warning: {count} of {len(steps)} updates of an epoch hold answers of one label only ("
            f"{wanted.mean():.0%} of all are wanted): raise batch_size={source.batch_size}, or balance them"
        )
    return count
