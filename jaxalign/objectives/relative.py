"""Relative preference optimisation: a chosen answer against the rejected ones of other prompts as well.

Every row of a step is compared with all others, so these losses want the whole batch at once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, softmax
from pydantic import Field

from jaxalign.objectives.answers import Pair, Result, answers, reduce_pairs
from jaxalign.objectives.base import Scores
from jaxalign.objectives.pairwise import REFERENCE, Paired
from jaxalign.objectives.unpaired import Labelled, reduce_rows
from jaxalign.types import Batch

_ABSENT = -1e30  # in a softmax over nothing this still leaves numbers


class RelativeRPO(Paired):
    """Relative preference optimisation (arXiv:2402.10958) over the n pairs of a step:
    L_i = mean_j -log s(beta w_ij (D_w,i - D_l,j)), w_i = softmax_j(-(1 - cos(e_i, e_j)) / t), e the prompts'
    vectors. `diagonal` takes w for the weight of a loss: d for i = j, (1 - d) / (n - 1) for the others."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"whole_batch", "prompt"}

    contrast: Literal["similarity", "diagonal"] = "similarity"
    """what another prompt's rejected answer counts: more for a similar prompt, or the same for all"""
    temperature: float = Field(default=0.5, gt=0)
    """t: lower looks at similar prompts only; no use under contrast=diagonal"""
    diagonal: float = Field(default=0.8, ge=0, le=1)
    """d: weight of a pair's own rejected answer under contrast=diagonal"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the pairs, and their number."""
        pair, present = Pair.of(scores, batch), scores.mask.any(axis=-1).all(axis=-1)
        return reduce_pairs(self.loss(pair, scores.prompt, present), self.reward, pair, scores)

    def loss(self, pair: Pair, prompt: jax.Array, present: jax.Array) -> jax.Array:
        """float32 [B] of pairs, prompts' vectors [B, D] and which pairs are not padding [B]."""
        z = self.beta * (pair.chosen.ratio[:, None] - pair.rejected.ratio[None])
        return CONTRASTS[self.contrast](self, z, prompt, present)


def _by_similarity(o: RelativeRPO, z: jax.Array, prompt: jax.Array, present: jax.Array) -> jax.Array:
    weight = _weights(prompt, o.temperature, present)
    each = jnp.where(present[None], -log_sigmoid(weight * z), 0.0)
    return each.sum(axis=-1) / jnp.maximum(present.sum(), 1)


def _weights(prompt: jax.Array, temperature: float, seen: jax.Array) -> jax.Array:
    """softmax_j(-(1 - cos(e_i, e_j)) / t) [B, B] over the j that are `seen` [B]; no gradient."""
    unit = prompt / jnp.maximum(jnp.linalg.norm(prompt, axis=-1, keepdims=True), 1e-12)
    nearness = (unit @ unit.T - 1) / temperature
    return jax.lax.stop_gradient(softmax(jnp.where(seen[None], nearness, _ABSENT), axis=-1))


def _by_diagonal(o: RelativeRPO, z: jax.Array, prompt: jax.Array, present: jax.Array) -> jax.Array:
    each = -log_sigmoid(z)
    others = jnp.where(present[None] & ~jnp.eye(len(present), dtype=bool), each, 0.0).sum(axis=-1)
    mean = others / jnp.maximum(present.sum() - 1, 1)
    return o.diagonal * jnp.diagonal(each) + (1 - o.diagonal) * mean


CONTRASTS = {"similarity": _by_similarity, "diagonal": _by_diagonal}


class RelativeUnpaired(Labelled):
    """Relative preference optimisation over single answers (arXiv:2402.10958, unpaired): the wanted answers i
    of a step against all unwanted ones j, L_i = mean_j -log s(beta w_ij (D_i - D_j)),
    w_i = softmax_j(-(1 - cos(e_i, e_j)) / t), e the prompts' vectors."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"whole_batch", "prompt"}

    temperature: float = Field(default=0.5, gt=0)
    """t: lower looks at similar prompts only"""

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The sum over the wanted rows, and their number; both are 0 in a step that has one label only."""
        own, label = answers(scores).member(0), batch.aux["label"]
        present = own.length > 0
        loss, counts = self.loss(own.ratio, scores.prompt, present & label, present & ~label)
        _, _, metrics = reduce_rows(loss, self.reward(own), own, label)
        return jnp.where(counts, loss, 0.0).sum(), counts.sum().astype(jnp.float32), metrics

    def loss(
        self, ratio: jax.Array, prompt: jax.Array, wanted: jax.Array, unwanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(float32 [B], bool [B] of the rows that it is a loss of)."""
        z = self.beta * _weights(prompt, self.temperature, unwanted) * (ratio[:, None] - ratio[None])
        each = jnp.where(unwanted[None], -log_sigmoid(z), 0.0)
        return each.sum(axis=-1) / jnp.maximum(unwanted.sum(), 1), wanted & unwanted.any()
