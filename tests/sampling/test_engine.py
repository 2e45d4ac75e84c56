"""The engine against teacher forcing, and against itself in other company."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.decoder import Model
from jaxalign.sampling import slots
from jaxalign.sampling.engine import Engine, Sample
from jaxalign.sharding import MeshConfig, constrainer, make_mesh, tree_shardings
from jaxalign.types import Params, SamplingParams
from tests.tiny import V, tiny_config, tiny_model

SHORT = SamplingParams(max_tokens=9)
LENGTHS = (1, 5, 17, 30, 3, 3, 9, 11)


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Params]:
    model = tiny_model(config=tiny_config(max_positions=256))
    base = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0))[1])
    return model, base


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in LENGTHS]


def mixed(count: int) -> list[SamplingParams]:
    """Greedy, plain and filtered requests of several lengths and numbers of samples."""
    return [
        SamplingParams(
            temperature=0.0 if i % 2 else 1.0,
            top_p=0.8 if i % 3 == 0 else 1.0,
            top_k=20 if i % 4 == 0 else 0,
            repetition_penalty=1.3 if i == 5 else 1.0,
            max_tokens=12 + 3 * i,
            n=1 + i % 3,
            seed=i,
        )
        for i in range(count)
    ]


def teacher_forced(model: Model, base: Params, prompt: list[int], sample: Sample) -> np.ndarray:
    """Log-softmax [T, V] at each sampled token, from one forward pass over prompt and answer."""
    ids = prompt + sample.tokens.tolist()
    row = jnp.array([ids + [0] * (80 - len(ids))])
    return np.asarray(_log_softmax(model, base, row))[0, len(prompt) - 1 : len(ids) - 1]


@partial(jax.jit, static_argnums=0)
def _log_softmax(model: Model, base: Params, row: jax.Array) -> jax.Array:
    hidden, _ = model.hidden(None, base, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None])
    return jax.nn.log_softmax(model.logits(base, hidden))


@pytest.fixture(scope="module")
def together(tiny: Any, prompts: Any) -> list[list[Sample]]:
    return Engine(*tiny, slots=4, steps=8).generate(prompts, mixed(len(prompts)))


def test_log_probabilities_equal_teacher_forcing(tiny: Any, prompts: Any, together: Any) -> None:
    for prompt, params, samples in zip(prompts, mixed(len(prompts)), together, strict=True):
        assert len(samples) == params.n
        for sample in samples:
            logs = teacher_forced(*tiny, prompt, sample)
            want = logs[np.arange(len(sample.tokens)), sample.tokens]
            np.testing.assert_allclose(sample.logp, want, atol=1e-4)
            assert sample.finish == "length"
            assert len(sample.tokens) == params.max_tokens
            if params.temperature == 0 and params.repetition_penalty == 1:
                assert sample.tokens.tolist() == logs.argmax(-1).tolist()
            if params.temperature == 1 and params.top_p == 1 and not params.top_k:
                np.testing.assert_allclose(sample.sample_logp, sample.logp, atol=1e-5)


def test_samples_of_one_prompt_differ_and_greedy_ones_do_not(together: Any) -> None:
    assert together[2][0].tokens.tolist() != together[2][1].tokens.tolist()
    assert together[5][0].tokens.tolist() == together[5][1].tokens.tolist()


@pytest.mark.parametrize(("count", "steps"), [(1, 5), (8, 32)])
def test_order_slots_and_company_change_nothing(
    tiny: Any, prompts: Any, together: Any, count: int, steps: int
) -> None:
    order = [6, 3, 0, 5, 2, 1, 7, 4]
    engine = Engine(*tiny, slots=count, steps=steps)
    params = mixed(len(prompts))
    again = engine.generate([prompts[i] for i in order], [params[i] for i in order])
    for i, samples in zip(order, again, strict=True):
        for sample, before in zip(samples, together[i], strict=True):
            assert sample.tokens.tolist() == before.tokens.tolist()


@pytest.mark.parametrize("sizes", [(1, 8, 1), pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_every_mesh_gives_the_same_tokens(tiny: Any, prompts: Any, sizes: Any) -> None:
    model, base = tiny
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    base = jax.device_put(base, tree_shardings(mesh, model.axes()[1], base))
    sharded = replace(model, constrain=constrainer(mesh))
    engine = Engine(sharded, base, slots=8, steps=8, shards=sizes[0] * sizes[1])
    plain = replace(mixed(1)[0], top_p=1.0, top_k=0, max_tokens=12)  # fewer programs than a mixture
    together = Engine(model, tiny[1], slots=4).generate(prompts[:3], plain)
    for samples, before in zip(engine.generate(prompts[:3], plain), together, strict=True):
        assert samples[0].tokens.tolist() == before[0].tokens.tolist()
        np.testing.assert_allclose(samples[0].logp, before[0].logp, atol=1e-4)


def test_a_stop_token_ends_an_answer_and_stays_in_it(tiny: Any, prompts: Any) -> None:
    free = SamplingParams(temperature=0, max_tokens=30)
    (whole,) = Engine(*tiny).generate(prompts[3:4], free)[0]
    stop = int(whole.tokens[7])
    first = whole.tokens.tolist().index(stop)
    for engine, params in [
        (Engine(*tiny, stop_tokens=(stop,)), free),
        (Engine(*tiny), replace(free, stop_tokens=(stop,))),
    ]:
        (short,) = engine.generate(prompts[3:4], params)[0]
        assert short.tokens.tolist() == whole.tokens[: first + 1].tolist()
        assert short.finish == "stop"


def test_a_stop_string_is_cut_from_the_text(tiny: Any, prompts: Any) -> None:
    text = lambda ids: "".join(f"<{int(i)}>" for i in ids)  # noqa: E731
    free = SamplingParams(temperature=0, max_tokens=40)
    engine = Engine(*tiny, decode=text, steps=16)
    (whole,) = engine.generate(prompts[2:3], free)[0]
    assert whole.text == text(whole.tokens)
    stop = text(whole.tokens[4:6])
    at = whole.text.index(stop)
    outs = engine.generate(prompts[2:4], [replace(free, stop=("never", stop)), free])
    (short,), (other,) = outs
    assert (short.text, short.finish) == (whole.text[:at], "stop")
    assert text(short.tokens).endswith(stop)
    assert len(short.logp) == len(short.tokens)
    assert len(other.tokens) == 40  # the neighbour goes on


def test_finished_samples_stream_out_before_the_last_is_done(tiny: Any, prompts: Any) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (60, 4, 60, 4)]
    seen: list[tuple[int, int]] = []
    watch = lambda request, index, tokens: seen.append((request, len(tokens)))  # noqa: E731
    order = [r for r, _, _ in Engine(*tiny, slots=2, steps=4).stream(prompts[:4], params, watch)]
    assert order[0] == 1
    assert order[-1] in (0, 2)
    assert seen[0] == (0, 4)


def test_mixed_prompts_compile_a_bounded_number_of_programs(tiny: Any) -> None:
    rng = np.random.default_rng(5)
    engine = Engine(*tiny, slots=8, steps=8)
    params = SamplingParams(temperature=0.7, max_tokens=40)
    rows = lambda: [rng.integers(0, V, n).tolist() for n in rng.integers(1, 90, 30)]  # noqa: E731
    programs = lambda: [f._cache_size() for f in (slots.decode, slots.resize, slots._layer)]  # noqa: E731
    before = programs()
    engine.generate(rows(), params)
    grown = [a - b for a, b in zip(programs(), before, strict=True)]
    assert grown[0] <= 3  # one cache length, and fewer slots at the end
    assert grown[2] <= 6  # widths 16, 32, 48, 64, 80 and 96
    warm = programs()
    for _ in range(3):
        engine.generate(rows(), params)
    assert programs()[0] - warm[0] <= 1


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], SHORT, "empty prompt"),
        ([1, V], SHORT, "outside of the vocabulary"),
        ([1], SamplingParams(max_tokens=0), "max_tokens is 0"),
        ([1] * 200, SamplingParams(max_tokens=57), "pass the limit of 256"),
        ([1], SamplingParams(max_tokens=9, stop=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_bad_requests(tiny: Any, prompt: list[int], params: SamplingParams, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Engine(*tiny).generate([[1], prompt], [SHORT, params])


def test_nothing_to_do(tiny: Any) -> None:
    assert Engine(*tiny).generate([], SamplingParams()) == []
