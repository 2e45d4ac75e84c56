"""What a training run will need, by arithmetic: parameters, bytes, FLOPs and time. No weight is read.

The activations follow an inventory of what the backward pass keeps (`_kept_per_layer`). Against programs
compiled ahead of time for an H200 it is within a tenth, for 1B and 8B Llamas, with and without remat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax

from jaxalign.errors import UserError, nearest
from jaxalign.models.attention import block_ends
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Model, parameter_count
from jaxalign.sharding import RULES
from jaxalign.train.flops import matmul_parameters, peak_flops

FLOAT32 = 4
QUANTISED = {"nf4": 4.127, "int8": 8.0}  # bits of a number, scales included


@dataclass(frozen=True)
class Machine:
    """`count` equal devices. `kind` is what JAX calls one; `memory` is its bytes, None where not known."""

    kind: str
    memory: float | None
    count: int = 1

    @property
    def is_cpu(self) -> bool:
        """Whether the devices are processors."""
        return self.kind == "cpu"


# What `--on` takes: the kind as JAX names it, and the bytes of one JAX device, from the makers' data sheets.
MACHINES: dict[str, tuple[str, float]] = {
    "a100": ("NVIDIA A100", 80e9),
    "h100": ("NVIDIA H100", 80e9),
    "h200": ("NVIDIA H200", 141e9),
    "l4": ("NVIDIA L4", 24e9),
    "l40s": ("NVIDIA L40S", 48e9),
    "v4": ("TPU v4", 32 * 2**30),
    "v5e": ("TPU v5 lite", 16 * 2**30),
    "v5p": ("TPU v5", 95 * 2**30),
    "v6e": ("TPU v6", 32 * 2**30),
    "tpu7x": ("TPU7x", 96 * 2**30),
}


@dataclass(frozen=True)
class Rollout:
    """`answers` of at most `max_tokens` tokens each, `slots` of them under way at the same time; `passes` are
    made over them before the updates: log-probs, of the reference too, and values."""

    answers: int
    max_tokens: int
    slots: int
    passes: int


@dataclass(frozen=True)
class Job:
    """One optimiser step, as far as arithmetic can see it.

    rows        rows of the data in one forward pass, over all devices together
    members     answers of a row: each is a sequence of its own
    length      tokens of a sequence, padding included
    quantise    how the frozen base's kernels are kept
    reference   what the reference policy is: one of `train.reference.Mode`, None where there is none
    trunks      adapters that train side by side: 2 for a policy and its critic
    rollout     how answers are sampled between updates, None where none are
    optimizer   bytes of optimiser state per byte of trained parameters
    chunk       tokens a row whose logits exist at a time; on one device, tokens of all rows together
    examples    rows of the data set and their tokens, None where there is no data
    steps       updates of the run, None where not known
    """

    model: Model
    mesh: Mapping[str, int]
    machine: Machine
    rows: int
    length: int
    accumulation: int = 1
    compute_bytes: int = 2
    optimizer: float = 2.0
    chunk: int = 512
    examples: int | None = None
    tokens: int | None = None
    steps_per_epoch: int | None = None
    steps: int | None = None
    mfu: float = 0.4
    members: int = 1
    quantise: str = "none"
    reference: str | None = None
    trunks: int = 1
    rollout: Rollout | None = None

    @property
    def sequences(self) -> int:
        """Of one forward pass, over all devices together."""
        return self.rows * self.members


class Fact(NamedTuple):
    """One line of a plan. `value` is in `unit`: `bytes`, `FLOPs`, `s`, or a count."""

    section: str
    name: str
    value: float
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The facts, and the problems that would stop the run."""

    facts: list[Fact]
    problems: list[str]

    def value(self, section: str, name: str) -> float:
        """The number of one line; raises `KeyError` where there is none."""
        for fact in self.facts:
            if (fact.section, fact.name) == (section, name):
                return fact.value
        raise KeyError((section, name))

    def as_dict(self) -> dict[str, Any]:
        """`{section: {name: number}}` and the problems, for JSON. Bytes are whole numbers."""
        sections: dict[str, Any] = {}
        for fact in self.facts:
            number = round(fact.value) if fact.unit == "bytes" else fact.value
            sections.setdefault(fact.section, {})[fact.name] = number
        return sections | {"problems": self.problems}


