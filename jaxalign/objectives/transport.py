"""Alignment by optimal transport (arXiv:2406.05882): the distribution of margins, not each margin, is moved.

Sorting mixes all pairs of a step, so these losses want the whole batch at once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxalign.objectives.answers import Pair, Result, reduce_pairs
from jaxalign.objectives.base import Scores
from jaxalign.objectives.pairwise import REFERENCE, Paired
from jaxalign.types import Batch

_BEHIND = 1e30  # where pairs that are padding are sorted to


def over_sorted(objective: Any, scores: Scores, batch: Batch) -> Result:
    """The sum of `loss` over the pairs, those that are not padding in front, and their number."""
    pair, present = Pair.of(scores, batch), scores.mask.any(axis=-1).all(axis=-1)
    loss = objective.loss(pair, present)
    _, count, metrics = reduce_pairs(loss, objective.reward, pair, scores)
    front = jnp.arange(len(loss)) < present.sum()
    return jnp.where(front, loss, 0.0).sum(), count, metrics


class AOT(Paired):
    """L = -log s(beta (sort(log p_w - log p_l) - sort(log ref_w - log ref_l)))."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"whole_batch"}

    __call__ = over_sorted

    def loss(self, pair: Pair, present: jax.Array) -> jax.Array:
        """float32 [B], in the order of the sorted margins."""
        policy = _sorted(pair.chosen.logp - pair.rejected.logp, present)
        return -log_sigmoid(self.beta * (policy - _sorted(pair.chosen.ref - pair.rejected.ref, present)))


class AOTUnpaired(Paired):
    """L = -log s(beta (sort(D_w) - sort(D_l))): the chosen and the rejected need not belong together."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"whole_batch"}

    __call__ = over_sorted

    def loss(self, pair: Pair, present: jax.Array) -> jax.Array:
        """float32 [B], in the order of the sorted log-ratios."""
        gap = _sorted(pair.chosen.ratio, present) - _sorted(pair.rejected.ratio, present)
        return -log_sigmoid(self.beta * gap)


def _sorted(x: jax.Array, present: jax.Array) -> jax.Array:
    """Ascending, padding behind."""
    return jnp.sort(jnp.where(present, x, _BEHIND))
