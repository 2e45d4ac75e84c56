"""How alike and how varied texts are: ROUGE-L against a pool, distinct n-grams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_WORD = re.compile(r"[^\W_]+")


def tokens(text: str) -> list[str]:
    """Runs of letters and digits in lower case, which on ASCII are the tokens of Google's `rouge-score`."""
    return _WORD.findall(text.lower())


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F1 of two texts (Lin 2004): 2 LCS / (m + n) over their tokens, in [0, 1]."""
    pool = RougePool()
    pool.add(second)
    return pool.nearest(first)


@dataclass
class RougePool:
    """Texts among which the one most like a new one is looked for."""

    _numbers: dict[str, int] = field(default_factory=dict)
    _texts: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """One more text."""
        self._texts.append(self._encoded(text))

    def nearest(self, text: str) -> float:
        """The highest ROUGE-L F1 of `text` and one of the pool; 0 for an empty pool."""
        import numpy as np
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import cdist

        mine = self._encoded(text)
        if not mine or not self._texts:
            return 0.0
        common = cdist([mine], self._texts, scorer=LCSseq.similarity, dtype=np.int32)[0]
        lengths = np.array([len(other) for other in self._texts])
        return float((2 * common / (len(mine) + lengths)).max())

    def _encoded(self, text: str) -> list[int]:
        """Tokens as numbers: rapidfuzz compares words by their hashes, which may collide."""
        return [self._numbers.setdefault(word, len(self._numbers)) for word in tokens(text)]


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different over all n-grams of the texts (Li et al. 2016, arXiv:1510.03055), None without any."""
    found = [gram for text in texts for gram in n_grams(tokens(text), n)]
    return len(set(found)) / len(found) if found else None


def n_grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of `n` words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