def machine_named(text: str) -> Machine:
    """`h100:8` is eight H100. Raises `UserError` for an unknown kind or a count that is no number."""
    name, _, count = text.partition(":")
    if name.lower() not in MACHINES or not (count or "1").isdigit() or int(count or "1") < 1:
        hint = nearest(name, MACHINES)
        raise UserError(
            f"unknown machine {text!r}{hint}", remedy=f"KIND:COUNT with KIND of {', '.join(MACHINES)}"
        )
    return Machine(*MACHINES[name.lower()], int(count or "1"))


def make_plan(job: Job) -> Plan:
    """All facts of `job`, in the order in which they are shown."""
    memory, problems = list(_memory(job)), list(_problems(job))
    memory.append(Fact(MEMORY, "total", sum(f.value for f in memory), "bytes"))
    sampling = list(_sampling(job, memory))
    if job.machine.memory is not None:
        memory.append(Fact(MEMORY, "available", job.machine.memory, "bytes", job.machine.kind))
        for found in (memory, sampling):
            total = next((f.value for f in found if f.name == "total"), 0.0)
            if total > job.machine.memory:
                problems.append(
                    f"needs {total / 1e9:.1f} GB a device and there are {job.machine.memory / 1e9:.1f}: take "
                    + ENOUGH[found[0].section]
                )
    return Plan([*_parameters(job), *memory, *sampling, *_work(job), *_course(job)], problems)


MEMORY, SAMPLING = "memory of a device", "memory of a device while sampling"
ENOUGH = {
    MEMORY: "more devices (mesh.fsdp), remat=full, or a smaller batch_size with more grad_accumulation",
    SAMPLING: "more devices (mesh.fsdp), a smaller rollout_batch_size, or a smaller max_length",
}


# ------------------------------------------------------------------------------------------ sections


def _parameters(job: Job) -> Iterator[Fact]:
    adapter, base = _trees(job.model)[0]
    total, extra = parameter_count(base), parameter_count(adapter) * job.trunks
    trained = extra or total
    yield Fact("parameters", "base", total)
    yield Fact("parameters", "adapter", extra)
    yield Fact("parameters", "trained", trained, note=f"{trained / (total + extra):.2%} of all")
    yield Fact("parameters", "checkpoint", trained * FLOAT32 * (1 + job.optimizer), "bytes", "with optimiser")


def _memory(job: Job) -> Iterator[Fact]:
    section = MEMORY
    adapter, base = (_per_device(s, a, job.mesh) for s, a in zip(*_trees(job.model), strict=True))
    adapter *= job.trunks
    trained = adapter or base
    accumulators = 1 + (job.accumulation > 1)
    if adapter:
        bits = QUANTISED.get(job.quantise)
        small = _kernels_per_device(job) if bits else 0.0
        size = (base - small) * job.compute_bytes + small * (bits or 0) / 8
        kept = f"frozen base, {job.quantise} kernels" if bits else "frozen base"
        yield Fact(section, "weights", size, "bytes", kept)
        yield Fact(section, "adapters", adapter * FLOAT32, "bytes", "float32")
    else:
        copy = job.compute_bytes if job.compute_bytes < FLOAT32 else 0
        yield Fact(
            section, "weights", base * (FLOAT32 + copy), "bytes", "float32, and the copy that computes"
        )
    if job.reference in ("frozen", "ema"):
        yield Fact(section, "reference", trained * FLOAT32, "bytes", "a copy of what trains")
    yield Fact(section, "gradients", trained * FLOAT32 * accumulators, "bytes")
    yield Fact(section, "optimiser", trained * FLOAT32 * job.optimizer, "bytes")
    yield Fact(section, "activations", _activations(job), "bytes", f"remat={job.model.remat}")
    yield Fact(section, "attention", _attention_scratch(job), "bytes", "scores of one layer")
    yield Fact(section, "logits", _logits(job), "bytes", f"{job.chunk} tokens at a time, and their slopes")


def _sampling(job: Job, training: list[Fact]) -> Iterator[Fact]:
    """What lies in memory besides states that stay: the weights merged, twice while they are cut into layers,
    and the keys and values of all slots at full length."""
    if job.rollout is None:
        return
    c = job.model.config
    _, base = (_per_device(s, a, job.mesh) for s, a in zip(*_trees(job.model), strict=True))
    stays = sum(f.value for f in training if f.name in ("weights", "adapters", "reference", "optimiser"))
    rows = job.rollout.slots / (job.mesh["data"] * job.mesh["fsdp"])
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * job.compute_bytes / job.mesh["tensor"]
    yield Fact(SAMPLING, "states", stays, "bytes", "weights, adapters and optimiser of training")
    yield Fact(SAMPLING, "merged weights", 2 * base * job.compute_bytes, "bytes", "two copies for a moment")
    yield Fact(SAMPLING, "cache", rows * token * job.length, "bytes", f"{job.rollout.slots} slots, all full")
    total = stays + 2 * base * job.compute_bytes + rows * token * job.length
    yield Fact(SAMPLING, "total", total, "bytes")


