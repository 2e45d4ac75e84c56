"""Texts as words, sentences and n-grams, alike for languages with and without spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Chinese and Japanese characters stand for words of their own.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
# Signs that are not punctuation tell one formula or line of code from another.
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s.,;:!?'\"()\[\]{{}}…“”‘’«»–—、。，；：！？「」『』（）]")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")


def normal(text: str) -> str:
    """The text by which two are the same: case and white space do not count."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words(text: str) -> list[str]:
    """Words without case and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def windows(tokens: list[str], size: int) -> Iterator[str]:
    """Every run of `size` tokens."""
    return (" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def sentence_grams(text: str, size: int) -> set[str]:
    """Word n-grams within sentences; a sentence with fewer words than `size` is one."""
    found: set[str] = set()
    for sentence in _SENTENCE.split(text):
        tokens = _TOKEN.findall(unicodedata.normalize("NFC", sentence).casefold())
        if tokens:
            found.update(windows(tokens, min(size, len(tokens))))
    return found
