"""Pairs in stages: which rows each one takes, and whether each one has its own reference.

Curry-DPO (arXiv:2403.07230) goes from easy pairs to hard ones, sDPO (arXiv:2403.19270) from chunk to chunk;
both compare a stage with the policy that the stage before it ended with. One run holds all stages: one
schedule, one optimiser, one checkpoint folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.order import Stage, Staged, by_file, by_gap, in_order, stage_ends
from jaxalign.errors import UserError
from jaxalign.types import Group

By = Literal["order", "source", "rating_gap", "ref_logp_gap", "implicit_margin"]

USUAL = 3  # stages of Curry-DPO


class StagesConfig(Config):
    """Pairs that are learned in stages, one after another; `epochs` then counts passes over each stage."""

    count: int | None = Field(default=None, ge=2)
    """how many stages; null takes 3, or with by=source one for each file"""
    by: By = "order"
    """what puts a pair into its stage. order: the rows as they stand in the data; source: a stage for each
    file; the others sort the pairs, the largest first. rating_gap: the margin of the row (Curry-DPO);
    ref_logp_gap: log-prob of chosen less rejected under the model that the run starts from; implicit_margin:
    the same, less that of the base without the adapter that the run starts from"""
    new_reference: bool = True
    """compare each stage with the policy that the stage before it ended with (sDPO); false keeps one
    reference. Losses without a reference have none to renew"""


def renewed(config: Any) -> bool:
    """Whether each stage of a run has its own reference."""
    stages: StagesConfig | None = getattr(config, "stages", None)
    return stages is not None and stages.new_reference


def check_stages(config: Any, objective: Any) -> None:
    """Raises `UserError` for stages of a method that does not learn from pairs."""
    if getattr(config, "stages", None) is not None and objective.data != "pairs":
        raise UserError(
            f"stages are made of pairs, and the method learns from {objective.data}",
            place="stages",
            remedy="leave them out, or train by a method that learns from pairs, such as dpo",
        )


def make_order(items: Sequence[Any], config: Any, gaps: np.ndarray | None = None) -> Staged | None:
    """The order of the training pairs in stages, None without them. `config` must be resolved.

    gaps [n]: what the pairs are sorted by, where that takes a model; before they are known the rows go as
    they stand, in stages of the same sizes. Raises `UserError` for pairs that do not make these stages.
    """
    asked: StagesConfig | None = getattr(config, "stages", None)
    if asked is None:
        return None
    if gaps is None:
        stages = ARRANGED[asked.by](items, asked.count)
    else:
        stages = by_gap(gaps, asked.count or USUAL, asked.by)
    ends = stage_ends(stages, config.batch_size, config.epochs, config.max_steps)
    return Staged(stages, ends, config.batch_size, config.seed)


def _as_they_stand(items: Sequence[Group], count: int | None) -> list[Stage]:
    return in_order(len(items), count or USUAL)


def _by_rating(items: Sequence[Group], count: int | None) -> list[Stage]:
    margins = np.asarray([item.aux["margin"] for item in items], np.float64)
    unknown = np.flatnonzero(~np.isfinite(margins))
    if unknown.size:
        raise UserError(
            f"{unknown.size} of {len(items)} rows have no margin (`margin`, or two scores): "
            + ", ".join(items[i].id for i in unknown[:3]),
            place="stages.by",
            remedy="leave those rows out, or sort by ref_logp_gap, which takes the model's log-probs",
        )
    return by_gap(margins, count or USUAL, "rating_gap")


def _by_source(items: Sequence[Group], count: int | None) -> list[Stage]:
    stages = by_file([item.place.rpartition(":")[0] for item in items])  # a place ends on the line
    if len(stages) != (count or max(2, len(stages))):
        raise UserError(
            f"the rows come from {len(stages)} file(s), and not {count or 'from several'}",
            place="stages.count" if count else "stages.by",
            remedy="leave stages.count out and give a folder with a file for each stage, named in order",
        )
    return stages


# What the rows alone tell. What takes a model is measured in `prepare`; the rows go as they stand until then.
ARRANGED: dict[By, Callable[[Sequence[Group], int | None], list[Stage]]] = {
    "order": _as_they_stand,
    "source": _by_source,
    "rating_gap": _by_rating,
    "ref_logp_gap": _as_they_stand,
    "implicit_margin": _as_they_stand,
}
