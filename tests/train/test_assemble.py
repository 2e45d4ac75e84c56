"""What is compiled, what it aliases, which remat is taken, and how an evaluation is added up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.objectives.sft import SFT
from jaxalign.sharding import MeshConfig, make_mesh, tree_shardings
from jaxalign.train import assemble, feed
from jaxalign.train.assemble import Machine, Weights, check_batch, fits, learning_rate
from jaxalign.train.programs import Programs, shape_of
from jaxalign.train.settings import config_for, objective_for
from jaxalign.types import Batch
from tests.tiny import examples, tiny_model, unpacked


def machine(**keys: Any) -> Machine:
    """Two layers on a mesh of 4 x 2 devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    config = config_for("sft")(batch_size=8, dtype="f32", **keys)
    model = tiny_model(LoraConfig(rank=4))
    adapter, base = model.init(jax.random.key(0))
    shapes, axes = model.shapes(), model.axes()
    shardings = [tree_shardings(mesh, a, s) for a, s in zip(axes, shapes, strict=True)]
    loaded: Any = SimpleNamespace(base_hash="x")
    weights = Weights(
        loaded,
        model,
        jax.device_put(adapter, shardings[0]),
        jax.device_put(base, shardings[1]),
        False,
        shardings[0],
    )
    messages: list[str] = []
    made = Machine(weights, objective_for("sft", config), mesh, config, 10, messages.append)
    object.__setattr__(made, "messages", messages)
    return made


def host(count: int = 8, seed: int = 0) -> Batch:
    """[B, 1, T]"""
    return unpacked(examples(count, seed))


def training_batch(made: Machine) -> Batch:
    batch = jax.tree.map(lambda x: x[None], host())
    return feed.abstract(batch, made.mesh)


@pytest.fixture(scope="module")
def prepared() -> tuple[Machine, Programs]:
    """A machine and its step, compiled."""
    made = machine()
    return made, made.train_programs([training_batch(made)])


def test_the_step_aliases_the_whole_state(prepared: tuple[Machine, Programs]) -> None:
    """Donation is real: every byte of the state on a device is reused for the new one."""
    made, programs = prepared
    (program,) = programs.table.values()
    per_device = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(made.abstract_state)
    )
    assert program.memory_analysis().alias_size_in_bytes >= per_device


def test_the_step_takes_and_gives_states_of_one_kind(prepared: tuple[Machine, Programs]) -> None:
    """A fresh state, a stepped one and a restored one run in the same program."""
    made, programs = prepared
    like = made.abstract_state
    state, _ = programs(made.new_state(), made.weights.base, _placed(made))
    state, _ = programs(state, made.weights.base, _placed(made))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and a.dtype == b.dtype, state, like)
    assert all(jax.tree.leaves(same))
    assert programs.late == 0
    assert set(made.parts(state)) == {"params", "opt", "rest", "reference", "past"}
    assert made.parts(state)["reference"] is None


def _placed(made: Machine) -> Batch:
    return feed.place(jax.tree.map(lambda x: x[None], host()), made.mesh)


class Uncompiled(Programs):
    """Programs that are asked for and not compiled."""

    def prepare(self, *args: Any) -> Any:
        return self.table.setdefault(shape_of(args[-1]), object())


def test_auto_remat_takes_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(assemble, "Programs", Uncompiled)
    monkeypatch.setattr(assemble, "fits", lambda program: next(answers))
    made = machine()
    programs = made.train_programs([training_batch(made)])
    assert made.messages == ["remat=dots does not fit the device, trying the next leaner one"]
    assert len(programs.table) == 1


def test_a_chosen_remat_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "fits", lambda program: False)
    monkeypatch.setattr(assemble, "Programs", Uncompiled)
    made = machine(remat="dots")
    made.train_programs([training_batch(made)])
    assert made.messages == []


@pytest.mark.parametrize(("limit", "expected"), [(None, True), (1000, True), (200, False)])
def test_fits(monkeypatch: pytest.MonkeyPatch, limit: int | None, expected: bool) -> None:
    stats = None if limit is None else {"bytes_limit": limit}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    sizes = {"argument": 100, "output": 60, "temp": 80, "alias": 50}
    analysis = SimpleNamespace(**{f"{k}_size_in_bytes": v for k, v in sizes.items()})
    assert fits(SimpleNamespace(memory_analysis=lambda: analysis)) is expected


def test_an_evaluation_does_not_depend_on_how_rows_are_batched() -> None:
    """Batches of very unequal numbers of targets: sums and weights are added, then divided once."""
    made = machine()
    state = made.new_state()
    results = []
    for size in (8, 16):
        pairs = examples(24, seed=5)
        batches = [unpacked(pairs[i : i + size]) for i in range(0, 24, size)]
        batches[-1] = _filled(batches[-1], size)
        programs = made.eval_programs([feed.abstract(batches[0], made.mesh, 0)])
        results.append(made.evaluator(programs, batches)(state))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    assert set(results[0]) == {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"}


def _filled(batch: Batch, rows: int) -> Batch:
    """The batch with rows of padding up to `rows`."""
    missing = rows - batch.tokens.shape[0]
    return jax.tree.map(lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]), batch)


@pytest.mark.parametrize(
    ("keys", "rate"), [({}, 2e-4), ({"lora": None}, 2e-5), ({"lora": None, "learning_rate": 1.0}, 1.0)]
)
def test_learning_rate_by_mode(keys: dict[str, Any], rate: float) -> None:
    assert learning_rate(config_for("sft")(**keys), SFT.rates) == rate


def test_batches_that_divide_and_that_do_not() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch(config_for("sft")(batch_size=16, grad_accumulation=4), mesh)
    with pytest.raises(UserError, match=r"does not divide .*4 x 4 devices") as caught:
        check_batch(config_for("sft")(batch_size=24, grad_accumulation=4), mesh)
    assert "try batch_size=32" in str(caught.value)
