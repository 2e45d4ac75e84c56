"""ROUGE-L against its definition, and distinct n-grams."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.text_stats import RougePool, distinct_n, rouge_l, tokens


def by_definition(first: list[str], second: list[str]) -> float:
    """2 LCS / (m + n), the LCS looked for among all subsequences."""
    subsequences = lambda words: {  # noqa: E731
        c for n in range(len(words) + 1) for c in itertools.combinations(words, n)
    }
    longest = max(map(len, subsequences(first) & subsequences(second)))
    return 2 * longest / (len(first) + len(second)) if first and second else 0.0


words = st.lists(st.sampled_from("abc"), max_size=6)


@given(words, words)
def test_rouge_l_is_twice_the_common_subsequence_over_both_lengths(first, second):
    assert rouge_l(" ".join(first), " ".join(second)) == by_definition(first, second)


def test_rouge_l_of_lins_example():
    """Lin 2004, section 3.1: P = R = 3/4 and 2/4."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == 0.75
    assert rouge_l("the gunman kill police", reference) == 0.5


def test_tokens_are_words_in_small_letters():
    assert tokens("It's 3_000 km, Über-fast!") == ["it", "s", "3", "000", "km", "über", "fast"]


def test_a_pool_gives_the_nearest():
    pool = RougePool()
    assert pool.nearest("a b") == 0.0
    for text in ("x y z", "a b c d", "q"):
        pool.add(text)
    assert len(pool) == 3
    assert pool.nearest("a b") == pytest.approx(4 / 6)


def test_distinct_n_counts_different_n_grams():
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4  # ab, ba; four bigrams
    assert distinct_n(["a"], 2) is None
