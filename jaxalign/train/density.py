"""Underlying distribution matching: what unwanted answers count by where prompts of both labels differ.

Binary classifier optimisation assumes that wanted and unwanted answers were given to the same prompts. Where
they were not, an unwanted answer counts by p / (1 - p), with p how likely its prompt is to have a wanted
answer (arXiv:2404.04656, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.data.rows import Item
from jaxalign.extras import optional
from jaxalign.models.decoder import Model
from jaxalign.objectives.logprobs import prompt_vectors
from jaxalign.train.passes import each_item
from jaxalign.types import Params

BOUNDS = (0.5, 10.0)  # of the weights, so that no row is lost and none takes over


def vectors_of_prompts(
    model: Model, base: Params, mesh: jax.sharding.Mesh, items: Sequence[Item], **how: int
) -> np.ndarray:
    """float32 [n, D] of the prompts of all items: `prompt_vectors` less their mean, of length 1. What all
    prompts share, such as a template, tells nothing, and a penalised classifier asks for a scale.

    `how` is that of `each_item`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    forward = jax.jit(
        lambda base, batch: prompt_vectors(model.unembed(base), batch)[:, None], out_shardings=everywhere
    )
    found = each_item(items, partial(forward, base), mesh=mesh, what="prompts", **how)
    vectors = np.concatenate(found)
    vectors -= vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)


def density_weights(vectors: np.ndarray, wanted: np.ndarray, train: int) -> np.ndarray:
    """float32 [n]: 1 for wanted rows, p / (1 - p) within `BOUNDS` for the others.

    p: the probability of a wanted answer by a logistic regression on the prompts' vectors [n, D], both labels
    weighed the same, fitted to the first `train` rows. Raises `UserError` without the extra `statistics`.
    """
    linear = optional("sklearn.linear_model", "scikit-learn", extra="statistics", place="udm")
    fit = linear.LogisticRegression(class_weight="balanced", max_iter=1000)
    fit.fit(vectors[:train], wanted[:train])
    p = fit.predict_proba(vectors)[:, 1]
    return np.where(wanted, 1.0, np.clip(p / (1 - p + 1e-8), *BOUNDS)).astype(np.float32)