def _work(job: Job) -> Iterator[Fact]:
    if job.rollout is not None:
        drawn = job.rollout.answers * job.rollout.max_tokens
        forward = forward_flops(job.model, job.length)
        seen = job.rollout.answers * job.length
        yield Fact("rollout", "answers", job.rollout.answers)
        yield Fact("rollout", "tokens drawn", drawn, note="if none ends early")
        yield Fact(
            "rollout", "work", forward * (drawn + job.rollout.passes * seen), "FLOPs", "passes included"
        )
    tokens = job.sequences * job.length * job.accumulation
    flops = flops_per_token(job.model, job.length) * job.trunks
    if job.reference not in (None, "precomputed"):
        flops += forward_flops(job.model, job.length)
    many = f"{job.rows} rows x {job.members} answers" if job.members > 1 else f"{job.rows} rows"
    yield Fact("step", "tokens", tokens, note=f"{many} x {job.length} x {job.accumulation}, if full")
    yield Fact("step", "work per token", flops, "FLOPs")
    yield Fact("step", "work", flops * tokens, "FLOPs")
    peak = peak_flops(job.machine.kind, "bf16" if job.compute_bytes == 2 else "f32")
    if peak:
        seconds = flops * tokens / (peak * job.machine.count * job.mfu)
        yield Fact("step", "time", seconds, "s", f"if {job.mfu:.0%} of the peak is reached")
        yield Fact("step", "tokens per second", tokens / seconds, note="all devices together")


def _course(job: Job) -> Iterator[Fact]:
    if job.examples is not None:
        yield Fact("run", "examples", job.examples)
        yield Fact("run", "tokens an epoch", job.tokens or 0, note="without padding")
        yield Fact("run", "steps an epoch", job.steps_per_epoch or 0)
    if job.steps is None:
        return
    yield Fact("run", "steps", job.steps)
    for fact in _work(job):
        if fact.name == "time":
            yield Fact("run", "time", job.steps * fact.value, "s", "of the steps, every row full")


def _problems(job: Job) -> Iterator[str]:
    split = job.mesh["data"] * job.mesh["fsdp"]
    if job.rows % split:
        yield f"batch_size {job.rows} does not divide over mesh.data x mesh.fsdp = {split} devices"
    virtual = _virtual(job.model)
    if job.length + virtual > job.model.config.max_positions:
        more = f" behind {virtual} virtual tokens" if virtual else ""
        yield f"max_length {job.length}{more} is over the model's {job.model.config.max_positions} positions"
    seen = set()
    for shapes, axes in zip(*_trees(job.model), strict=True):
        for shape, names in _leaves(shapes, axes):
            for size, axis in zip(shape, names, strict=True):
                parts = _parts((axis,), job.mesh)
                if size % parts and (axis, size) not in seen:
                    seen.add((axis, size))
                    yield f"axis {axis!r} of size {size} does not divide over {parts} devices"


# ---------------------------------------------------------------------------------------- arithmetic


@cache
def _trees(model: Model) -> tuple[Any, Any]:
    """Shapes and axes, each (adapter, base). Tracing a model takes a second, and a plan asks often."""
    return model.shapes(), model.axes()


def _leaves(shapes: Any, axes: Any) -> Iterator[tuple[tuple[int, ...], tuple[str | None, ...]]]:
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    return zip((s.shape for s in jax.tree.leaves(shapes)), names, strict=True)


def _parts(axes: tuple[str | None, ...], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[m] for a in axes for m in RULES.get(a or "", ()))


def _per_device(shapes: Any, axes: Any, mesh: Mapping[str, int]) -> float:
    """Numbers of a tree that lie on one device."""
    return sum(math.prod(shape) / _parts(names, mesh) for shape, names in _leaves(shapes, axes))


