"""Requests that join an engine at work get what they would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.sampling import slots
from jaxalign.sampling.engine import Asked, Engine
from jaxalign.sampling.forced import TOP, forced
from jaxalign.types import SamplingParams
from tests.sampling.test_engine import teacher_forced
from tests.tiny import V, tiny_config, tiny_model

PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(max_tokens=9, n=2, seed=1),
    SamplingParams(max_tokens=20, repetition_penalty=1.3, stop_tokens=(90, 91, 92), seed=2),
    SamplingParams(temperature=0, max_tokens=14),
    SamplingParams(max_tokens=30, seed=4),
]


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = tiny_model(config=tiny_config(max_positions=256))
    return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0))[1])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in (5, 17, 1, 30, 3)]


class Arrivals:
    """A feed: batch k of requests comes before round k, and none is asked for while nothing can be idle."""

    def __init__(self, batches: Sequence[Sequence[Asked]]) -> None:
        self.batches, self.idle = [list(batch) for batch in batches], []

    def __call__(self, idle: bool) -> list[Asked] | None:
        self.idle.append(idle)
        return self.batches.pop(0) if self.batches else None


def asked(prompts: list[list[int]]) -> list[Asked]:
    return [Asked(i, prompt, p) for i, (prompt, p) in enumerate(zip(prompts, PARAMS, strict=True))]


def tokens(found: Any) -> dict[tuple[int, int], list[int]]:
    return {(number, index): sample.tokens.tolist() for number, index, sample in found}


def test_late_comers_get_what_they_get_alone(tiny: Any, prompts: Any) -> None:
    alone = {}
    for i, one in enumerate(asked(prompts)):
        (samples,) = Engine(*tiny, slots=2, steps=3).generate([one.prompt], one.params)
        alone |= {(i, j): sample.tokens.tolist() for j, sample in enumerate(samples)}
    a, b, c, d, e = asked(prompts)
    # The third needs other programs than those who are at work, the fifth comes when all have gone.
    feed = Arrivals([[a], [b], [c, d], [], *[[]] * 12, [e]])
    engine = Engine(*tiny, slots=4, steps=3)
    assert tokens(engine.serve(feed)) == alone
    assert feed.idle[:3] == [True, False, False]
    assert sum(feed.idle) >= 2
    assert {len(t) for t in alone.values()} == {24, 9, 20, 14, 30}


def test_a_dropped_request_frees_its_slot_and_leaves_the_others_alone(tiny: Any, prompts: Any) -> None:
    engine = Engine(*tiny, slots=2, steps=4)
    one, two, three, four, _ = asked(prompts)
    one.params, two.params = replace(one.params, max_tokens=200), replace(two.params, n=1, max_tokens=40)
    seen: dict[int, int] = {}

    def watch(number: int, index: int, so_far: list[int]) -> None:
        seen[number] = len(so_far)
        one.dropped = three.dropped = seen.get(0, 0) >= 8

    found = tokens(engine.serve(Arrivals([[one, two, three, four]]), watch))
    assert {number for number, _ in found} == {1, 3}
    assert seen[0] == 8  # it ended with the round in which it was dropped
    assert 2 not in seen  # dropped while it waited
    for request in (two, four):
        (sample,) = engine.generate([request.prompt], request.params)[0]
        assert found[request.number, 0] == sample.tokens.tolist()


def test_the_cache_shrinks_once_a_long_request_has_gone(monkeypatch: Any) -> None:
    model = tiny_model(config=tiny_config(max_positions=512))
    base = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0))[1])
    sizes, resize = [], slots.resize
    monkeypatch.setattr(slots, "resize", lambda *given: (sizes.append(given[2]), resize(*given))[1])
    long, short = SamplingParams(temperature=0, max_tokens=4), SamplingParams(temperature=0, max_tokens=20)
    engine = Engine(model, base, slots=2, steps=4)
    (_,), (sample,) = engine.generate([[5] * 500, [1, 2]], [long, short])
    assert sizes[-2:] == [512, 128]
    sizes.clear()
    (alone,) = engine.generate([[1, 2]], short)[0]
    assert set(sizes) == {1, 128}
    assert sample.tokens.tolist() == alone.tokens.tolist()


def test_forced_log_probs_are_the_model_s(tiny: Any, prompts: Any) -> None:
    engine = Engine(*tiny, slots=2)
    for text, one in zip(prompts, forced(engine, prompts), strict=True):
        assert np.isnan(one.logp[0])
        assert one.ids.shape == one.tops.shape == (len(text), TOP)
        sample = type("Rest", (), {"tokens": np.array(text[1:], np.int32)})
        want = teacher_forced(*tiny, text[:1], sample)  # type: ignore[arg-type]
        np.testing.assert_allclose(one.logp[1:], want[np.arange(len(text) - 1), text[1:]], atol=1e-4)
        best = -np.sort(-want, axis=-1)[:, :TOP]
        np.testing.assert_allclose(one.tops[1:], best, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(want, one.ids[1:], -1), best, atol=1e-4)


def test_forced_log_probs_are_those_of_sampling(tiny: Any, prompts: Any) -> None:
    engine = Engine(*tiny, slots=2)
    (sample,) = engine.generate(prompts[:1], SamplingParams(max_tokens=12, seed=3))[0]
    (one,) = forced(engine, [prompts[0] + sample.tokens.tolist()])
    np.testing.assert_allclose(one.logp[len(prompts[0]) :], sample.logp, atol=1e-4)
