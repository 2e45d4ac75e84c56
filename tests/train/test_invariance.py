"""One step is one step, however its rows are cut into micro-batches, devices, packed or padded rows."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.rope import Rope
from jaxalign.objectives.sft import SFT
from jaxalign.sharding import constrainer
from jaxalign.train.feed import place
from jaxalign.train.step import make_eval
from jaxalign.types import Batch
from tests.rig import Rig, assert_same_step
from tests.tiny import examples, micro, packed, tiny_config, tiny_model, unpacked

PAIRS = examples(16)
LORA = LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "o", "up", "down"))
CONFIG = tiny_config(num_heads=8, num_kv_heads=8, head_dim=4, tied=False)
MODELS = {False: tiny_model(LORA, CONFIG), True: tiny_model(None, CONFIG)}

LAYOUTS: dict[str, Batch] = {
    "1x16": micro(unpacked(PAIRS, 16), 1),
    "4x4": micro(unpacked(PAIRS, 16), 4),
    "2x8": micro(unpacked(PAIRS, 16), 2),
    "4x4 padded to 40": micro(unpacked(PAIRS, 40, pad=7), 4),
    "packed 1x8": micro(packed(PAIRS, 40, 8), 1),
    "packed 2x8": micro(packed(PAIRS, 40, 16), 2),
}


@pytest.fixture(scope="module")
def plain() -> dict[bool, tuple]:
    """The step of one device and one micro-batch, for LoRA and full tuning."""
    return {full: Rig(model, full=full).run(LAYOUTS["1x16"]) for full, model in MODELS.items()}


def test_the_plain_step_is_a_step(plain: dict[bool, tuple]) -> None:
    """Every trained leaf moves, and the counts are those of the examples."""
    for gradient, metrics in plain.values():
        assert min(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-3
        assert metrics["num_targets"] == sum(mask.sum() for _, mask in PAIRS)
        assert metrics["num_tokens"] == sum(len(ids) for ids, _ in PAIRS)
        assert metrics["nonfinite"] == 0
        assert metrics["grad_norm"] > 0.01


# mesh (data, fsdp, tensor), layout: every mesh shape, and every layout at least once.
LORA_CASES = [
    ((1, 1, 1), "4x4"),
    ((1, 1, 1), "4x4 padded to 40"),
    ((1, 1, 1), "packed 2x8"),
    ((8, 1, 1), "1x16"),
    ((1, 8, 1), "packed 1x8"),
    ((1, 1, 2), "2x8"),
    ((1, 1, 8), "packed 1x8"),
    ((2, 2, 2), "4x4 padded to 40"),
    ((4, 1, 2), "2x8"),
    ((1, 4, 2), "packed 2x8"),
]
FULL_CASES = [
    ((1, 1, 1), "packed 2x8"),
    ((8, 1, 1), "2x8"),
    ((1, 8, 1), "packed 2x8"),
    ((2, 2, 2), "4x4"),
    ((1, 4, 2), "1x16"),
]
CASES = [(False, *case) for case in LORA_CASES] + [(True, *case) for case in FULL_CASES]


@pytest.mark.parametrize(
    ("full", "mesh", "layout"), CASES, ids=[f"{'full' if f else 'lora'}-{m}-{x}" for f, m, x in CASES]
)
def test_same_step(plain: dict[bool, tuple], full: bool, mesh: tuple[int, int, int], layout: str) -> None:
    assert_same_step(Rig(MODELS[full], mesh, full).run(LAYOUTS[layout]), plain[full])


@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2)])
def test_evaluation_is_the_same_on_any_mesh(plain: dict[bool, tuple], mesh: tuple[int, int, int]) -> None:
    """Its sums are those of the training step before it trains."""
    rig = Rig(MODELS[False], mesh)
    _, state, base = rig.start()
    model = replace(rig.model, constrain=constrainer(rig.devices()))
    batch = place(unpacked(PAIRS, 24), rig.devices(), leading=0)
    sums = make_eval(model, SFT(), rig.devices())(state, base, batch)
    for name, (total, weight) in sums.items():
        np.testing.assert_allclose(total / weight, plain[False][1][name], rtol=1e-5, err_msg=name)
        assert weight == plain[False][1]["num_targets"]


EVERYTHING = tiny_config(
    num_layers=3,
    kinds=((Rope("default", 10000.0, 8, 64), 0), (Rope("default", 500.0, 8, 64), 5)),
    layer_kinds=(1, 0, 1),
    attention_softcap=20.0,
    final_softcap=10.0,
    embed_scale=3.0,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
)


@pytest.mark.parametrize("mesh", [(2, 1, 4), (2, 2, 2)])
def test_same_step_with_every_option(mesh: tuple[int, int, int]) -> None:
    """Two kinds of layers, grouped heads cut in the middle (K 2 over 4 devices), caps, biases, norms, remat,
    smoothing and z-loss."""
    model = tiny_model(None, EVERYTHING, remat="dots")
    objective = SFT(label_smoothing=0.1, z_loss=1e-2)
    want = Rig(model, full=True, objective=objective).run(LAYOUTS["4x4"])
    got = Rig(model, mesh, full=True, objective=objective).run(LAYOUTS["packed 2x8"])
    assert_same_step(got, want)