def _kernels_per_device(job: Job) -> float:
    """Numbers in the layers' kernels on one device: those that may be quantised."""
    shapes, axes = (tree["layers"] for tree in (_trees(job.model)[0][1], _trees(job.model)[1][1]))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    sizes = (math.prod(shape) / _parts(names, job.mesh) for shape, names in _leaves(shapes, axes))
    name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)  # noqa: E731
    return sum(size for path, size in zip(paths, sizes, strict=True) if name(path) == "kernel")


def _virtual(model: Model) -> int:
    return model.adapter.virtual if model.adapter else 0


def attention_flops(config: DecoderConfig, length: int, virtual: int = 0) -> float:
    """a: FLOPs a token of the scores and the weighted sums of a causal forward pass, windows counted. Every
    token sees all `virtual` ones."""

    def context(window: int) -> float:  # keys that a token sees on average
        near = min(window or length, length)
        return near - near * near / (2 * length)

    keys = sum(context(config.kinds[kind][1]) + virtual for kind in config.layer_kinds)
    return 4 * config.num_heads * config.head_dim * keys


def flops_per_token(model: Model, length: int) -> float:
    """FLOPs a token of a training step: 4 N + 3 a with adapters, 6 N + 3 a without, more under remat, and the
    products of an adapter's own kernels. Virtual tokens have none: they are seen in a."""
    adapter, base = _trees(model)[0]
    repeats = {"none": (0, 0), "dots": (0, 1), "full": (2, 1)}  # remat: extra passes of (N, a)
    n_again, a_again = repeats[model.remat]
    passes = (4 if adapter else 6) + n_again
    virtual = _virtual(model)
    own = 0 if virtual else (6 + n_again) * parameter_count(adapter)
    attention = attention_flops(model.config, length, virtual)
    return passes * matmul_parameters(base) + own + (3 + a_again) * attention


def forward_flops(model: Model, length: int) -> float:
    """FLOPs a token of a forward pass: 2 N + a, adapters left out."""
    return 2 * matmul_parameters(_trees(model)[0][1]) + attention_flops(model.config, length)


def _tokens_per_device(job: Job) -> float:
    return job.sequences * job.length / (job.mesh["data"] * job.mesh["fsdp"])


def _activations(job: Job) -> float:
    """Bytes that the backward pass finds in memory on one device."""
    layers, kept = job.model.config.num_layers, _kept_per_layer(job)
    per_token = layers * kept[job.model.remat] + (kept["none"] if job.model.remat != "none" else 0)
    return job.trunks * per_token * _tokens_per_device(job)


def _kept_per_layer(job: Job) -> dict[str, float]:
    """Bytes a token and layer under every remat policy. `held` is the dtype of the residual stream; norms and
    the gate's activation keep a float32 copy."""
    c, tensor = job.model.config, job.mesh["tensor"]
    held = FLOAT32 if job.machine.is_cpu else job.compute_bytes
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim / tensor
    context, wide = c.num_heads * c.head_dim / tensor, c.intermediate_size / tensor
    norms = 4 if c.post_norms else 2
    copies = 0 if held == FLOAT32 else FLOAT32 * (norms * c.hidden_size + wide)
    # two inputs and two outputs of norms, the projections, the context, gate, up, activation and product
    everything = held * (2 * norms * c.hidden_size + heads + context + 4 * wide) + copies
    dots = held * (3 * c.hidden_size + heads + 2 * wide)
    return {"none": everything, "dots": dots, "full": held * c.hidden_size}


def _logits(job: Job) -> float:
    """A chunk's logits and their exponentials, and two vectors [D] a token: the slopes of its score."""
    c, tensor = job.model.config, job.mesh["tensor"]
    rows = 1 if job.machine.count == 1 else job.sequences / (job.mesh["data"] * job.mesh["fsdp"])
    held = FLOAT32 if job.machine.is_cpu else job.compute_bytes
    chunk = min(job.chunk, job.sequences * job.length) * rows * c.vocab_size / tensor
    return 2 * FLOAT32 * chunk + 2 * held * c.hidden_size * _tokens_per_device(job)


def _attention_scratch(job: Job) -> float:
    """Float32 scores of one block of queries and their gradient. Virtual tokens leave it at one block."""
    heads, virtual = job.model.config.num_heads / job.mesh["tensor"], _virtual(job.model)
    scores = heads * (job.length + virtual) / (1 if virtual else len(block_ends(job.length)))
    return 2 * FLOAT32 * scores * _tokens_per_device(job)
