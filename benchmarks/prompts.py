"""The prompts of a sampling benchmark, as every contender reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Prompts:
    """`tokens` int32 [N, longest], right-padded; `lengths` [N]; `ends` [N], lengths of answers where those
    are mixed."""

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """Reads the `.npz` that `prepare` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["tokens"], arrays["lengths"], arrays["ends"])

    def first(self, count: int) -> list[list[int]]:
        """The first `count` prompts. Raises `ValueError` where there are fewer."""
        if count > len(self.tokens):
            raise ValueError(f"{count} prompts asked for, {len(self.tokens)} here")
        return [row[:n].tolist() for row, n in zip(self.tokens[:count], self.lengths[:count], strict=True)]

    def left_padded(self, count: int, pad: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, attention mask) int64 [n, longest of them] of the prompts from `start` up to `count`,
        padded on the left."""
        rows = self.first(count)[start:]
        width = max(map(len, rows))
        tokens, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        return tokens, mask

    def mean(self, count: int) -> float:
        """Mean length of the first `count`."""
        return float(self.lengths[:count].mean())
