"""Prefix and prompt tuning: virtual tokens before every sequence, in training, in sampling and in files."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models.attention import attend_xla
from jaxalign.models.base import Functional, Numerics
from jaxalign.models.decoder import Model, unstack
from jaxalign.models.export import export_peft
from jaxalign.models.load import load_model
from jaxalign.models.prefix import Prefix, PrefixConfig, PromptConfig, pack_prefix, turned, unpack_prefix
from jaxalign.models.rope import Rope
from jaxalign.models.source import resolve
from jaxalign.registry import ADAPTERS
from jaxalign.sampling.engine import Engine
from jaxalign.types import SamplingParams
from tests.models.hf_folder import mesh, state_dict, tiny, write_folder
from tests.rig import Rig, assert_same_step, random_tree
from tests.tiny import arrays, examples, micro, packed, quick_jit, tiny_config, tiny_model, unpacked

PREFIX, PROMPT = PrefixConfig(length=3), PromptConfig(length=3)
KINDS = {"prefix": PREFIX, "prompt": PROMPT}
PAIRS = examples(4)
BATCH = arrays(unpacked(PAIRS))
ROPES = (Rope("default", 10000.0, 8, 64), Rope("default", 100.0, 8, 64))
TWO_KINDS = {"kinds": ((ROPES[0], 0), (ROPES[1], 12)), "layer_kinds": (0, 1)}


def forward(model: Model, adapter: Any, base: Any, batch: Any = BATCH) -> jax.Array:
    rows = [x[:, 0] for x in (batch.tokens, batch.segments, batch.positions)]
    return model.hidden(adapter, base, *rows)[0]


def trees(model: Model) -> tuple[Any, Any]:
    adapter, base = model.shapes()
    return random_tree(adapter, 1), random_tree(base, 0)


def test_vector_prefix_zero_init_is_not_noop() -> None:
    """loss_vectors.json: two zero keys and values take their share of one query's softmax."""
    q = jnp.array([0.2, -0.1]).reshape(1, 1, 1, 2)
    k = jnp.array([[0.5, 0.1], [-0.3, 0.4], [0.0, 1.0]])[None, None]
    v = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])[None, None]
    zero = {name: jnp.zeros((2, 1, 2)) for name in "kv"}
    prefix = Functional(lambda rngs: Prefix(2, (1, 2), rngs)).bind()(zero)
    allowed = jnp.ones((1, 1, 3), bool)

    def attend(*seen: jax.Array) -> jax.Array:
        return attend_xla(q, *seen, scale=2**-0.5, softcap=None, numerics=Numerics())[0, 0, 0]

    np.testing.assert_allclose(attend(k, v, allowed), [1.0, 0.954261178], rtol=1e-6)
    np.testing.assert_allclose(attend(*prefix(k, v, allowed)), [0.5942522674, 0.5670718687], rtol=1e-6)


