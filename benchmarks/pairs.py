"""Pairs of answers as the rows of `Steps`: rows 2i and 2i + 1 of a step are chosen and rejected of pair i.

A row is one example (segments 1, padding on the right), its targets the answer. Both rows of a pair begin
with the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.batches import IGNORED, Steps

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # token ids of the prompt, of the chosen, of the rejected


def fixed(stream: np.ndarray, steps: int, pairs: int, prompt: int, answer: int) -> Steps:
    """A token stream cut into prompts of `prompt` tokens with two answers of `answer` tokens each.

    Raises where the stream is too short.
    """
    size = prompt + 2 * answer
    need = steps * pairs * size
    if len(stream) < need:
        raise ValueError(f"the data has {len(stream)} tokens, {need} are needed: fewer steps or more data")
    second = prompt + answer
    pieces = stream[:need].reshape(-1, size)
    return lay_out([(p[:prompt], p[prompt:second], p[second:]) for p in pieces], steps)


def real(found: Sequence[Pair], steps: int, pairs: int, length: int, seed: int) -> Steps:
    """Pairs whose rows have at most `length` tokens, whole, in random order.

    Raises where there are too few.
    """
    whole = [p for p in found if min(len(p[1]), len(p[2])) > 0 and longest(p) <= length]
    need = steps * pairs
    if len(whole) < need:
        raise ValueError(f"{len(whole)} pairs fit into {length} tokens, {need} are needed: fewer steps")
    order = np.random.default_rng(seed).permutation(len(whole))[:need]
    return lay_out([whole[i] for i in order], steps)


def longest(pair: Pair) -> int:
    """Tokens of the pair's longer row."""
    prompt, chosen, rejected = (len(x) for x in pair)
    return prompt + max(chosen, rejected)


def lay_out(pairs: Sequence[Pair], steps: int) -> Steps:
    """The pairs in their order, equally many a step, arrays [S, 2 pairs, longest row]."""
    rows = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    shape = (len(rows), max(map(longest, pairs)))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[i, :start], tokens[i, start:end] = prompt, answer
        mask[i, start:end], segments[i, :end], positions[i, :end] = True, 1, np.arange(end)
    return Steps(*(x.reshape(steps, -1, shape[1]) for x in (tokens, mask, segments, positions)))


def split(steps: Steps, index: int) -> list[Pair]:
    """The pairs of a step, as `lay_out` was given them."""
    cut = [np.split(t, [int((y != IGNORED).argmax())]) for t, y in steps.examples(index)]
    return [(chosen[0], chosen[1], rejected[1]) for chosen, rejected in zip(cut[::2], cut[1::2], strict=True)]
