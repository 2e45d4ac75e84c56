"""Weights in: from files on a disk straight into shards on a mesh."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.models.base import DecoderConfig, NameRule, Numerics
from jaxalign.models.decoder import Adapter, Model
from jaxalign.models.gguf import load_gguf
from jaxalign.models.hashing import content_hash
from jaxalign.models.peft import FORMS, SCORE, PeftAdapter, open_adapter
from jaxalign.models.quant import Quantise, Quantised, base_shardings
from jaxalign.models.store import RenamedStore, TensorStore, open_safetensors, read_json, safetensors_files
from jaxalign.registry import FAMILIES
from jaxalign.sharding import constrainer, tree_shardings
from jaxalign.types import ModelSource, Params

_CHUNK = 1 << 20  # numbers that are read, converted and copied at a time
# Tensors of a checkpoint that hold nothing to load: tables computed from the configuration.
_COMPUTED = (".rotary_emb.inv_freq",)
_BESIDE = ("lm_head.weight", f"{SCORE}.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened: the dict of config.json, the tensors, and the files that hold them."""

    config: dict[str, Any]
    store: TensorStore
    files: tuple[Path, ...]

    @property
    def family(self) -> Any:
        """The registered family of the configuration's model_type."""
        return FAMILIES[self.config.get("model_type", "")]

    def decoder(self) -> DecoderConfig:
        """The configuration in this package's terms."""
        return self.family.from_hf(deepcopy(self.config))


@dataclass(frozen=True)
class Loaded:
    """A model on a mesh. `adapter` is the imported PEFT adapter's parameters, or None where there is none.

    `model.adapter` is the imported adapter's configuration, or the one that was asked for. `base_hash` is the
    sha256 over the base's weight files (`hashing.content_hash`). `head` is that of a reward model,
    {"kernel": [1, D]}.
    """

    model: Model
    base: Params
    adapter: Params | None
    source: ModelSource
    stop_tokens: tuple[int, ...]
    base_hash: str
    head: Params | None = None


def load_model(
    source: ModelSource,
    mesh: Mesh,
    *,
    adapter: Adapter | None = None,
    param_dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    quantise: Quantise = "none",
) -> Loaded:
    """Load a base model, and the adapter on top of it if the source has one, into shards on `mesh`.

    Every host reads only the slices that its own devices hold, one shard of one array at a time. Adapters are
    float32 whatever `param_dtype` is. `quantise` turns the layers' kernels into that kind while they
    are read, one layer at a time: no more than one is ever held in float32. Raises `UserError` for tensors
    that are missing, unexpected, misshapen or cut off, for an adapter that belongs to another base or differs
    from `adapter`, and for a mesh that does not divide the model.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.decoder()
    base_hash = content_hash(checkpoint.files)
    imported = open_adapter(source.adapter, checkpoint.family.names(config), base_hash)
    if imported and adapter:
        imported.check_against(adapter)
    platform = mesh.devices.flat[0].platform
    model = Model(
        config,
        adapter or (imported.config if imported else None),
        Numerics.choose(compute_dtype, platform),
        constrain=constrainer(mesh),
    )
    (adapter_shapes, shapes), (adapter_axes, axes) = model.shapes(), model.axes()
    rules = checkpoint.family.names(config)
    shardings = base_shardings(mesh, axes, shapes, quantise)
    base = load_tree(checkpoint.store, rules, shapes, shardings, param_dtype)
    params = None
    if imported:
        params = _load_adapter(imported, rules, model, tree_shardings(mesh, adapter_axes, adapter_shapes))
    head = _load_head(imported.store if imported else checkpoint.store, config.hidden_size, mesh)
    return Loaded(model, base, params, source, stop_tokens(source, checkpoint.config), base_hash, head)


HEAD = NameRule((SCORE, "kernel"), f"{SCORE}.weight")


def _load_head(store: TensorStore, size: int, mesh: Mesh) -> Params | None:
    """The head of a reward model, float32 [1, D], or None where the store has none."""
    if HEAD.hf not in store.names:
        return None
    if tuple(store.shape(HEAD.hf)) != (1, size):
        raise UserError(
            f"tensor {HEAD.hf!r} has shape {list(store.shape(HEAD.hf))}, a reward model has {[1, size]}",
            place=store.place(HEAD.hf),
            remedy="a classifier of several classes is no reward model",
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {"kernel": _load_leaf(store, HEAD, (1, size), everywhere, np.dtype(np.float32))}


def load_adapter(loaded: Loaded, folder: Path, mesh: Mesh) -> tuple[Adapter, Params, Params | None]:
    """One more PEFT adapter for a base that is loaded: its configuration, its parameters on `mesh`, and the
    head of a reward model where it has one.

    Raises `UserError` as `load_model` does.
    """
    rules = FAMILIES[loaded.model.config.model_type].names(loaded.model.config)
    imported = open_adapter(folder, rules, loaded.base_hash)
    assert imported is not None
    model = replace(loaded.model, adapter=imported.config)
    shardings = tree_shardings(mesh, model.axes()[0], model.shapes()[0])
    head = _load_head(imported.store, loaded.model.config.hidden_size, mesh)
    return imported.config, _load_adapter(imported, rules, model, shardings), head


def _load_adapter(imported: PeftAdapter, rules: list[NameRule], model: Model, shardings: Params) -> Params:
    form, shapes = FORMS[imported.config.peft_type], model.shapes()[0]
    packed = jax.eval_shape(lambda tree: form.pack(tree, model.config), shapes)
    lies = shardings
    if jax.tree.structure(packed) != jax.tree.structure(shapes):  # small, and laid out otherwise
        mesh = jax.tree.leaves(shardings)[0].mesh
        lies = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), packed)
    tree = load_tree(imported.store, form.rules(rules, imported.config), packed, lies, jnp.float32)
    return jax.jit(lambda tree: form.unpack(tree, model.config), out_shardings=shardings)(tree)


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open a base model's files without reading a tensor.

    A multimodal checkpoint is opened as the language model in it. Raises `UserError` for a damaged or
    quantised one.
    """
    if source.gguf:
        config, store = load_gguf(source.gguf)
        return Checkpoint(config, store, (source.gguf,))
    place = source.folder / "config.json"
    config = read_json(place)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"the weights are quantised ({method})",
            place=f"{place}: quantization_config",
            remedy="take the model's unquantised weights, or a .gguf file",
        )
    files = safetensors_files(source.folder)
    if not files:
        raise UserError("no *.safetensors in the model folder", place=str(source.folder))
    store: TensorStore = open_safetensors(files)
    if config.get("model_type") not in FAMILIES.entries and isinstance(config.get("text_config"), dict):
        config, store = _text_part(config, store)
    return Checkpoint(config, store, tuple(files))


