"""Plain data that crosses module boundaries. Axes: B batch, G group, T time, D model, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]  # nested dicts of arrays
Axes = tuple[str | None, ...]  # the logical axis name of each dimension of one array


# Segment s + b BRANCH is branch b of segment s: its tokens see those of s and their own. b counts from 1.
BRANCH = 1 << 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """The members of each group in one row: what they begin with once, then a branch for each.

    The B groups are cut into N blocks of n, each with R rows of its own; rows hold several groups if R < n.

    tokens, segments, positions  int32 [N, R, S], as in `Batch`: members of a row's group s = 1, 2, ... are
                                 branches of segment s
    index                        int32 [N, n, G, T]: where among the R S tokens of the block token t of member
                                 g lies
    """

    tokens: Any
    segments: Any
    positions: Any
    index: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Token rows on their way into a model. G is 1 for SFT, 2 for (chosen, rejected), n for a group.

    tokens    int32 [B, G, T]
    mask      bool  [B, G, T]  True where the token is a target: the loss predicts it from its predecessors
    segments  int32 [B, G, T]  0 is padding, 1, 2, ... the packed examples of a row
    positions int32 [B, G, T]  restart at 0 with every segment
    aux       {name: [B, ...]} what one objective needs besides (reference log-probs, margins, ...)
    shared    the same tokens with the members' common prompt once, where the model is to compute it once
    """

    tokens: Any
    mask: Any
    segments: Any
    positions: Any
    aux: dict[str, Any] = field(default_factory=dict)
    shared: Shared | None = None


@dataclass(frozen=True)
class Example:
    """One tokenised row: `tokens` int32 [T], `mask` bool [T] True on the tokens that are trained.

    aux  float32 [T] by name: what was worked out before for each token, such as `ref`, the log-probs of the
         targets under a reference policy
    """

    id: str
    tokens: np.ndarray
    mask: np.ndarray
    aux: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Tokenised answers to one prompt. The members begin with the same prompt tokens, none of them trained.

    aux     what a loss needs besides, by name: numbers, or arrays with one for each member
    family  groups of one family are never split into training and evaluation
    place   `file:line`, for messages to the user
    """

    id: str
    members: tuple[Example, ...]
    aux: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    place: str = ""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files lie on this disk.

    folder   holds config.json, tokenizer files and safetensors, unless `gguf` names a file in it
    gguf     path of a .gguf file, or None
    adapter  folder of a PEFT adapter that goes on top, or None
    name     what the user typed: it goes into reports and adapter_config.json
    """

    name: str
    folder: Path
    gguf: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch that filter off.
    `repetition_penalty` is CTRL's (arXiv:1909.05858, section 4.1), over prompt and answer alike, 1 is off.
    `stop` strings end an answer and are cut from its text; `stop_tokens` end it and are kept in its tokens.
    `seed` makes the request's draws a function of (seed, sample index, token index) alone.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    n: int = 1
    seed: int = 0
