"""Synthetic scores and batches for any objective, by its `kind` and its `data`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.objectives.base import RIVALS, Scores
from jaxalign.types import Batch
from tests.tiny import quick_jit

ROWS, T, PROMPT, LONGEST = (
    8,
    8,
    2,
    4,
)  # groups, tokens of an answer with its prompt, tokens of the prompt, a list
SIZES = {"sft": 1, "pairs": 2, "lists": LONGEST}


@dataclass(frozen=True)
class Sample:
    """What an objective is called with. `scores`: `Scores`, or float32 [B, G] where its kind is reward."""

    scores: Any
    batch: Batch

    def rows(self, keep: np.ndarray) -> Sample:
        """The same shapes; groups where `keep` bool [B] is False become padding."""

        def blank(x: Any) -> Any:
            chosen = np.reshape(keep, (-1,) + (1,) * (np.ndim(x) - 1))
            return np.where(chosen, x, np.zeros_like(x))

        return Sample(jax.tree.map(blank, self.scores), jax.tree.map(blank, self.batch))

    def padded(self, groups: int, columns: int) -> Sample:
        """With empty groups in the middle, and columns of padding to the right."""

        def wider(x: Any) -> Any:
            x = np.asarray(x)
            x = np.concatenate([x[:3], np.zeros_like(x[:groups]), x[3:]])
            # Of all arrays, those over tokens have T as their third axis.
            return np.pad(x, [(0, 0)] * 2 + [(0, columns)] + [(0, 0)] * (x.ndim - 3)) if over_tokens(x) else x

        return Sample(jax.tree.map(wider, self.scores), jax.tree.map(wider, self.batch))


def over_tokens(x: Any) -> bool:
    """Whether an array is [B, G, T, ...]."""
    return np.ndim(x) >= 3 and np.shape(x)[2] == T


def lengths(group: int, data: str) -> np.ndarray:
    """int [ROWS, G]: targets of every answer, from one to all; short lists end with members that are none."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, T - PROMPT + 1, (ROWS, group))
    count[0] = 1
    if data == "lists":
        count[np.arange(group) >= rng.integers(2, group + 1, (ROWS, 1))] = 0
    return count


def sample(objective: Any, length: int | None = None) -> Sample:
    """Random scores; `length` gives every answer that many targets."""
    group = objective.group or SIZES[objective.data]
    count = lengths(group, objective.data)
    count = np.where(count > 0, length or count, 0)
    mask = (np.arange(T) >= PROMPT) & (np.arange(T) < PROMPT + count[..., None])
    rng = np.random.default_rng(1)
    segments = (np.arange(T) < PROMPT + count[..., None]).astype(np.int32) * (count[..., None] > 0)
    tokens = rng.integers(0, 9, mask.shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), mask.shape)
    batch = Batch(tokens, mask, segments, positions, aux(mask.any(-1), rng))
    if objective.kind == "reward":
        return Sample(rng.normal(size=mask.shape[:2]).astype(np.float32), batch)
    return Sample(token_scores(mask, rng), batch)


