"""From a batch to scores: the model's forward pass and the log-probabilities of its targets."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxalign.models.decoder import Model
from jaxalign.objectives.base import RIVALS, Scores
from jaxalign.objectives.logprobs import Head, prompt_vectors, token_scores
from jaxalign.types import Batch, Params


def score(
    model: Model,
    adapter: Params | None,
    base: Params,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    needs: frozenset[str] = frozenset(),
    temperature: float = 1.0,
    train_base: bool = False,
    compact: bool = True,
    spread: int = 1,
    chunk: int = 512,
) -> Scores:
    """Scores of a batch [B, G, T]. Rows and group members are one batch axis to the model, or members share a
    row, and groups may (`Batch.shared`): the same scores for less work.

    Logits are divided by `temperature`. `compact`, `spread` and `chunk` are those of `Head`.
    """
    hidden = hidden_states(model, adapter, base, batch, key)
    softcap = model.config.final_softcap
    if temperature != 1.0:  # logits are linear in the hidden states, up to the cap
        hidden = (hidden / temperature).astype(hidden.dtype)
        softcap = softcap and softcap / temperature
    head = Head(
        chunk=chunk,
        softcap=softcap,
        dtype=model.numerics.compute,
        trained=train_base,
        smooth="mean_logit" in needs,
        collision="collision" in needs,
        rivals=RIVALS if "rivals" in needs else 0,
        compact=compact,
        spread=spread,
    )
    kernel = model.unembed(base)
    scores = token_scores(hidden, kernel, batch, head, model.constrain)
    return replace(scores, prompt=prompt_vectors(kernel, batch)) if "prompt" in needs else scores


def hidden_states(
    model: Model, adapter: Params | None, base: Params, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """Final hidden states [B*G, T, D] of a batch [B, G, T]."""
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    rows = batch if batch.shared is None else batch.shared
    hidden, _ = model.hidden(
        adapter, base, flat(rows.tokens), flat(rows.segments), flat(rows.positions), key=key
    )
    if batch.shared is None:
        return hidden
    index = batch.shared.index
    # Block by block: a block's rows and groups lie on one device.
    blocks = model.constrain(hidden.reshape(len(index), -1, hidden.shape[-1]), "batch", None, None)
    members = jax.vmap(lambda block, where: block[where])(blocks, index)
    return members.reshape(-1, *members.shape[3:])


def rewards(
    model: Model,
    adapter: Params | None,
    base: Params,
    head: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> jax.Array:
    """One score for each answer, float32 [B, G]: `head["kernel"]` [1, D] over the final hidden state of its
    last token, whatever padding follows."""
    hidden = hidden_states(model, adapter, base, batch, key)
    last = jnp.maximum((batch.segments != 0).sum(axis=-1) - 1, 0)
    states = hidden.reshape(*batch.tokens.shape, -1)
    states = jnp.take_along_axis(states, last[..., None, None], axis=2)[:, :, 0].astype(jnp.float32)
    return (states * head["kernel"][0]).sum(axis=-1)


def values(
    model: Model,
    adapter: Params | None,
    base: Params,
    head: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> jax.Array:
    """A critic's values, float32 [B, G, T, H], by each row of its head [H, D]: of the state before each
    token, which the token before it ends; 0 for the first one."""
    hidden = hidden_states(model, adapter, base, batch, key).reshape(*batch.tokens.shape, -1)
    heads = [(hidden.astype(jnp.float32) * row).sum(axis=-1) for row in head["kernel"]]
    return jnp.pad(jnp.stack(heads, axis=-1)[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))


def init_head(size: int, key: jax.Array) -> Params:
    """The head of a reward model before training: normal, of standard deviation 1 / sqrt(D + 1)
    (arXiv:2009.01325, appendix B.1)."""
    return {"kernel": jax.random.normal(key, (1, size)) / jnp.sqrt(size + 1.0)}
