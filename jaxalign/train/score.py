"""From a batch to scores: the model's forward pass and the log-probabilities of its targets."""

from __future__ import annotations

import jax

from jaxalign.models.decoder import Model
from jaxalign.objectives.base import Scores
from jaxalign.objectives.logprobs import Head, token_scores
from jaxalign.types import Batch, Params


def score(
    model: Model,
    adapter: Params | None,
    base: Params,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    needs: frozenset[str] = frozenset(),
    train_base: bool = False,
    compact: bool = True,
    spread: int = 1,
    chunk: int = 512,
) -> Scores:
    """Scores of a batch [B, G, T]. Rows and group members are one batch axis to the model.

    `compact`, `spread` and `chunk` are those of `Head`.
    """
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    hidden, _ = model.hidden(
        adapter, base, flat(batch.tokens), flat(batch.segments), flat(batch.positions), key=key
    )
    head = Head(
        chunk=chunk,
        softcap=model.config.final_softcap,
        dtype=model.numerics.compute,
        trained=train_base,
        smooth="mean_logit" in needs,
        compact=compact,
        spread=spread,
    )
    return token_scores(hidden, model.unembed(base), batch, head, model.constrain)
