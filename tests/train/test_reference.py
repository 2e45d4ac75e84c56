"""The reference policy: where it comes from makes no difference, and it moves when it should."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxalign.data.sharing import lay_out
from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.rope import Rope
from jaxalign.objectives.mix import Mix
from jaxalign.objectives.pairwise import DPO
from jaxalign.objectives.unpaired import KTO
from jaxalign.train.reference import ReferenceConfig, mover, resolve_mode
from jaxalign.train.score import score
from jaxalign.types import Batch, Example, Params
from tests.rig import Rig, assert_same_step
from tests.tiny import V, examples, micro, tiny_config, tiny_model, unpacked

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))
CONFIG = tiny_config(num_heads=8, num_kv_heads=8, head_dim=4)
MODELS = {False: tiny_model(LORA, CONFIG), True: tiny_model(None, CONFIG)}
FROZEN = ReferenceConfig(mode="frozen")


def pairs(count: int = 8, length: int = 16) -> Batch:
    """[B, 2, T]: unequal answers; the last pair is padding."""
    flat = unpacked(examples(2 * count), length)
    batch = jax.tree.map(lambda x: x.reshape(count, 2, length), flat)
    keep = np.arange(count)[:, None, None] < count - 1
    return replace(batch, mask=batch.mask & keep, segments=batch.segments * keep)


def conversation(count: int = 8, length: int = 24) -> tuple[Batch, Batch]:
    """Pairs [B, 2, T] with one prompt each, and the same with the prompt once."""
    rng = np.random.default_rng(3)
    groups = []
    for _ in range(count - 1):
        prompt = rng.integers(0, V, rng.integers(1, 12))
        both = [np.concatenate([prompt, rng.integers(0, V, n)]) for n in rng.integers(1, 12, 2)]
        groups.append([Example("", t.astype(np.int32), np.arange(len(t)) >= len(prompt)) for t in both])
    flat = unpacked(
        [(m.tokens, m.mask) for g in groups for m in g] + [(np.zeros(0), np.zeros(0))] * 2, length
    )
    plain = jax.tree.map(lambda x: x.reshape(count, 2, length), flat)
    alone = [[members] for members in (*groups, [])]
    return plain, replace(plain, shared=lay_out(alone, (1, 40), (2, length), pad_id=0))


def with_ref(batch: Batch, adapter: Params | None, base: Params, full: bool = False) -> Batch:
    """The batch with log-probs [B, G, T] of its targets under these weights."""
    forward = jax.jit(partial(score, MODELS[full]))
    return replace(batch, aux=batch.aux | {"ref": np.asarray(forward(adapter, base, batch).logp)})


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_policy_that_is_its_reference_has_a_loss_of_ln_2(full: bool) -> None:
    rig = Rig(MODELS[full], full=full, objective=DPO(), reference=FROZEN)
    _, metrics = rig.after(micro(pairs(), 1))
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics["rewards/margins"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["grad_norm"]) > 1e-3


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_frozen_is_precomputed(full: bool) -> None:
    """A copy in the state against log-probs that came with the batch."""
    rig = Rig(MODELS[full], full=full, objective=DPO(beta=0.3), reference=FROZEN)
    adapter, base = rig.weights()
    known = with_ref(pairs(), None if full else adapter, base, full)
    got = replace(rig, reference=None).run(micro(known, 1))
    assert_same_step(got, rig.run(micro(pairs(), 1)))


def test_adapter_off_is_precomputed() -> None:
    """The base without its adapter, with no copy of anything, against log-probs under the bare base."""
    rig = Rig(MODELS[False], objective=DPO(beta=0.3))
    known = with_ref(pairs(), None, rig.weights()[1])
    got = rig.run(micro(pairs(), 1))
    assert abs(got[1]["rewards/margins"]) > 1e-3
    assert_same_step(got, rig.run(micro(known, 1)))


SUMS = {"dpo": {"beta": 0.3}, "rpo": {"alpha": 1.0}}  # rpo: a mean over the tokens of the step
OBJECTIVES: dict[str, Any] = {
    "pairs": Mix(losses=SUMS | {"aot": 1}),  # aot sorts the batch
    "kto (mean of the batch)": KTO(),
}


def _labelled(batch: Batch) -> Batch:
    label = np.arange(batch.tokens.shape[0]) % 3 > 0
    return replace(batch, aux=batch.aux | {"label": label})


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_same_step_on_any_mesh(name: str, mesh: tuple[int, int, int]) -> None:
    rig = Rig(MODELS[False], objective=OBJECTIVES[name])
    batch = micro(_labelled(pairs()), 1)
    assert_same_step(replace(rig, mesh=mesh).run(batch), rig.run(batch))


def test_same_step_in_micro_batches() -> None:
    rig = Rig(MODELS[False], objective=Mix(losses=SUMS))
    assert_same_step(rig.run(micro(pairs(), 4)), rig.run(micro(pairs(), 1)))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_prompt_computed_once_gives_the_same_step(mesh: tuple[int, int, int]) -> None:
    plain, shared = (micro(b, 2) for b in conversation())
    rig = Rig(MODELS[False], objective=DPO(beta=0.3))
    assert_same_step(replace(rig, mesh=mesh).run(shared), rig.run(plain))


def test_a_prompt_computed_once_under_a_window() -> None:
    """Distances are those of positions, not of places in the row."""
    config = tiny_config(kinds=((Rope("default", 10000.0, 8, 64), 5),))
    rig = Rig(tiny_model(LORA, config), objective=DPO(beta=0.3))
    plain, shared = (micro(b, 1) for b in conversation())
    assert_same_step(rig.run(shared), rig.run(plain))


def test_a_frozen_reference_stays_and_a_moving_one_follows() -> None:
    batch, before = micro(pairs(), 1), Rig(MODELS[True]).weights()[1]
    rig = Rig(MODELS[True], full=True, optimizer=optax.sgd(10.0), objective=DPO(), reference=FROZEN)
    state, _ = rig.after(batch)
    jax.tree.map(np.testing.assert_array_equal, state.reference, before)
    moving = replace(rig, reference=ReferenceConfig(mode="ema", sync_every=1, mix=0.25))
    step, state, base = moving.start()
    state, _ = step(state, base, moving.place(batch))
    jax.tree.map(np.testing.assert_array_equal, state.reference, before)  # until the next update
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.asarray(new), before, state.params)
    state, _ = step(state, base, moving.place(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state.reference, want)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (want, before)), strict=True)) > 1e-3


@pytest.mark.parametrize(("step", "moves"), [(1, False), (3, True), (4, False), (6, True)])
@pytest.mark.parametrize(("mix", "want"), [(0.6, [0.6, 2.8]), (1.0, [1.0, 2.0])])
def test_moves_of_tr_dpo(step: int, moves: bool, mix: float, want: list[float]) -> None:
    """loss_vectors.json, tr_dpo: theta [1, 2], reference [0, 4]."""
    move = mover(ReferenceConfig(sync_every=3, mix=mix), "ema")
    assert move is not None
    got = jax.jit(move)({"w": np.float32([0, 4])}, {"w": np.float32([1, 2])}, step)
    np.testing.assert_allclose(got["w"], want if moves else [0, 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("full", "imported", "mode"),
    [(False, False, "adapter_off"), (False, True, "frozen"), (True, False, "frozen")],
)
def test_auto(full: bool, imported: bool, mode: str) -> None:
    assert resolve_mode(ReferenceConfig(), full=full, imported=imported) == mode


@pytest.mark.parametrize(
    ("keys", "full", "said"),
    [
        ({"mode": "adapter_off"}, True, "no adapter to switch off"),
        ({"mode": "ema", "mix": 0.5}, False, "adapters cannot be mixed"),
    ],
)
def test_modes_that_do_not_go_with_what_trains(keys: dict[str, Any], full: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_mode(ReferenceConfig(**keys), full=full, imported=False)
