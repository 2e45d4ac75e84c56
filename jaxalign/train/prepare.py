"""What a model tells about the data before the first step: the reference's log-probs, how much prompts of one
label are like those of the other, the gaps of stages.

All are kept in files of the run's folder, so that a run that is resumed, perhaps on other devices, goes on
with the very numbers it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, cast

import numpy as np

from jaxalign.data.rows import Item, members_of
from jaxalign.errors import UserError
from jaxalign.train.assemble import Machine
from jaxalign.train.density import density_weights, vectors_of_prompts
from jaxalign.train.folder import RunFolder
from jaxalign.train.inputs import Inputs, make_source
from jaxalign.train.precompute import Subject, digest, kept, with_log_probs
from jaxalign.types import Group

GAPS_FILE = Subject(
    "gaps of the stages", "delete the file if no update was made yet, else go on with the same model and data"
)

WEIGHTS_FILE = Subject("weights of the rows", GAPS_FILE.remedy)

Gaps = Callable[[Machine, Sequence[Item], dict[str, Any]], np.ndarray]


def reference_gaps(machine: Machine, items: Sequence[Item], how: dict[str, Any]) -> np.ndarray:
    """float64 [n]: log-prob of chosen less rejected under the model that the run starts from."""
    known = [m.aux["ref"] for item in items for m in members_of(item) if "ref" in m.aux]
    return _gaps(known or machine.reference().log_probs(items, **how), items)


def implicit_margins(machine: Machine, items: Sequence[Item], how: dict[str, Any]) -> np.ndarray:
    """float64 [n]: DPO's implicit margin without beta, of the model that the run starts from over its base.

    Raises `UserError` where both are one, or are not told apart any more.
    """
    weights = machine.weights
    if weights.full or not weights.imported:
        cause = "the adapter is folded into the weights" if weights.full else "the run starts from its base"
        raise UserError(
            f"{cause}: there is no margin of one over the other",
            place="stages.by",
            remedy="start from a run that trained an adapter and train it on, or set stages.by=ref_logp_gap",
        )
    policy = machine.reference()
    base = replace(policy, adapter=None)
    return _gaps(policy.log_probs(items, **how), items) - _gaps(base.log_probs(items, **how), items)


# What sorts pairs and takes a model, by its name in `StagesConfig.by`.
GAPS: dict[str, Gaps] = {"ref_logp_gap": reference_gaps, "implicit_margin": implicit_margins}


def _gaps(log_probs: Sequence[np.ndarray], items: Sequence[Item]) -> np.ndarray:
    """float64 [n]: sums over the targets, of the chosen answer less the rejected one; `log_probs` [T] of all
    answers in their order."""
    rest = iter(log_probs)
    sums = [[float(next(rest)[m.mask].sum(dtype=np.float64)) for m in members_of(item)] for item in items]
    return np.asarray([chosen - rejected for chosen, rejected in sums])


@dataclass(frozen=True)
class Preparation:
    """Turns inputs as they were read into those that the run trains on. `method` is named in errors."""

    method: str
    machine: Machine
    folder: RunFolder
    pad_id: int
    say: Callable[[str], None]

    def of(self, inputs: Inputs) -> Inputs:
        """The inputs, with what the reference policy and the stages ask for. Raises `UserError`."""
        if self.machine.mode == "precomputed":
            inputs = self._with_reference(inputs)
        if "weight" in self.machine.objective.needs:
            inputs = self._weighted(inputs)
        stages = getattr(self.machine.config, "stages", None)
        return self._sorted(inputs, stages.by) if stages is not None and stages.by in GAPS else inputs

    @property
    def _how(self) -> dict[str, Any]:
        """How passes over the rows are made."""
        c = self.machine.config
        rows = -(-(c.batch_size or 1) // c.grad_accumulation)
        return {"rows": rows, "max_length": c.max_length, "pad_id": self.pad_id}

    def _with_reference(self, inputs: Inputs) -> Inputs:
        """The inputs with the reference's log-probs, from its file or computed and written there."""
        if inputs.source.rotated:
            raise UserError(
                f"{self.method} compares each prompt with answers of other rows, drawn anew in every step",
                place="reference.mode",
                remedy="leave reference.mode out: precomputed needs answers that stay with their prompts",
            )
        c: Any = self.machine.config
        train = inputs.source.examples
        items = with_log_probs(
            [*train, *inputs.held_out],
            self.machine.reference(),
            c.reference.cache or self.folder.path / "reference.npz",
            self.say,
            **self._how,
        )
        return self._renewed(inputs, items)

    def _weighted(self, inputs: Inputs) -> Inputs:
        """The inputs with aux `weight` on every row, from its file or computed and written there."""
        machine, train = self.machine, inputs.source.examples
        items = [cast(Group, item) for item in (*train, *inputs.held_out)]
        wanted = np.asarray([bool(item.aux["label"]) for item in items])

        def compute() -> np.ndarray:
            base = machine.reference().base
            vectors = vectors_of_prompts(machine.weights.model, base, machine.mesh, items, **self._how)
            return density_weights(vectors, wanted, len(train))

        made_from = {
            "weights": machine.reference().identity,
            "rows": digest(items),
            "labels": sha256(wanted.tobytes()).hexdigest(),
        }
        weights = kept(self.folder.path / "weights.npz", made_from, compute, WEIGHTS_FILE, self.say)
        least, most = weights[~wanted].min(), weights[~wanted].max()
        self.say(f"udm: {(~wanted).sum()} unwanted answers count {least:.2f} to {most:.2f} times")
        return self._renewed(
            inputs,
            [replace(i, aux=i.aux | {"weight": float(w)}) for i, w in zip(items, weights, strict=True)],
        )

    def _renewed(self, inputs: Inputs, items: Sequence[Item]) -> Inputs:
        """The inputs with other `items` in place of theirs, in their order."""
        train = len(inputs.source.examples)
        source = make_source(items[:train], self.machine.config, self.machine.objective, self.pad_id)
        return replace(inputs, source=source, held_out=list(items[train:]))

    def _sorted(self, inputs: Inputs, by: str) -> Inputs:
        """The inputs with their pairs in stages by a gap that the model tells."""
        machine, items = self.machine, inputs.source.examples
        made_from = {"weights": machine.reference().identity, "rows": digest(items), "sort": by}
        gaps = kept(
            self.folder.path / "stages.npz",
            made_from,
            partial(GAPS[by], machine, items, self._how),
            GAPS_FILE,
            self.say,
        )
        return inputs.with_source(make_source(items, machine.config, machine.objective, self.pad_id, gaps))
