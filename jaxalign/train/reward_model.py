"""A reward or cost model that was trained: one score for every answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.data.rows import Item, members_of
from jaxalign.errors import UserError
from jaxalign.models.base import DTYPES, resolve_dtype
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.passes import each_item
from jaxalign.train.score import rewards


@dataclass(frozen=True)
class RewardModel:
    """A model with the head of a reward model on a mesh, and its tokenizer."""

    loaded: Any
    mesh: Any
    tokenizer: Tokenizer

    def scores(self, items: Sequence[Item], *, rows: int, max_length: int) -> list[np.ndarray]:
        """float32 [G] of the answers of every item, in order; `rows` items a pass."""
        forward = partial(self._compiled, self.loaded.adapter, self.loaded.base, self.loaded.head)
        found = each_item(
            items,
            forward,
            mesh=self.mesh,
            rows=rows,
            max_length=max_length,
            pad_id=self.tokenizer.pad_id,
            what="scoring",
        )
        return [scores[: len(members_of(item))] for item, scores in zip(items, found, strict=True)]

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(partial(rewards, self.loaded.model), out_shardings=everywhere)


def load_reward_model(name: str, dtype: str = "auto", mesh: MeshConfig | None = None) -> RewardModel:
    """What `-m` names. Raises `UserError` where it has no head of a reward model."""
    distributed.use_compile_cache()
    source, devices = resolve(name), make_mesh(mesh or MeshConfig())
    kind = DTYPES[resolve_dtype(dtype)]
    loaded = load_model(source, devices, param_dtype=kind, compute_dtype=kind)
    if loaded.head is None:
        raise UserError(
            "the model gives no rewards: it has no head for them",
            place=name,
            remedy="train one: jaxalign train reward -m MODEL -d PAIRS -o OUT",
        )
    return RewardModel(loaded, devices, load_tokenizer(source))
