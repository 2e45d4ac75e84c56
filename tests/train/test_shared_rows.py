"""Several groups in one row make the step that one row for each makes, and the one of answers apart."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.data.batching import BatchSource
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.rope import Rope
from jaxalign.objectives.listwise import LiPO
from jaxalign.objectives.pairwise import DPO
from jaxalign.objectives.unpaired import KTO
from jaxalign.types import Batch, Example, Group
from tests.rig import Rig, compiled
from tests.tiny import V, tiny_config, tiny_model

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down"))
CONFIG = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 4}
WINDOW = ((Rope("default", 10000.0, 4, 64), 5),)
MODELS = {
    "": tiny_model(LORA, tiny_config(**CONFIG)),
    "window": tiny_model(LORA, tiny_config(**CONFIG, kinds=WINDOW)),
}
LOSSES: dict[str, Any] = {"pairs": DPO(beta=0.3), "lists": LiPO(beta=0.3), "labels": KTO(beta=0.3)}


@cache
def groups(kind: str) -> list[Group]:
    """Fifteen groups with rows of at most 32 tokens: any two of them go into a row of 64."""
    rng = np.random.default_rng(4)
    out = []
    for i in range(15):
        prompt = rng.integers(0, V, rng.integers(1, 7))
        count = {"pairs": 2, "lists": 2 + i % 2, "labels": 1}[kind]
        answers = [np.concatenate([prompt, rng.integers(0, V, n)]) for n in rng.integers(1, 8, count)]
        aux = {"lists": {"scores": rng.normal(size=count).astype(np.float32)}, "labels": {"label": i % 3 > 0}}
        members = [Example("", t.astype(np.int32), np.arange(len(t)) >= len(prompt)) for t in answers]
        out.append(Group(str(i), tuple(members), {k: np.asarray(v) for k, v in aux.get(kind, {}).items()}))
    return out


@cache
def made(kind: str, accumulation: int, blocks: int = 1, share: bool = True) -> Batch:
    """A step of sixteen groups, one of them twice."""
    source = BatchSource(
        groups(kind),
        batch_size=16,
        accumulation=accumulation,
        max_length=48,
        group=LOSSES[kind].group,
        share=share,
        blocks=blocks,
    )
    return source.batch(1)


def rows(batch: Batch) -> int:
    """Rows that the model sees of each micro-batch."""
    assert batch.shared is not None
    return int(np.prod(batch.shared.tokens.shape[1:3]))


def assert_same(got: tuple[Any, dict[str, float]], want: tuple[Any, dict[str, float]]) -> None:
    """Metrics and gradients to 1e-5 of the largest of their array."""
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, b in jax.tree_util.tree_leaves_with_path(want[0]):
        assert np.abs(b).max() > 1e-4
        a, name = got[0], jax.tree_util.keystr(path)
        for key in path:
            a = a[key.key]
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)


@cache
def apart(kind: str, model: str = "") -> tuple[Any, dict[str, float]]:
    """The step on one device, every answer in a row of its own, in two micro-batches; KTO looks at all."""
    return Rig(MODELS[model], objective=LOSSES[kind]).run(
        made(kind, 1 if kind == "labels" else 2, share=False)
    )


@pytest.mark.parametrize(
    ("kind", "accumulation", "model"),
    [("pairs", 2, ""), ("pairs", 1, "window"), ("lists", 2, ""), ("labels", 1, "")],
)
def test_one_device(kind: str, accumulation: int, model: str) -> None:
    batch, alone = made(kind, accumulation), made(kind, accumulation, 16 // accumulation)
    assert rows(batch) <= rows(alone) // 2 == 8 // accumulation
    rig = Rig(MODELS[model], objective=LOSSES[kind])
    got = rig.run(batch)
    assert_same(got, rig.run(alone))
    assert_same(got, apart(kind, model))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("mesh", [(2, 1, 1), (2, 2, 2), (2, 4, 1)])
def test_many_devices(kind: str, mesh: tuple[int, int, int]) -> None:
    shards, accumulation = mesh[0] * mesh[1], 2 if kind == "pairs" and mesh[0] * mesh[1] < 8 else 1
    batch = made(kind, accumulation, shards)
    assert batch.shared is not None
    assert batch.shared.index.shape[1] == shards
    assert rows(batch) <= 8 // accumulation
    assert_same(replace(Rig(MODELS[""], objective=LOSSES[kind]), mesh=mesh).run(batch), apart(kind))


def collectives(rig: Rig, batch: Batch) -> list[str]:
    """Names and shapes of what a compiled step sends from device to device."""
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    text = compiled(rig, batch).as_text()
    lines = (line.split(" = ", 1)[1] for line in text.splitlines() if " = " in line)
    return [line.split(", ")[0] for line in lines if any(f" {name}(" in line for name in names)]


def test_no_hidden_states_go_from_device_to_device() -> None:
    """A step over rows of two groups sends what one over rows of one group sends."""
    rig = Rig(MODELS[""], (2, 4, 1), objective=LOSSES["pairs"])
    packed, alone = (collectives(rig, made("pairs", 1, blocks)) for blocks in (8, 16))
    shapes = lambda found: sorted(line.split("{")[0] for line in found)  # noqa: E731
    assert shapes(packed) == shapes(alone)
    assert packed
