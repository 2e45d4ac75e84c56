"""Relative preference optimisation: a chosen answer against the rejected ones of other prompts as well.

Every pair of a step is compared with all others, so this loss wants the whole batch at once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, softmax
from pydantic import Field

from jaxalign.objectives.answers import Pair, Result, reduce_pairs
from jaxalign.objectives.base import Scores
from jaxalign.objectives.pairwise import REFERENCE, Paired
from jaxalign.types import Batch


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
    unit = prompt / jnp.maximum(jnp.linalg.norm(prompt, axis=-1, keepdims=True), 1e-12)
    nearness = (unit @ unit.T - 1) / o.temperature
    # A padded row keeps one finite entry, so that its softmax is finite before it is left out.
    seen = present[None] | jnp.eye(len(present), dtype=bool)
    weight = jax.lax.stop_gradient(softmax(jnp.where(seen, nearness, -jnp.inf), axis=-1))
    each = jnp.where(present[None], -log_sigmoid(weight * z), 0.0)
    return each.sum(axis=-1) / jnp.maximum(present.sum(), 1)


def _by_diagonal(o: RelativeRPO, z: jax.Array, prompt: jax.Array, present: jax.Array) -> jax.Array:
    each = -log_sigmoid(z)
    others = jnp.where(present[None] & ~jnp.eye(len(present), dtype=bool), each, 0.0).sum(axis=-1)
    mean = others / jnp.maximum(present.sum() - 1, 1)
    return o.diagonal * jnp.diagonal(each) + (1 - o.diagonal) * mean


CONTRASTS = {"similarity": _by_similarity, "diagonal": _by_diagonal}
