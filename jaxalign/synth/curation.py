"""What of web texts may be answers, how a grade is read, and how good a selection is
(Li et al. 2023, arXiv:2308.06259).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.llm.base import Completion
from jaxalign.stats import rate_interval
from jaxalign.synth.stage import Parsed
from jaxalign.text_stats import n_grams, tokens

GRADES = range(1, 6)
GRAM = 5  # words of the n-grams by which two texts are compared
_GRADE = re.compile(r"(?<!\w)[Ss]core:\s*([1-5])\s*$")
_NUMBER = re.compile(r"(?<!\w)[Ss]core:\s*-?\d")


def grade(completions: Sequence[Completion]) -> Parsed:
    """The grade on the last line that is not empty, `Score: n` with n from 1 to 5."""
    lines = [line for line in completions[0].text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    found = _GRADE.search(last)
    if found:
        return int(found[1]), ""
    return None, "a score that is not 1 to 5" if _NUMBER.search(last) else "the last line has no score"


def text_fault(text: str, header: str, least: int, most: int, navigation: re.Pattern[str]) -> str:
    """Why a text, of `least` to `most` characters, does not do as an answer, or nothing."""
    if not text.strip():
        return "empty text"
    title = header.strip() or text.strip().splitlines()[0].strip()
    if navigation.fullmatch(title.strip(" :#*|>")):
        return "navigation"
    if text.isupper() or header.isupper():
        return "all in capitals"
    if len(text) < least:
        return "text too short"
    return "text too long" if len(text) > most else ""


def near_duplicates(texts: Sequence[str], limit: float) -> set[int]:
    """Indices of texts whose word 5-grams have a Jaccard index above `limit` with those of an earlier text
    that is kept. A text shorter than five words is one n-gram."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    found = set()
    for i, text in enumerate(texts):
        words = tokens(text)
        mine = set(n_grams(words, min(GRAM, max(1, len(words)))))
        shared = Counter(j for gram in mine for j in holders[gram])
        if any(n > limit * (len(mine) + sizes[j] - n) for j, n in shared.items()):
            found.add(i)
            continue
        sizes[i] = len(mine)
        for gram in mine:
            holders[gram].append(i)
    return found


def histogram(grades: Mapping[str, int]) -> dict[str, int]:
    """{grade: how many have it}."""
    count = Counter(grades.values())
    return {str(n): count[n] for n in GRADES}


def selection_quality(grades: Mapping[str, int], labels: Mapping[str, bool], limit: float) -> dict[str, Any]:
    """Precision and recall of `grade >= limit` for the items that are labelled good. What has no grade is not
    selected."""
    chosen = {name for name, found in grades.items() if found >= limit}
    good = {name for name, label in labels.items() if label}
    hits = len(chosen & good)
    return {
        "precision": rate_interval(hits, len(chosen)).to_json(),
        "recall": rate_interval(hits, len(good)).to_json(),
    }


def overlap(first: set[str], second: set[str]) -> dict[str, Any]:
    """How many two rounds select both, and their Jaccard index."""
    union = len(first | second)
    return {
        "both": len(first & second),
        "jaccard": len(first & second) / union if union else None,
    }


def scaling(sizes: Sequence[int], win_rates: Sequence[float]) -> tuple[float, float]:
    """(alpha, C) of win rate = alpha ln N + C, fitted by least squares (arXiv:2308.06259 section 3.4)."""
    import numpy as np
    from scipy.stats import linregress

    fit: Any = linregress(np.log(sizes), win_rates)
    return float(fit.slope), float(fit.intercept)
