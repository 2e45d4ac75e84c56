"""Numbers that must lie in a band, and the lengths of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxalign.synth.base import Work
from jaxalign.synth.quality.items import Fault, Item, Sieved
from jaxalign.synth.quality.text import words

Limits = tuple[float | None, float | None]

# key -> (whose texts, how long one is)
LENGTHS: dict[str, tuple[str, Callable[[str], int]]] = {
    "prompt_chars": ("prompt", len),
    "prompt_words": ("prompt", lambda text: len(words(text))),
    "answer_chars": ("answer", len),
    "answer_words": ("answer", lambda text: len(words(text))),
}


def outside(value: float, band: Limits) -> bool:
    """Whether the value is below or above the band."""
    least, most = band
    return (least is not None and value < least) or (most is not None and value > most)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """How many values there are, and where they lie."""
    found = np.asarray(list(values), np.float64)
    if not found.size:
        return {"n": 0}
    marks = np.quantile(found, [0, 0.05, 0.5, 0.95, 1])
    names = ("least", "p5", "median", "p95", "most")
    return {"n": int(found.size), **{n: round(float(v), 6) for n, v in zip(names, marks, strict=True)}}


def lengths(items: Sequence[Item], work: Work) -> Sieved:
    """Rows of which a text is too short or too long. A row without a prompt has none of length 0."""
    faults: dict[int, Fault] = {}
    about = {}
    for key, (side, measure) in LENGTHS.items():
        band = getattr(work.config, key)
        if band is None:
            continue
        sizes = {i: [measure(piece.text) for piece in item.of(side)] for i, item in enumerate(items)}
        about[key] = spread(size for found in sizes.values() for size in found)
        for i, found in sizes.items():
            bad = [size for size in found if outside(size, band)]
            if bad:
                faults.setdefault(i, Fault(f"length: {key}", f"{bad[0]}"))
    return Sieved(faults, about)
