"""The gradient step: what it leaves alone, its noise, its donation, its compilation, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import Numerics
from jaxalign.objectives.sft import SFT
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.state import TrainState
from jaxalign.train.step import make_eval
from jaxalign.types import Batch
from tests.rig import Rig, assert_same_step, program, random_tree
from tests.tiny import Pair, V, arrays, examples, micro, tiny_config, tiny_model, unpacked

T = 16
PAIRS = examples(8, seed=5)
LORA = LoraConfig(rank=4, alpha=8.0)
CONFIG = tiny_config(tied=False)
MOMENTUM = optax.sgd(1.0, momentum=0.9)
RIG = Rig(tiny_model(LORA, CONFIG), optimizer=MOMENTUM)
NOISY = tiny_model(LORA.model_copy(update={"dropout": 0.2}), CONFIG, neftune_alpha=5.0)
SHAPE = (2, 8, 1, T)


def without_targets(pairs: list[Pair]) -> list[Pair]:
    return [(ids, np.zeros_like(mask)) for ids, mask in pairs]


def bitwise_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def still() -> tuple[TrainState, Any]:
    """(a state that holds nothing but the weights of RIG, its base)."""
    params, base = RIG.weights()
    return TrainState(0, params, (), None), base


@pytest.fixture(scope="module")
def evaluated() -> Any:
    """evaluated(batch [8, 1, T]) -> (loss sum, weight) under the weights of RIG."""
    run = make_eval(RIG.model, SFT(), make_mesh(MeshConfig(), jax.devices()[:1]))
    state, base = still()
    return lambda batch: [float(x) for x in run(state, base, arrays(batch))["loss"]]


# --- counting ---------------------------------------------------------------------------------------------


def test_the_loss_is_one_mean_over_all_targets_of_the_step(evaluated: Any) -> None:
    """Not the mean of the micro-batches' means: one micro-batch has 8 targets, the other many."""
    few = [(ids, np.arange(len(ids)) == len(ids) - 1) for ids, _ in examples(8, seed=6)]
    (sum_1, weight_1), (sum_2, weight_2) = evaluated(unpacked(PAIRS)), evaluated(unpacked(few))
    assert (weight_1, weight_2) == (sum(m.sum() for _, m in PAIRS), 8)
    _, metrics = RIG.run(micro(unpacked(PAIRS + few), 2))
    np.testing.assert_allclose(metrics["loss"], (sum_1 + sum_2) / (weight_1 + 8), rtol=1e-5)
    assert abs(metrics["loss"] - (sum_1 / weight_1 + sum_2 / 8) / 2) > 0.01
    assert metrics["num_targets"] == weight_1 + 8


def test_a_step_without_targets_is_harmless() -> None:
    change, metrics = RIG.run(micro(unpacked(without_targets(PAIRS * 2)), 2))
    assert {metrics[name] for name in ("loss", "grad_norm", "nonfinite", "num_targets")} == {0}
    assert metrics["num_tokens"] == 2 * sum(len(ids) for ids, _ in PAIRS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(change))


def test_a_micro_batch_without_targets_counts_for_nothing() -> None:
    blank = without_targets(PAIRS)
    apart = RIG.run(micro(unpacked(PAIRS + blank), 2))
    mixed = RIG.run(micro(unpacked(PAIRS[:3] + blank + PAIRS[3:]), 2))
    assert_same_step(apart, mixed)
    assert apart[1]["num_targets"] == sum(m.sum() for _, m in PAIRS)


# --- what must not matter, and what must ------------------------------------------------------------------


def test_padding_ids_do_not_matter(evaluated: Any) -> None:
    """Whatever stands in the padding, the stop token included, and whatever its mask says."""
    want = evaluated(unpacked(PAIRS, pad=0))
    assert evaluated(unpacked(PAIRS, pad=2)) == want
    dirty = unpacked(PAIRS, pad=50)
    dirty.mask[dirty.segments == 0] = True
    assert evaluated(dirty) == want


def test_prompts_are_read_and_not_trained(evaluated: Any) -> None:
    """A prompt token is no target, but it is seen: the weight stays and the loss moves."""
    batch = unpacked(PAIRS)
    want = evaluated(batch)
    prompts = (batch.segments > 0) & ~batch.mask
    batch.tokens[prompts] = (batch.tokens[prompts] + 1) % V
    got = evaluated(batch)
    assert got[1] == want[1]
    assert got[0] != want[0]