def _text_part(config: dict[str, Any], store: TensorStore) -> tuple[dict[str, Any], TensorStore]:
    """The language model of a multimodal checkpoint, under the names that it has on its own."""
    shared = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
    text = {key: config[key] for key in shared if key in config} | config["text_config"]
    return text, RenamedStore(store, dict(_text_names(store.names)))


def _text_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if name.startswith("language_model."):
            yield name.removeprefix("language_model."), name
        elif name.startswith("model.language_model."):
            yield "model." + name.removeprefix("model.language_model."), name
        elif name.startswith("lm_head."):
            yield name, name


def stop_tokens(source: ModelSource, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every token that ends an answer: those of generation_config.json (the adapter's and the base's) and of
    config.json, each once."""
    folders = [f for f in (source.adapter, None if source.gguf else source.folder) if f]
    files = [f / "generation_config.json" for f in folders]
    values = [read_json(f).get("eos_token_id") for f in files if f.exists()] + [config.get("eos_token_id")]
    found: list[int] = []
    for value in values:
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))


def load_tree(
    store: TensorStore, rules: list[NameRule], shapes: Params, shardings: Params, dtype: Any
) -> Params:
    """Read every parameter that `rules` name into a tree of sharded arrays like `shapes`, quantised where its
    sharding is that of a quantised kernel.

    Raises `UserError` unless the store holds exactly those tensors in those shapes.
    """
    check_tensors(store, rules, shapes)
    tree: Params = {}
    for rule in rules:
        node = tree
        for name in rule.path[:-1]:
            node = node.setdefault(name, {})
        shape, lies = leaf(shapes, rule.path).shape, leaf(shardings, rule.path)
        if isinstance(lies, Quantised):
            node[rule.path[-1]] = _load_quantised(store, rule, shape, lies)
        else:
            node[rule.path[-1]] = _load_leaf(store, rule, shape, lies, np.dtype(dtype))
    return tree


def leaf(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


def stored(rule: NameRule, shape: tuple[int, ...]) -> Iterator[tuple[int | None, str, tuple[int, ...]]]:
    """(layer, name, shape) of every stored tensor that makes up our parameter of this shape."""
    inner = shape[1:] if "{layer}" in rule.hf else shape
    inner = inner[::-1] if rule.transpose else inner
    if "{layer}" in rule.hf:
        yield from ((i, rule.hf.format(layer=i), inner) for i in range(shape[0]))
    else:
        yield None, rule.hf, inner


def check_tensors(store: TensorStore, rules: list[NameRule], shapes: Params) -> None:
    """Raise `UserError` unless the store holds what `rules` name, in the right shapes, and nothing else.

    A copy of the embedding as `lm_head.weight` is no mistake in a model with tied embeddings, nor is the head
    of a reward model.
    """
    expected = {name: shape for r in rules for _, name, shape in stored(r, leaf(shapes, r.path).shape)}
    names = set(store.names)
    extra = {n for n in names - set(expected) if n not in _BESIDE and not n.endswith(_COMPUTED)}
    mistakes = [
        (
            "missing tensor",
            sorted(set(expected) - names),
            "is config.json this model's own, and every file there?",
        ),
        ("unexpected tensor", sorted(extra), "the model has parts that its config.json does not name"),
    ]
    for what, found, remedy in mistakes:
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            listed = ", ".join(map(repr, found[:3])) + more
            raise UserError(f"{what} {listed}", place=store.place(found[0]), remedy=remedy)
    for name, shape in expected.items():
        if tuple(store.shape(name)) != tuple(shape):
            raise UserError(
                f"tensor {name!r} has shape {list(store.shape(name))}, the configuration says {list(shape)}",
                place=store.place(name),
                remedy=remedy,
            )


def _load_leaf(
    store: TensorStore, rule: NameRule, shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    """One parameter, shard by shard: a host buffer is handed to its device before the next one is filled."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        block = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        holders.setdefault(block, []).append(device)
    arrays: list[jax.Array] = []
    for block, devices in holders.items():
        values = read_block(store, rule, shape, tuple(slice(*b) for b in block), dtype)
        arrays += jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _load_quantised(store: TensorStore, rule: NameRule, shape: tuple[int, ...], lies: Quantised) -> Quantised:
    """One stacked kernel, read and quantised layer by layer where its shards lie."""
    each = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), lies)
    quantise = jax.jit(type(lies).of, out_shardings=each)
    layers = []
    for i in range(shape[0]):
        one = replace(rule, hf=rule.hf.format(layer=i))
        # What is quantised lies as its codes do, which come first.
        wide = _load_leaf(store, one, shape[1:], jax.tree.leaves(each)[0], np.dtype(np.float32))
        layers.append(jax.block_until_ready(quantise(wide)))
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    return jax.jit(stack, out_shardings=lies)(*layers)


