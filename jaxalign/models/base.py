"""What every model family shares: its configuration, the NNX-to-pure-function bridge, and weight names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.rope import Rope
from jaxalign.types import Params


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only transformer. D hidden, H query heads, K key-value heads, V vocabulary.

    `kinds` lists the distinct attention layers of the model as (rope, window), window 0 meaning none;
    `layer_kinds` says which of them each layer is.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    tied: bool
    max_positions: int
    kinds: tuple[tuple[Rope, int], ...]
    layer_kinds: tuple[int, ...]
    attention_scale: float
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Numerics:
    """Dtypes of a forward pass. Dots take `compute` operands and accumulate in float32; the residual stream
    and elementwise chains are held in `activation`."""

    compute: Any = jnp.float32
    activation: Any = jnp.float32

    @classmethod
    def choose(cls, compute: Any, platform: str) -> Numerics:
        """On a CPU elementwise bfloat16 is several times slower than float32, so activations stay float32."""
        return cls(compute, jnp.float32 if platform == "cpu" else compute)


DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def resolve_dtype(dtype: str) -> str:
    """`bf16` or `f32`; `auto` takes bf16 where the first device multiplies it natively."""
    if dtype != "auto":
        return dtype
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "f32"
    capability = str(getattr(device, "compute_capability", "9"))
    return "bf16" if float(capability) >= 8 else "f32"


def _cpu_multiplies_bf16() -> bool:
    """Told by /proc/cpuinfo; jax before 0.11 gains little from it."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    return version >= (0, 11) and ("avx512_bf16" in flags or "amx_bf16" in flags)


@dataclass(frozen=True)
class NameRule:
    """One parameter's name in a Hugging Face checkpoint.

    `{layer}` in `hf` means that the parameter here is stacked over a leading layer axis; `transpose` that
    the stored matrix is [out, in] and ours [in, out].
    """

    path: tuple[str, ...]
    hf: str
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: how its config.json is read and how its tensors are called."""

    from_hf: Callable[[dict[str, Any]], DecoderConfig]
    names: Callable[[DecoderConfig], list[NameRule]]


@dataclass(frozen=True)
class Functional:
    """An NNX module as pure functions over plain nested dicts.

    `make(rngs)` builds the module; every `nnx.Param` carries its logical axes as metadata `logical`.
    """

    make: Callable[[nnx.Rngs], nnx.Module]

    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))

    @property
    def shapes(self) -> Params:
        """The tree of `ShapeDtypeStruct`."""
        return nnx.to_pure_dict(self._abstract()[1])

    @property
    def axes(self) -> Params:
        """The tree of logical axis names."""
        is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
        state = jax.tree.map(lambda v: v.get_metadata()["logical"], self._abstract()[1], is_leaf=is_variable)
        return nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key))))

    def bind(self) -> Callable[[Params], Any]:
        """`bound(params)` is the module over these parameters; the graph is taken apart only once."""
        graph = self._abstract()[0]
        return lambda params: nnx.merge(graph, nnx.State(params))


def merge_trees(base: Params, extra: Params | None) -> Params:
    """`base` with the leaves of `extra` added; neither tree is changed."""
    if not extra:
        return base
    out = dict(base)
    for name, value in extra.items():
        out[name] = merge_trees(base[name], value) if name in base and isinstance(value, dict) else value
    return out


def stack_axes(axes: Any) -> Any:
    """Logical axes with the leading layer axis of stacked parameters."""
    return jax.tree.map(lambda a: ("layers", *a), axes, is_leaf=lambda a: isinstance(a, tuple))
