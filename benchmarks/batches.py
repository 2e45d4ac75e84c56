"""The batches of a training benchmark: written once by the parent, read by every contender.

One `.npz` holds `tokens` int32, `mask` bool (the targets), `segments` and `positions` int32, each [S, R, T]:
S steps of R rows. A row holds one or more examples (segments 1, 2, ...), 0 is padding. Peers that do not pack
get the very same examples of a step, one a row, padded to the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORED = -100  # the label torch's cross-entropy leaves out


@dataclass(frozen=True)
class Steps:
    """S steps of packed rows, each array [S, R, T]."""

    tokens: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def trained(self, step: int) -> int:
        """Non-padding tokens of a step: what tokens a second counts, for every contender alike."""
        return int((self.segments[step % len(self.segments)] > 0).sum())

    def examples(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The step's examples as (tokens [t], labels [t]) with `IGNORED` where nothing is learned."""
        tokens, mask, segments = (x[step % len(x)] for x in (self.tokens, self.mask, self.segments))
        labels = np.where(mask, tokens, IGNORED)
        found = [(row, s) for row in range(len(tokens)) for s in range(1, int(segments[row].max()) + 1)]
        return [(tokens[r][segments[r] == s], labels[r][segments[r] == s]) for r, s in found]

    def padded(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, labels, attention mask), int64 [examples, longest], padded on the right."""
        return pad(self.examples(step))

    def context(self) -> float:
        """Mean over tokens of the length of the example they stand in: the T of attention's cost."""
        every = (self.examples(step) for step in range(len(self.tokens)))
        lengths = np.array([len(t) for step in every for t, _ in step], float)
        return float((lengths**2).sum() / lengths.sum())


def pad(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples as right-padded int64 arrays: tokens (0), labels (`IGNORED`), attention mask (0)."""
    shape = (len(examples), max(len(t) for t, _ in examples))
    tokens, labels, attention = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, np.int64)
    for i, (t, y) in enumerate(examples):
        tokens[i, : len(t)], labels[i, : len(t)], attention[i, : len(t)] = t, y, 1
    return tokens, labels, attention


def fixed(stream: np.ndarray, steps: int, rows: int, length: int) -> Steps:
    """A token stream cut into full rows, every token a target. Raises where the stream is too short."""
    need = steps * rows * length
    if len(stream) < need:
        raise ValueError(f"the data has {len(stream)} tokens, {need} are needed: fewer steps or more data")
    tokens = stream[:need].reshape(steps, rows, length).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[..., 0] = False  # the first token has no predecessor
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Steps(tokens, mask, np.ones(tokens.shape, np.int32), positions.copy())


def mixed(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], steps: int, rows: int, length: int, seed: int
) -> Steps:
    """Examples (tokens, mask) of a real length distribution, packed into rows of `length`, in random order.

    Longer examples are cut at `length`. Raises where the data does not fill the steps.
    """
    cut = [(t[:length], m[:length]) for t, m in examples if m[1:length].any()]
    packs = pack([len(t) for t, _ in cut], length)
    if len(packs) < steps * rows:
        raise ValueError(f"the data fills {len(packs)} rows of {length}, {steps * rows} are needed")
    order = np.random.default_rng(seed).permutation(len(packs))[: steps * rows]
    out = Steps(*(np.zeros((steps, rows, length), d) for d in (np.int32, bool, np.int32, np.int32)))
    for place, index in enumerate(order):
        at, step, row = 0, *divmod(place, rows)
        for segment, example in enumerate(packs[index], 1):
            tokens, mask = cut[example]
            span = (step, row, slice(at, at + len(tokens)))
            out.tokens[span], out.mask[span], out.segments[span] = tokens, mask, segment
            out.positions[span] = np.arange(len(tokens))
            out.mask[step, row, at] = False
            at += len(tokens)
    return out


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` in bins of at most `capacity`."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, free in enumerate(room) if free >= lengths[index]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(index)
        room[at] -= lengths[index]
    return bins


def save(path: Path, steps: Steps) -> None:
    """Writes the `.npz`."""
    np.savez(path, **vars(steps))


def load(path: str | Path) -> Steps:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        return Steps(*(arrays[name] for name in ("tokens", "mask", "segments", "positions")))
