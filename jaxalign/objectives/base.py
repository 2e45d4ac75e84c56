"""What an objective is: a frozen config block with one method, over scores that somebody else computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from jaxalign.types import Batch

# A metric travels as (sum, weight) and is divided once, over all micro-batches, devices and packed rows.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Scores of every target token under one model, float32 [B, G, T], aligned with `Batch.tokens`.

    logp         log p(token | everything before it in its segment); 0 where `mask` is False
    logsumexp    of the logits that predict the token
    mean_logit   their mean over the vocabulary (only where the objective needs it, else zeros)
    correct      1.0 where the token is the most likely one
    entropy      of the predicting distribution, in nats (no gradient)
    mask         bool, the targets that count: `Batch.mask` less the first token of each segment
    """

    logp: Any
    logsumexp: Any
    mean_logit: Any
    correct: Any
    entropy: Any
    mask: Any


class Objective(Protocol):
    """A loss. `group` is the G of its batches; `needs` names what `Scores` must hold beyond the log-probs."""

    group: ClassVar[int]
    needs: ClassVar[frozenset[str]]

    def __call__(self, scores: Scores, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
        """(sum of the loss, its weight, metrics): the loss of a step is sum / weight over all its parts."""
        ...