# --- in a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(kind: str) -> None:
    """The tree is small, each leaf of it has a gradient, and without it the model is the base bit for bit."""
    model = tiny_model(KINDS[kind])
    adapter, base = trees(model)
    shapes = {"prefix": [(2, 3, 2, 8)] * 2, "prompt": [(3, 32)]}
    assert [x.shape for x in jax.tree.leaves(adapter)] == shapes[kind]
    axes = jax.tree.leaves(model.axes()[0], is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [len(s) for s in shapes[kind]]
    grads = quick_jit(jax.grad(lambda a, b: jnp.square(forward(model, a, b)).sum()))(adapter, base)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    plain = quick_jit(lambda b: forward(tiny_model(), None, b))(base)
    assert np.array_equal(quick_jit(lambda b: forward(model, None, b))(base), plain)
    assert np.abs(quick_jit(lambda a, b: forward(model, a, b))(adapter, base) - plain).max() > 0.1


@pytest.mark.parametrize(
    "fields", [{}, {"embed_scale": 3.0, "qk_norm": True} | TWO_KINDS], ids=["llama", "mixed"]
)
def test_a_prompt_of_embeddings_is_those_tokens(fields: dict[str, Any]) -> None:
    """The same hidden states as with the tokens written in front, where no window ends in between."""
    config = tiny_config(**fields)
    ids = (5, 9, 0)
    model = tiny_model(PromptConfig(length=3, tokens=ids), config)
    base = random_tree(model.shapes()[1], 0)
    adapter = model.init_adapter(jax.random.key(0), jax.tree.map(jnp.asarray, base))
    got = quick_jit(lambda a, b: forward(model, a, b))(adapter, base)
    written = arrays(
        unpacked([(np.concatenate([ids, t]).astype(np.int32), np.ones(len(t) + 3)) for t, _ in PAIRS], 19)
    )
    want = quick_jit(lambda b: forward(tiny_model(None, config), None, b, written))(base)
    near = np.asarray(BATCH.segments[:, 0] > 0) & (np.asarray(BATCH.positions[:, 0]) < 9)
    np.testing.assert_allclose(np.asarray(got)[near], np.asarray(want)[:, 3:][near], atol=1e-4)


def test_starts() -> None:
    """Small random numbers; or rows of the embedding, repeated or cut to length."""
    model = tiny_model(PrefixConfig(length=200))
    leaves = jax.tree.leaves(model.init_adapter(jax.random.key(0)))
    np.testing.assert_allclose([x.std() for x in leaves], 0.02, rtol=0.05)
    base = jax.tree.map(jnp.asarray, random_tree(model.shapes()[1], 0))
    rows = base["embed"]["embedding"]

    def start(**keys: Any) -> jax.Array:
        model = tiny_model(PromptConfig(**keys))
        return model.init_adapter(jax.random.key(1), base)["prompt"]["adapter"]

    assert np.array_equal(start(length=5, tokens=(7, 8)), rows[jnp.array([7, 8, 7, 8, 7])])
    assert np.array_equal(start(length=1, tokens=(7, 8)), rows[jnp.array([7])])
    drawn = start(length=20)
    assert all((rows == row).all(-1).any() for row in drawn)
    assert len(np.unique(drawn, axis=0)) > 10
    np.testing.assert_allclose(start(length=200, init="normal").std(), 0.02, rtol=0.05)
    with pytest.raises(ValueError, match=r"init_adapter\(key, base\)"):
        tiny_model(PROMPT).init_adapter(jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_each_see_it(kind: str) -> None:
    model = tiny_model(KINDS[kind])
    adapter, base = trees(model)
    run = quick_jit(lambda a, b, batch: forward(model, a, b, batch))
    alone = np.asarray(run(adapter, base, BATCH))
    together = arrays(packed(PAIRS, 40, 2))
    got = np.asarray(run(adapter, base, together))
    found = 0
    for n, s in np.argwhere(
        np.asarray(together.positions[:, 0] == 0) & np.asarray(together.segments[:, 0] > 0)
    ):
        number = together.segments[n, 0, s]
        tokens = np.asarray(together.tokens[n, 0])[np.asarray(together.segments[n, 0] == number)]
        row = next(i for i, (t, _) in enumerate(PAIRS) if np.array_equal(t, tokens))
        np.testing.assert_allclose(got[n, s : s + len(tokens)], alone[row, : len(tokens)], atol=1e-4)
        found += 1
    assert found == len(PAIRS)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling(kind: str) -> None:
    """Deployed, it answers as the training model would: greedily, token by token, through the engine."""
    model = tiny_model(KINDS[kind])
    adapter, base = jax.tree.map(jnp.asarray, trees(model))
    ready = quick_jit(model.deploy)(adapter, base)
    served = model.deployed
    assert served.adapter == PREFIX
    prompts = [[5, 9, 3, 20], [7, 1]]
    got = Engine(served, ready, slots=2).generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    logits = quick_jit(lambda a, b, t, s: model.logits(b, model.hidden(a, b, t, s, jnp.arange(16)[None])[0]))
    differs = False
    for prompt, (sample,) in zip(prompts, got, strict=True):
        row = np.zeros((1, 16), np.int32)
        whole = [*prompt, *sample.tokens.tolist()]
        row[0, : len(whole)] = whole
        segments = (np.arange(16) < len(whole)).astype(np.int32)[None]
        z = np.asarray(logits(adapter, base, row, segments))[0]
        at = range(len(prompt) - 1, len(whole) - 1)
        assert [int(z[i].argmax()) for i in at] == sample.tokens.tolist()
        logp = np.asarray(jax.nn.log_softmax(z))[list(at), sample.tokens]
        np.testing.assert_allclose(sample.logp, logp, atol=1e-3)
        plain = np.asarray(logits(None, base, row, segments))[0]
        differs |= np.abs(plain - z).max() > 0.1
    assert differs


def test_a_prompt_over_layers_one_by_one() -> None:
    """Unrolled layers (a list) give the same keys and values as scanned ones."""
    model = tiny_model(PROMPT, tiny_config(**TWO_KINDS))
    adapter, base = jax.tree.map(jnp.asarray, trees(model))
    loose = base | {"layers": unstack(base["layers"])}
    run = quick_jit(lambda a, b: forward(model, a, b))
    np.testing.assert_allclose(run(adapter, loose), run(adapter, base), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind: str) -> None:
    model = tiny_model(KINDS[kind])
    with pytest.raises(UserError, match="cannot be folded"):
        model.merge(*trees(model))


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_agree_with_one(kind: str) -> None:
    model, batch = tiny_model(KINDS[kind]), micro(unpacked(examples(8)), 1)
    one = Rig(model).run(batch)
    for shape in ((1, 8, 1), (2, 2, 2)):
        assert_same_step(Rig(model, shape).run(batch), one)


# --- files ------------------------------------------------------------------------------------------------


def test_peft_form_of_a_prefix() -> None:
    """Keys are turned by the prefix's length, whatever each layer's angles; and back again."""
    config = tiny_config(**TWO_KINDS)
    adapter = jax.tree.map(jnp.asarray, trees(tiny_model(PREFIX, config))[0])
    stored = pack_prefix(adapter, config)
    assert stored.shape == (3, 2 * 2 * 2 * 8)
    again = unpack_prefix(stored, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, adapter)
    values = stored.reshape(3, 2, 2, 2, 8)[:, 1, 1]
    np.testing.assert_array_equal(values, adapter["layers"]["attn"]["adapter"]["v"][1])
    yarn = Rope("yarn", 10000.0, 8, 64, (("attention_factor", 1.3), ("factor", 4.0)))
    k = adapter["layers"]["attn"]["adapter"]["k"]
    there = turned(k, tiny_config(kinds=((yarn, 0),)), 5)
    np.testing.assert_allclose(jnp.square(there).sum(-1), jnp.square(k).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_it_goes_out_and_comes_back(
    tmp_path: Any, monkeypatch: Any, kind: str, sizes: dict[str, int]
) -> None:
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))
    raw, model, base = tiny()
    source = resolve(str(write_folder(tmp_path / "source", raw, state_dict(model, base))))
    asked = ADAPTERS[kind](length=4)
    got = load_model(source, mesh(**sizes), adapter=asked)
    adapter = jax.tree.map(jnp.asarray, random_tree(got.model.shapes()[0], 1))
    out = export_peft(got.model, adapter, source, tmp_path / "out", base_hash=got.base_hash)
    again = load_model(resolve(str(out)), mesh(**sizes))
    assert again.model.adapter == asked
    assert again.adapter is not None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.adapter, adapter)
    with pytest.raises(UserError, match="length 4, the run asks for 5"):
        load_model(resolve(str(out)), mesh(), adapter=ADAPTERS[kind](length=5))
    with pytest.raises(UserError, match="the run asks for LORA"):
        load_model(resolve(str(out)), mesh(), adapter=ADAPTERS["lora"]())