def test_the_last_token_of_an_example_is_trained(evaluated: Any) -> None:
    """The stop token: another one there is another loss, and without it there is one target less a row."""
    want = evaluated(unpacked(PAIRS))
    other = [(np.append(ids[:-1], (ids[-1] + 1) % V).astype(np.int32), mask) for ids, mask in PAIRS]
    assert evaluated(unpacked(other))[0] != want[0]
    cut = [(ids, np.append(mask[:-1], False)) for ids, mask in PAIRS]
    assert evaluated(unpacked(cut))[1] == want[1] - len(PAIRS)


# --- not finite -------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_says_so() -> None:
    """A NaN that one token of one micro-batch brings in: parameters and optimiser stay bit for bit, and the
    next step is what it would have been."""
    _, state, base = RIG.start()
    base["embed"]["embedding"] = base["embed"]["embedding"].at[V - 1].set(jnp.nan)
    sane = [(np.minimum(ids, V - 2), mask) for ids, mask in PAIRS * 2]
    poison = [(np.append(V - 1, ids[1:]).astype(np.int32), mask) for ids, mask in sane[:1]]
    good, bad = (RIG.place(micro(unpacked(p), 2)) for p in (sane, poison + sane[1:]))
    step = program(RIG, SHAPE)
    state, first = step(state, base, good)
    assert first["nonfinite"] == 0
    held = jax.tree.map(np.array, state)
    want, _ = step(jax.tree.map(jnp.array, held), base, good)
    state, report = step(state, base, bad)
    assert report["nonfinite"] == 1
    assert not np.isfinite(report["loss"])
    assert not np.isfinite(report["grad_norm"])
    bitwise_equal((state.params, state.opt, state.step), (held.params, held.opt, held.step + 1))
    state, last = step(state, base, good)
    assert last["nonfinite"] == 0
    bitwise_equal((state.params, state.opt), (want.params, want.opt))


@dataclass(frozen=True)
class Bounded:
    """The loss of `SFT` with a bound on it."""

    most: float
    inner: Any = SFT()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def bounds(self) -> dict[str, float]:
        return {"loss": self.most}

    def __call__(self, scores: Any, batch: Batch) -> Any:
        return self.inner(scores, batch)


@pytest.mark.parametrize(("most", "made"), [(1e9, True), (1e-9, False)])
def test_an_update_beyond_its_bounds_is_not_made(most: float, made: bool) -> None:
    """Parameters and optimiser stay bit for bit; the counter goes on, and the report is of this update."""
    rig = replace(RIG, objective=Bounded(most))
    _, state, base = rig.start()
    before = jax.tree.map(np.array, state)
    after, report = program(rig, SHAPE)(state, base, rig.place(micro(unpacked(PAIRS * 2), 2)))
    assert (report["skipped"], report["nonfinite"]) == (not made, 0)
    assert report["loss"] > 1
    same = jax.tree.map(np.array_equal, (before.params, before.opt), (after.params, after.opt))
    assert jax.tree.all(same) != made
    assert after.step == 1


# --- noise ------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step() -> None:
    """The same seed gives the same step bit for bit, another seed another one, and so does the next step."""
    rig = Rig(NOISY, optimizer=optax.set_to_zero())
    placed = rig.place(micro(unpacked(PAIRS * 2), 2))
    step = program(rig, SHAPE)

    def losses(seed: int) -> list[float]:
        _, state, base = replace(rig, seed=seed).start()
        out = []
        for _ in range(2):
            state, metrics = step(state, base, placed)
            out.append(float(metrics["loss"]))
        return out

    first = losses(0)
    assert losses(0) == first
    assert len({*first, *losses(1)}) == 4


def test_micro_batches_do_not_share_noise() -> None:
    """The same rows twice: with one noise for both the sum would be twice that of one."""
    rig = Rig(NOISY, optimizer=optax.set_to_zero())
    both = rig.run(micro(unpacked(PAIRS * 2), 2))[1]["loss"]
    alone = rig.run(micro(unpacked(PAIRS + without_targets(PAIRS)), 2))[1]["loss"]
    assert abs(both - alone) > 1e-4


def test_evaluation_is_never_noisy(evaluated: Any) -> None:
    run = make_eval(NOISY, SFT(), make_mesh(MeshConfig(), jax.devices()[:1]))
    total, weight = run(*still(), arrays(unpacked(PAIRS)))["loss"]
    assert [float(total), float(weight)] == evaluated(unpacked(PAIRS))