def aux(present: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Everything that any batch carries besides its tokens, of answers bool [B, G]."""
    rows, group = present.shape
    best_first = np.sort(rng.random((rows, group)).astype(np.float32), axis=1)[:, ::-1]
    return {
        "margin": rng.uniform(0.1, 2.0, rows).astype(np.float32),
        "label": np.arange(rows) % 2 == 0,
        "scores": np.where(present, best_first, np.float32(np.nan)),
        "safe": np.arange(group) < rng.integers(0, group + 1, (rows, 1)),
        "tokens_per_group": np.full(rows, 3.0, np.float32),
    }


def token_scores(mask: np.ndarray, rng: np.random.Generator) -> Scores:
    """Log-probs around -1, all other fields plausible, everything 0 where nothing is a target."""

    def draw(mean: float, shape: tuple[int, ...] = ()) -> np.ndarray:
        x = mean + 0.4 * rng.standard_normal(mask.shape + shape)
        return np.where(mask.reshape(mask.shape + (1,) * len(shape)), x, 0.0).astype(np.float32)

    return Scores(
        logp=np.minimum(draw(-1.2), 0),
        logsumexp=draw(3),
        mean_logit=draw(0),
        correct=np.where(mask, rng.integers(0, 2, mask.shape), 0).astype(np.float32),
        entropy=np.abs(draw(1)),
        mask=mask,
        collision=np.minimum(draw(-1), 0),
        ref=np.minimum(draw(-1.5), 0),  # less: KTO looks at positive log-ratios only
        rivals=np.sort(np.minimum(draw(-2, (RIVALS,)), 0), axis=-1)[..., ::-1].copy(),
        prompt=rng.standard_normal((len(mask), 5)).astype(np.float32),
    )


def extreme(objective: Any, first: float, rest: float, ref: float, length: int | None) -> Sample:
    """Every answer's log-prob, or score, at one of two values: that of a group's first, or of the rest."""
    plain = sample(objective, length)
    group = plain.batch.mask.shape[1]
    ends = np.where(np.arange(group) == 0, first, rest).astype(np.float32)
    if objective.kind == "reward":
        return replace(plain, scores=np.broadcast_to(ends - ref, plain.scores.shape))
    s, count = plain.scores, np.maximum(plain.batch.mask.sum(-1, keepdims=True), 1)
    spread = lambda total: np.where(s.mask, total / count, 0.0).astype(np.float32)  # noqa: E731
    logp = spread(ends[:, None])
    sure = logp > -1  # then nothing else is likely, and else something is
    return replace(
        plain,
        scores=replace(
            s,
            logp=logp,
            ref=spread(np.float32(ref)),
            logsumexp=spread(np.float32(1e4)),
            collision=np.where(sure, 2 * logp, -1.0) * s.mask,
            rivals=np.where(sure, -1e4, -1.0)[..., None] * s.mask[..., None] * np.ones(RIVALS, np.float32),
        ),
    )


def moved_where_nothing_counts(given: Sample) -> Sample:
    """Other numbers in every score of a token that is no target."""
    s, rng = given.scores, np.random.default_rng(3)

    def move(x: np.ndarray) -> np.ndarray:
        hidden = ~s.mask.reshape(s.mask.shape + (1,) * (x.ndim - 3))
        return (x + np.where(hidden, rng.standard_normal(x.shape), 0.0)).astype(np.float32)

    named = [f.name for f in fields(s) if f.name not in ("mask", "prompt") and getattr(s, f.name) is not None]
    return replace(given, scores=replace(s, **{name: move(getattr(s, name)) for name in named}))


def on_device(given: Sample) -> tuple[Any, Batch]:
    """(scores, batch) as JAX arrays."""
    return jax.tree.map(jnp.asarray, (given.scores, given.batch))


WORDS = RIVALS + 4  # tokens that the bandit knows


def bandit(objective: Any) -> tuple[Any, Batch]:
    """(scores(weights [WORDS]), batch): answer g is the one token g, the best first."""
    group = objective.group or SIZES[objective.data]
    mask = jnp.ones((ROWS, group, 1), bool)
    answer = np.broadcast_to(np.arange(group), (ROWS, group)).copy()
    if objective.data == "binary":
        answer = (answer + np.arange(ROWS)[:, None]) % 2
    rest = {"margin": np.ones(ROWS), "label": answer[:, 0] == 0, "safe": answer == 0}
    rest |= {"scores": 1 - answer / WORDS, "tokens_per_group": np.ones(ROWS)}
    batch = Batch(mask, mask, mask, mask, jax.tree.map(jnp.asarray, rest))

    def scores(weights: jax.Array) -> Any:
        if objective.kind == "reward":
            return weights[answer]
        logs = jax.nn.log_softmax(weights)
        others = jnp.where(jax.nn.one_hot(answer, WORDS, dtype=bool), -jnp.inf, logs)
        zeros = jnp.zeros(mask.shape)
        return Scores(
            *(logs[answer][..., None], zeros, zeros, zeros, zeros, mask),
            collision=zeros + jax.nn.logsumexp(2 * logs),
            ref=zeros - np.log(WORDS),
            rivals=jax.lax.top_k(others, RIVALS)[0][:, :, None],
            prompt=jnp.ones((ROWS, 3)),
        )

    return scores, batch


def learnt(objective: Any, steps: int) -> np.ndarray:
    """The bandit's weights [WORDS] after `steps` steps from 0."""
    scores, batch = bandit(objective)
    adam = optax.adam(0.05)

    @quick_jit
    def step(state: Any) -> Any:
        weights, opt = state
        slope = jax.grad(lambda w: objective(scores(w), batch)[0])(weights)
        updates, opt = adam.update(slope, opt)
        return optax.apply_updates(weights, updates), opt

    start = jnp.zeros(WORDS)
    state = (start, adam.init(start))
    for _ in range(steps):
        state = step(state)
    return np.asarray(state[0])
