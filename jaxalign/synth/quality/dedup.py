"""Rows that say what an earlier row says. The first of them stays."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from jaxalign.extras import optional
from jaxalign.synth.base import Work
from jaxalign.synth.quality.items import Fault, Item, Sieved
from jaxalign.synth.quality.text import normal, sentence_grams

Repeats = dict[int, tuple[int, float]]  # index of a row -> (index of the earlier one, their Jaccard index)
SLACK = 1e-9  # for shares such as 0.7 of 10


def exact(items: Sequence[Item], work: Work) -> Sieved:
    """Rows whose texts are, but for case and white space, those of an earlier row in the same places."""
    first: dict[tuple[tuple[str, str], ...], int] = {}
    found: Repeats = {}
    for i, item in enumerate(items):
        key = tuple(sorted((piece.role, normal(piece.text)) for piece in item.of(work.config.dedup_of)))
        if key and first.setdefault(key, i) != i:
            found[i] = (first[key], 1.0)
    return _sieved("exact", items, found)


def ngram(items: Sequence[Item], work: Work) -> Sieved:
    """Rows whose n-grams overlap with those of an earlier row: every such row, none else."""
    config = work.config
    sets = [_grams(item, config.dedup_of, config.dedup_ngram) for item in items]
    return _sieved("ngram", items, near(sets, config.dedup_jaccard))


def minhash(items: Sequence[Item], work: Work) -> Sieved:
    """As `ngram`, but candidates come from MinHash (Broder, 1997) and locality-sensitive hashing: in little
    memory for many rows, and a few repeated rows may be missed. None is dropped that is not repeated."""
    config = work.config
    grams = [lambda item=item: _grams(item, config.dedup_of, config.dedup_ngram) for item in items]
    found = near_by_hash(
        grams, config.dedup_jaccard, permutations=config.dedup_permutations, seed=config.seed
    )
    return _sieved("minhash", items, found)


def near(sets: Sequence[set[str]], threshold: float) -> Repeats:
    """Sets whose Jaccard index with an earlier set that stayed is at least `threshold`; empty ones stay.

    Two such sets have one of their rarest members in common (prefix filtering, Chaudhuri et al. 2006), so
    few pairs are compared.
    """
    counts = Counter(gram for grams in sets for gram in grams)
    index: defaultdict[str, list[int]] = defaultdict(list)
    found: Repeats = {}
    for i, grams in enumerate(sets):
        rarest = sorted(grams, key=lambda gram: (counts[gram], gram))
        prefix = rarest[: len(grams) - math.ceil(threshold * len(grams) - SLACK) + 1]
        like = _first_like(
            grams, sorted({j for gram in prefix for j in index[gram]}), sets.__getitem__, threshold
        )
        if like is not None:
            found[i] = like
            continue
        for gram in prefix:
            index[gram].append(i)
    return found


def near_by_hash(
    sets: Sequence[Callable[[], set[str]]], threshold: float, *, permutations: int, seed: int
) -> Repeats:
    """As `near`, of sets that are made when they are needed. Raises `UserError` without `datasketch`."""
    sketch = optional("datasketch", "datasketch", extra="quality", place="dedup: minhash")
    # Candidates are compared, so that too many cost time alone: the hashing is set to miss few. Of a share
    # near 1 it would make a single band, which the library refuses.
    index = sketch.MinHashLSH(min(threshold, 0.9), permutations, weights=(0.1, 0.9))
    blank = sketch.MinHash(permutations, seed=seed % 2**32)
    found: Repeats = {}
    for i, make in enumerate(sets):
        grams = make()
        if not grams:
            continue
        hashed = blank.copy()
        hashed.update_batch([gram.encode() for gram in sorted(grams)])
        like = _first_like(grams, sorted(index.query(hashed)), lambda j: sets[j](), threshold)
        if like is not None:
            found[i] = like
        else:
            index.insert(i, hashed)
    return found


def _first_like(
    grams: set[str], candidates: Sequence[int], of: Callable[[int], set[str]], threshold: float
) -> tuple[int, float] | None:
    for j in candidates:
        other = of(j)
        common = len(grams & other)
        share = common / (len(grams) + len(other) - common)
        if share >= threshold - SLACK:
            return j, share
    return None


def _grams(item: Item, side: str, size: int) -> set[str]:
    """The n-grams of a row's texts, those of each place apart: a pair turned round is not the same pair."""
    found: set[str] = set()
    for piece in item.of(side):
        found |= {f"{piece.role}\t{gram}" for gram in sentence_grams(piece.text, size)}
    return found


def _sieved(name: str, items: Sequence[Item], found: Repeats) -> Sieved:
    def why(j: int, share: float) -> Fault:
        return Fault(f"repeated: {name}", f"as {items[j].id} ({items[j].place}), Jaccard {share:.3f}")

    kept = {j for j, _ in found.values()}
    faults = {i: why(j, share) for i, (j, share) in found.items()}
    return Sieved(faults, {"repeated": len(found), "groups": len(kept)})