@pytest.fixture(scope="module")
def noisy_step() -> Any:
    return Rig(NOISY).run(micro(unpacked(PAIRS), 1))


def test_noise_is_the_same_on_any_mesh(noisy_step: Any) -> None:
    assert_same_step(Rig(NOISY, (2, 2, 2)).run(micro(unpacked(PAIRS), 1)), noisy_step)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_does_not_change_the_step(noisy_step: Any, remat: str) -> None:
    """With dropout on: what is computed again must drop the same inputs."""
    assert_same_step(Rig(replace(NOISY, remat=remat)).run(micro(unpacked(PAIRS), 1)), noisy_step)


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_bfloat16_gradients_point_where_those_of_float32_do(platform: str) -> None:
    """Operands in bfloat16, on accelerators activations too; adapters, their gradient and sums in float32."""
    model = replace(RIG.model, numerics=Numerics.choose(jnp.bfloat16, platform))
    batch = micro(unpacked(PAIRS * 2), 2)
    (low, report), (full, want) = (Rig(m).run(batch) for m in (model, RIG.model))
    np.testing.assert_allclose(report["loss"], want["loss"], rtol=0.01)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(low))
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (low, full))
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.995
    np.testing.assert_allclose(np.sqrt(a @ a), np.sqrt(b @ b), rtol=0.02)


# --- compilation and memory -------------------------------------------------------------------------------


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all floating arrays in a jaxpr, inner ones included."""
    found = set()
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            if jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.floating):
                found.add(var.aval.shape)
        for inner in jaxprs_in_params(eqn.params):
            found |= shapes_in(inner)
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 2), (2, 4, 1)])
def test_no_array_holds_the_logits_of_a_batch(full: bool, mesh: tuple[int, int, int]) -> None:
    """32 rows of 512 tokens: nothing has the vocabulary in it but the matrices themselves and one chunk of at
    most 512 tokens a device."""
    rig = Rig(tiny_model(None if full else LORA, tiny_config(vocab_size=104)), mesh, full)
    step, state, base = rig.start()
    batch = Batch(*(jax.ShapeDtypeStruct((2, 32, 1, 512), d) for d in ("int32", "bool", "int32", "int32")))
    shapes = shapes_in(step.trace(state, base, batch).jaxpr.jaxpr)
    chunks = [s for s in shapes if 104 in s and sorted(s) != [32, 104]]
    assert chunks
    assert max(np.prod(s) for s in chunks) <= 512 * 104 * mesh[0] * mesh[1]


def test_the_program_does_not_grow_with_depth() -> None:
    """Eight layers compile to as many instructions as two."""
    deep = replace(RIG, model=tiny_model(LORA, tiny_config(tied=False, num_layers=8)))
    count = [len(program(rig, SHAPE).as_text().splitlines()) for rig in (RIG, deep)]
    assert count[0] > 500
    assert abs(count[1] / count[0] - 1) < 0.03


def test_the_state_is_donated_and_compiled_once() -> None:
    step, state, base = RIG.start()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt)))
    assert program(RIG, SHAPE).memory_analysis().alias_size_in_bytes >= size
    batch, old = RIG.place(micro(unpacked(PAIRS), 1)), state
    for _ in range(3):
        state, _ = step(state, base, batch)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt)))


def test_the_state_lies_where_it_lay() -> None:
    """Moments lie like their parameters, before and after a step."""
    rig = Rig(tiny_model(None), (1, 4, 2), full=True, optimizer=optax.adamw(1e-3))
    _, state, base = rig.start()
    before = jax.tree.map(lambda x: x.sharding, state)
    path = lambda tree: tree["layers"]["mlp"]["up"]["kernel"]  # noqa: E731
    assert path(state.params).addressable_shards[0].data.shape == (2, 8, 24)
    for moment in (state.opt[0].mu, state.opt[0].nu):
        assert jax.tree.map(lambda x: x.sharding, moment) == before.params
    after, _ = program(rig, (1, 8, 1, T))(state, base, rig.place(micro(unpacked(PAIRS), 1)))
    assert jax.tree.map(lambda x: x.sharding, after) == before


def test_random_tree_is_what_the_rig_says() -> None:
    """The weights of these tests are not zero anywhere, so that every gradient shows."""
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(random_tree(RIG.model.shapes()[0], 1)))
