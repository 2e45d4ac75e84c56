"""What an objective needs beyond log-probs reaches it, on one device and with every axis of the mesh cut."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from jaxalign.models.adapters import LoraConfig
from jaxalign.objectives.base import RIVALS
from jaxalign.objectives.mix import Mix
from jaxalign.train.score import score
from jaxalign.types import Batch
from tests.rig import Rig, assert_same_step, random_tree
from tests.tiny import arrays, examples, micro, quick_jit, tiny_config, tiny_model, unpacked

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "up"))
MODEL = tiny_model(LORA, tiny_config(num_heads=8, num_kv_heads=8, head_dim=4, tied=False))
FIELDS = {"collision", "rivals", "prompt"}


def pairs(count: int) -> Batch:
    """[count, 2, 16]."""
    return jax.tree.map(lambda x: x.reshape(count, 2, -1), unpacked(examples(2 * count)))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_needed_is_there_and_nothing_else(full: bool) -> None:
    base, batch = random_tree(MODEL.shapes()[1], 0), arrays(pairs(2))
    forward = lambda needs: partial(score, MODEL, None, needs=frozenset(needs), train_base=full)  # noqa: E731
    for needs in ({"collision"}, {"rivals"}, {"prompt"}, set()):
        got = jax.eval_shape(forward(needs), base, batch)
        assert {name for name in FIELDS if getattr(got, name) is not None} == needs
    got = quick_jit(forward(FIELDS))(base, batch)
    flat = [x.reshape(4, -1) for x in (batch.tokens, batch.segments, batch.positions)]
    logits = quick_jit(lambda b: MODEL.logits(b, MODEL.hidden(None, b, *flat)[0]))(base)
    logits = logits[:, :-1].reshape(2, 2, 15, -1)
    logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    mask = np.asarray(got.mask)[..., 1:]
    np.testing.assert_allclose(
        got.collision[..., 1:][mask], np.log(np.exp(2 * logs).sum(-1))[mask], atol=1e-4
    )
    np.put_along_axis(logs, np.asarray(batch.tokens)[..., 1:, None], -np.inf, axis=-1)
    np.testing.assert_allclose(
        got.rivals[..., 1:, :][mask], np.sort(logs, axis=-1)[..., ::-1][..., :RIVALS][mask], atol=1e-4
    )
    assert got.prompt.shape == (2, 32)


ALL = Mix(losses={"wpo": 1, "cringe_pair": 1, "rpo_relative": 1}, beta=1.0)  # each loss is a metric too


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_one_and_eight_devices_make_one_step(mesh: tuple[int, int, int]) -> None:
    """Everything that there is to need, in one program."""
    assert ALL.needs >= FIELDS
    batch = micro(pairs(8), 1)
    want, got = (Rig(MODEL, mesh=m, objective=ALL).run(batch) for m in ((1, 1, 1), mesh))
    assert max(np.abs(x).max() for x in jax.tree.leaves(want[0])) > 1e-3
    assert {f"losses/{name}" for name in ALL.losses} <= want[1].keys()
    assert_same_step(got, want)
