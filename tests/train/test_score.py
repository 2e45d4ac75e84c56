"""What an objective needs beyond log-probs reaches it, on one device and with every axis of the mesh cut."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.models.adapters import LoraConfig
from jaxalign.objectives.base import RIVALS
from jaxalign.objectives.composite import WPO
from jaxalign.objectives.relative import RelativeRPO
from jaxalign.objectives.token_contrastive import CringePair
from jaxalign.train.score import score
from jaxalign.types import Batch
from tests.rig import Rig, assert_same_step, random_tree
from tests.tiny import arrays, examples, micro, tiny_config, tiny_model, unpacked

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "up"))
MODEL = tiny_model(LORA, tiny_config(num_heads=8, num_kv_heads=8, head_dim=4, tied=False))
FIELDS = {"collision", "rivals", "prompt"}


def pairs(count: int) -> Batch:
    """[count, 2, 16]."""
    return jax.tree.map(lambda x: x.reshape(count, 2, -1), unpacked(examples(2 * count)))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_needed_is_there_and_nothing_else(full: bool) -> None:
    base, batch = random_tree(MODEL.shapes()[1], 0), arrays(pairs(2))
    for needs in ({"collision"}, {"rivals"}, {"prompt"}, set()):
        got = score(MODEL, None, base, batch, needs=frozenset(needs), train_base=full)
        assert {name for name in FIELDS if getattr(got, name) is not None} == needs
    got = score(MODEL, None, base, batch, needs=frozenset(FIELDS), train_base=full)
    flat = [x.reshape(4, -1) for x in (batch.tokens, batch.segments, batch.positions)]
    logits = MODEL.logits(base, MODEL.hidden(None, base, *flat)[0])[:, :-1].reshape(2, 2, 15, -1)
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


@pytest.mark.parametrize("objective", [WPO(beta=1.0), CringePair(), RelativeRPO(beta=1.0)])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_one_and_eight_devices_make_one_step(objective: Any, mesh: tuple[int, int, int]) -> None:
    batch = micro(pairs(8), 1)
    want, got = (Rig(MODEL, mesh=m, objective=objective).run(batch) for m in ((1, 1, 1), mesh))
    assert max(np.abs(x).max() for x in jax.tree.leaves(want[0])) > 1e-3
    assert_same_step(got, want)
