"""Several adapters on one base, by slot and added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.export import export_peft
from jaxalign.models.load import load_adapter, load_model
from jaxalign.models.prefix import PrefixConfig
from jaxalign.models.slots import Slots, combine
from jaxalign.models.source import resolve
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder
from tests.rig import random_tree
from tests.tiny import arrays, examples, quick_jit, tiny_model, unpacked

BATCH = arrays(unpacked(examples(4)))
ROWS = [x[:, 0] for x in (BATCH.tokens, BATCH.segments, BATCH.positions)]
CONFIGS: dict[str, Any] = {
    "one": LoraConfig(rank=2, alpha=5.0, targets=("q", "up")),
    "two": LoraConfig(rank=3, alpha=3.0, rslora=True, targets=("up", "down")),
    "dora": LoraConfig(rank=2, dora=True),
    "prefix": PrefixConfig(length=2),
}
SLOTS = Slots(tiny_model(), CONFIGS)
BASE: Any = random_tree(SLOTS.model.shapes()[1], 0)
TREES = {name: random_tree(SLOTS[name].shapes()[0], i) for i, name in enumerate(CONFIGS)}


def hidden(slot: str | None) -> np.ndarray:
    return np.asarray(quick_jit(lambda trees, base: SLOTS.hidden(slot, trees, base, *ROWS)[0])(TREES, BASE))


def test_every_slot_is_its_own_model() -> None:
    """As if the adapter stood alone on the base; and no slot is the base."""
    plain = quick_jit(lambda b: tiny_model().hidden(None, b, *ROWS)[0])(BASE)
    assert np.array_equal(hidden(None), plain)
    seen = [np.asarray(plain)]
    for name, config in CONFIGS.items():
        got = hidden(name)
        alone = quick_jit(lambda a, b, c=config: tiny_model(c).hidden(a, b, *ROWS)[0])(TREES[name], BASE)
        assert np.array_equal(got, alone)
        assert all(np.abs(got - other).max() > 0.1 for other in seen)
        seen.append(got)


def test_other_slots_are_no_part_of_the_program() -> None:
    """Only the base and the chosen slot are read."""
    traced = jax.make_jaxpr(lambda trees: SLOTS.hidden("one", trees, BASE, *ROWS)[0])(TREES).jaxpr
    used = {v for eqn in traced.eqns for v in eqn.invars if not hasattr(v, "val")}
    paths = [p[0].key for p, _ in jax.tree_util.tree_leaves_with_path(TREES)]
    read = {name for name, var in zip(paths, traced.invars, strict=True) if var in used}
    assert read == {"one"}


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(UserError, match=r"no adapter in slot 'tow'.*two"):
        SLOTS["tow"]


def test_deltas_add_up() -> None:
    """One adapter of both ranks is W plus both weighted deltas, over the targets of either."""
    config, tree = combine([(CONFIGS["one"], TREES["one"], 0.5), (CONFIGS["two"], TREES["two"], -2.0)])
    assert (config.rank, config.scale, config.targets) == (5, 1.0, ("q", "up", "down"))
    model = tiny_model(config)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda s: s.shape, model.shapes()[0])
    merged = quick_jit(model.merge)(tree, BASE)["layers"]
    kernels = {name: BASE["layers"][part][name]["kernel"] for part, name in (("attn", "q"), ("mlp", "up"))}
    want = dict(kernels)
    for slot, weight in (("one", 0.5), ("two", -2.0)):
        for part, name in (("attn", "q"), ("mlp", "up")):
            own = TREES[slot]["layers"].get(part, {}).get(name)
            if own:
                delta = np.einsum("lir,lro->lio", own["adapter"]["a"], own["adapter"]["b"])
                want[name] = want[name] + weight * CONFIGS[slot].scale * delta
    np.testing.assert_allclose(merged["attn"]["q"]["kernel"], want["q"], atol=1e-5)
    np.testing.assert_allclose(merged["mlp"]["up"]["kernel"], want["up"], atol=1e-5)
    with pytest.raises(UserError, match="do not add up"):
        combine([(CONFIGS["dora"], TREES["dora"], 1.0)])


def test_adapters_are_taken_off_again() -> None:
    """Merging an adapter and then its opposite gives the base back."""
    model = SLOTS["one"]
    there = model.merge(jax.tree.map(jnp.asarray, TREES["one"]), BASE)
    config, opposite = combine([(CONFIGS["one"], TREES["one"], -1.0)])
    again = tiny_model(config).merge(opposite, there)
    assert np.abs(there["layers"]["mlp"]["up"]["kernel"] - BASE["layers"]["mlp"]["up"]["kernel"]).max() > 0.05
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, BASE)


def test_more_adapters_are_loaded_onto_one_base(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    raw, model, base = tiny()
    source = resolve(str(write_folder(tmp_path / "source", raw, state_dict(model, base))))
    on = mesh(fsdp=2, tensor=2)
    loaded = load_model(source, on)
    for name, config in CONFIGS.items():
        own = load_model(source, on, adapter=config)
        tree = jax.tree.map(jnp.asarray, random_tree(own.model.shapes()[0], 3))
        out = export_peft(own.model, tree, source, tmp_path / name, base_hash=own.base_hash)
        got_config, got, _ = load_adapter(loaded, out, on)
        assert got_config == config
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, tree)
