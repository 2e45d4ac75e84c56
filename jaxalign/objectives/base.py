"""What an objective is: a frozen config block with one method, over scores that somebody else computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from jaxalign.config import Config
from jaxalign.types import Batch

RIVALS = 8  # how many `Scores.rivals` there are

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
    collision    log sum_v p_v^2 of the predicting distribution (no gradient; only where needed, else None)
    ref          `logp` under the reference model (no gradient; only where needed, else None)
    rivals       [B, G, T, 8] log-probs of the 8 likeliest tokens other than this one, from the likeliest on
                 (only where needed, else None)
    prompt       [B, D] a vector of what each prompt is about (no gradient; only where needed, else None)
    value        a critic's value of the state before the token (only where there is a critic, else None)
    cost_value   the same of costs, where there are any
    """

    logp: Any
    logsumexp: Any
    mean_logit: Any
    correct: Any
    entropy: Any
    mask: Any
    collision: Any = None
    ref: Any = None
    rivals: Any = None
    prompt: Any = None
    value: Any = None
    cost_value: Any = None


class Objective(Protocol):
    """A loss.

    kind   what it scores: tokens (`Scores`), or reward (one number for each answer, float32 [B, G])
    group  the G of its batches; 0: as many as the longest list has
    data   the kind of rows it learns from: sft, pairs (chosen, rejected), binary (thumbs up or down) or lists
    needs  what it asks for beyond the policy's log-probs:
           mean_logit, collision, rivals, prompt, ref  those fields of `Scores`
           margin                 aux "margin" [B] without gaps
           safe                   aux "safe" bool [B, G]: whether an answer is safe
           tokens_per_group       aux of that name [B]: chosen targets of a group, on average over the step
           weight                 aux "weight" [B]: what its prompt makes a row count (`train/density.py`)
           past                   aux "past": sum and count of a number of the rows of all updates before, and
                                  whether this batch's rows join them (1.0) or not. The metric "running_mean"
                                  of the loss is what the next update gets
           whole_batch            all examples of a step at once: no gradient accumulation
    rates  its usual peak learning rates, of all weights and of an adapter
    defaults  keys of the training configuration that it sets differently
    bounds   the most that a metric of an update may be, by name: one beyond it is not made
    softness  what logits are divided by before they become log-probs: the temperature of a sampled policy
    """

    kind: ClassVar[str]
    group: ClassVar[int]
    data: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    rates: ClassVar[tuple[float, float]]
    defaults: ClassVar[dict[str, Any]]
    softness: ClassVar[float]
    bounds: ClassVar[dict[str, float]]

    def __call__(self, scores: Scores, batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
        """(sum of the loss, its weight, metrics): the loss of a step is sum / weight over all its parts."""
        ...

    def fault(self, aux: dict[str, Any]) -> str | None:
        """Why nothing can be learned from a row with this aux (`Group.aux`); None where it can. It completes
        "3 rows ..."; those rows are left out. Only rows that are compared or judged are asked about."""
        ...


class TokenLoss(Config):
    """What losses over answers' tokens have in common."""

    kind: ClassVar[str] = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[dict[str, Any]] = {"epochs": 1.0}
    softness: ClassVar[float] = 1.0
    bounds: ClassVar[dict[str, float]] = {}

    def fault(self, aux: dict[str, Any]) -> str | None:
        """Any row will do."""
        return None
