"""Log-probs of a reference policy, computed once before the first step and kept in a file.

The file says what it was computed from: the weights, and the tokens of every answer in their order. It is
refused where either is not the run's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import distributed
from jaxalign.data.rows import Item, members_of
from jaxalign.errors import UserError
from jaxalign.models.decoder import Model
from jaxalign.train.passes import each_item
from jaxalign.train.score import score
from jaxalign.types import Example, Group, Params


@dataclass(frozen=True)
class Reference:
    """The weights of a reference policy on a mesh. `identity` says which weights they are; its logits are
    divided by `temperature`."""

    model: Model
    adapter: Params | None
    base: Params
    mesh: Any
    identity: str
    temperature: float = 1.0

    def log_probs(
        self, items: Sequence[Item], *, rows: int, max_length: int, pad_id: int
    ) -> list[np.ndarray]:
        """float32 [T] of every answer of `items`, in their order: `rows` rows a pass, the shortest first."""
        forward = partial(self._compiled, self.adapter, self.base)
        how = {"rows": rows, "max_length": max_length, "pad_id": pad_id, "what": "reference"}
        found = each_item(items, forward, mesh=self.mesh, **how)
        out: list[np.ndarray] = []
        for item, logp in zip(items, found, strict=True):
            members = members_of(item)
            out += [x[: len(m.tokens)] for m, x in zip(members, logp[: len(members)], strict=True)]
        return out

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        """logp [B, G, T] of a whole batch, on every process."""
        forward = partial(score, self.model, compact=self.mesh.size == 1, temperature=self.temperature)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(lambda *args: forward(*args).logp, out_shardings=everywhere)


@dataclass(frozen=True)
class Subject:
    """What a file of numbers is about, in words, and what helps where they are not the run's."""

    name: str
    remedy: str


LOG_PROBS = Subject(
    "reference log-probs",
    "delete the file, or name another one with reference.cache: they are computed again",
)


def with_log_probs(
    items: Sequence[Item], reference: Reference, file: Path, say: Callable[[str], None], **how: Any
) -> list[Item]:
    """The groups with aux `ref` on every member, from `file` or computed and written there.

    `how` is that of `Reference.log_probs`. Raises `UserError` for a file of other weights or other rows.
    """
    asked = {"weights": reference.identity, "rows": digest(items)}
    flat = kept(file, asked, lambda: np.concatenate(reference.log_probs(items, **how)), LOG_PROBS, say)
    at, out = 0, []
    for item in items:
        members = []
        for member in members_of(item):
            end = at + len(member.tokens)
            members.append(replace(member, aux=member.aux | {"ref": flat[at:end]}))
            at = end
        out.append(replace(cast(Group, item), members=tuple(members)))
    return out


def kept(
    file: Path,
    made_from: dict[str, str],
    compute: Callable[[], np.ndarray],
    subject: Subject,
    say: Callable[[str], None],
) -> np.ndarray:
    """Numbers [n] from `file`, or computed and written there. Raises `UserError` where the file's were made
    from anything else."""
    if file.exists():
        flat = _read(file, made_from, subject)
        say(f"{subject.name} read from {file}")
        return flat
    flat = compute()
    _write(file, made_from, flat)
    say(f"{subject.name} computed, kept in {file}")
    return flat


def digest(items: Sequence[Item]) -> str:
    """sha256 over token ids and masks of all answers in their order."""
    found = hashlib.sha256()

    def add(example: Example) -> None:
        found.update(len(example.tokens).to_bytes(8, "little"))
        found.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
        found.update(np.packbits(example.mask).tobytes())

    for item in items:
        for member in members_of(item):
            add(member)
    return found.hexdigest()


def _read(file: Path, asked: dict[str, str], subject: Subject) -> np.ndarray:
    try:
        with np.load(file) as saved:
            made, flat = json.loads(str(saved["made_from"])), saved["logp"]
    except (OSError, ValueError, KeyError) as error:
        remedy = "delete it: it is computed again"
        raise UserError(f"not a file of {subject.name}: {error}", place=str(file), remedy=remedy) from error
    other = [name for name, value in asked.items() if made.get(name) != value]
    if other:
        raise UserError(
            f"these {subject.name} are of other {' and '.join(other)} than the run's",
            place=str(file),
            remedy=subject.remedy,
        )
    return flat


def _write(file: Path, made_from: dict[str, str], flat: np.ndarray) -> None:
    if not distributed.is_first():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".tmp.npz")
    np.savez(draft, logp=flat, made_from=json.dumps(made_from))
    os.replace(draft, file)