def read_block(
    store: TensorStore, rule: NameRule, shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part `index` of our parameter of this shape, read in chunks from the tensors it is stored as."""
    out = _aligned(tuple(s.stop - s.start for s in index), dtype)
    stacked = "{layer}" in rule.hf
    jobs = []
    for layer, name, _ in stored(rule, shape):
        if layer is not None and not index[0].start <= layer < index[0].stop:
            continue
        target = out if layer is None else out[layer - index[0].start]
        part = index[1:] if stacked else index
        jobs += _chunks(name, *((target.T, part[::-1]) if rule.transpose else (target, part)))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # numpy copies without the interpreter lock
        for _ in pool.map(lambda job: _copy(store, *job), jobs):
            pass
    return out


def _chunks(name: str, target: np.ndarray, index: tuple[slice, ...]) -> Iterator[Any]:
    """(name, target, index) of chunks of rows."""
    rows, width = target.shape[0], max(1, target[0].size if target.ndim > 1 else 1)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first = slice(index[0].start + start, index[0].start + stop)
        yield name, target[start:stop], (first, *index[1:])


def _copy(store: TensorStore, name: str, target: np.ndarray, index: tuple[slice, ...]) -> None:
    values = store.read(name, index)
    if values.dtype == target.dtype and values.dtype.itemsize == 2:
        # numpy copies a two-byte integer much faster than a dtype it does not know.
        values, target = values.view(np.uint16), target.view(np.uint16)
    target[...] = values


def _aligned(shape: tuple[int, ...], dtype: np.dtype, align: int = 64) -> np.ndarray:
    """An empty array at an address from which a CPU device takes it over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + align, np.uint8)
    offset = -raw.ctypes.data % align
    return raw[offset : offset + size].view(dtype).reshape(shape)
