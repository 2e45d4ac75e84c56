"""Quantised kernels of a frozen base: NF4 with doubly quantised block maxima (QLoRA, arXiv:2305.14314) and
int8. They stand in a parameter tree where the kernel stood, and behave like an array that is only read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.sharding import spec, tree_shardings
from jaxalign.types import Axes, Params

Quantise = Literal["none", "nf4", "int8"]

BLOCK = 64  # weights that share a maximum
OUTER = 256  # maxima that share one of their own

# QLoRA, appendix E: the quantiles of a normal distribution, with an exact zero, over the largest.
NF4_CODE = np.array(
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ],
    np.float32,
).reshape(16)


def _dynamic_map() -> np.ndarray:
    """256 sorted values, fine near 0 (arXiv:1511.04561): 2^i means of bins of [0.1, 1] times 10^(i - 6)."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += [*means, *-means]
    return np.sort(np.array(values)).astype(np.float32)


DYNAMIC_MAP = _dynamic_map()


def _nearest(x: jax.Array, code: np.ndarray) -> jax.Array:
    """uint8 index of the nearest value of a sorted table of at most 256."""
    # Comparing with all of few is one pass that vectorises.
    method = "compare_all" if len(code) <= 16 else "scan"
    return jnp.searchsorted((code[1:] + code[:-1]) / 2, x, method=method).astype(jnp.uint8)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _share(x: jax.Array, top: jax.Array) -> jax.Array:
    """x / top, 0 where both are."""
    return x / jnp.where(top > 0, top, 1)


def quantise_maxima(maxima: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block maxima float32 [..., in, blocks], less their mean, in 8 bits (QLoRA, section 3, double
    quantisation): indices uint8 of that shape, tops float32 [..., ceil(in / 256), blocks], means [...]."""
    mean = maxima.mean(axis=(-2, -1))
    centred = _pad(maxima - mean[..., None, None], maxima.ndim - 2, OUTER)
    outer = centred.reshape(*maxima.shape[:-2], -1, OUTER, maxima.shape[-1])
    tops = jnp.abs(outer).max(axis=-2)
    index = _nearest(_share(outer, tops[..., None, :]), DYNAMIC_MAP).reshape(centred.shape)
    return index[..., : maxima.shape[-2], :], tops, mean


def recover_maxima(index: jax.Array, tops: jax.Array, mean: jax.Array) -> jax.Array:
    """The maxima again, float32 [..., in, blocks]."""
    repeated = jnp.repeat(tops, OUTER, axis=-2)[..., : index.shape[-2], :]
    return jnp.asarray(DYNAMIC_MAP)[index] * repeated + mean[..., None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4:
    """A kernel [..., in, out] in 4.13 bits a weight: blocks of 64 along the last axis, each weight the
    nearest of 16 values times its block's maximum.

    codes   uint8 [..., in, ceil(out / 64) * 32]  two indices a byte, the first in the high half
    maxima  uint8 [..., in, blocks]               see `quantise_maxima`, as are
    tops    float32 [..., ceil(in / 256), blocks]
    mean    float32 [...]
    columns out
    """

    codes: Any
    maxima: Any
    tops: Any
    mean: Any
    columns: int = field(metadata={"static": True})
    dtype = jnp.bfloat16  # what it becomes where it must be a plain array again

    @classmethod
    def of(cls, kernel: jax.Array) -> NF4:
        """Quantise. The maxima that the weights are divided by are the exact ones."""
        blocks = _pad(kernel.astype(jnp.float32), kernel.ndim - 1, BLOCK)
        blocks = blocks.reshape(*kernel.shape[:-1], -1, BLOCK)
        maxima = jnp.abs(blocks).max(axis=-1)
        index = _nearest(_share(blocks, maxima[..., None]), NF4_CODE).reshape(*kernel.shape[:-1], -1, 2)
        codes = index[..., 0] << 4 | index[..., 1]
        return cls(codes, *quantise_maxima(maxima), columns=kernel.shape[-1])

    @classmethod
    def shardings(cls, mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NF4:
        """Where its arrays lie, for a kernel of these logical axes and shape."""
        lead, rows, columns = _partition(mesh, axes, shape, BLOCK)
        whole = NamedSharding(mesh, PartitionSpec(*lead, rows, columns))
        tops = NamedSharding(mesh, PartitionSpec(*lead, None, columns))
        return cls(whole, whole, tops, NamedSharding(mesh, PartitionSpec(*lead)), columns=shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return (*self.codes.shape[:-1], self.columns)

    @property
    def ndim(self) -> int:
        """That of the kernel."""
        return self.codes.ndim

    def __getitem__(self, index: EllipsisType) -> NF4:
        return self

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantise: [..., in, out]."""
        index = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
        blocks = jnp.asarray(NF4_CODE)[index].reshape(*self.codes.shape[:-1], -1, BLOCK)
        values = blocks * recover_maxima(self.maxima, self.tops, self.mean)[..., None]
        return values.reshape(*self.codes.shape[:-1], -1)[..., : self.columns].astype(dtype)

    def parts(self, dtype: Any) -> tuple[jax.Array, Any]:
        """(matrix of `dtype`, factors of its columns) whose product is the kernel."""
        return self.astype(dtype), 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A kernel [..., in, out] in 8 bits a weight: q int8 of that shape, scale float32 [..., out], one for
    each output (arXiv:2208.07339, section 2.1, without outliers)."""

    q: Any
    scale: Any
    dtype = jnp.bfloat16

    @classmethod
    def of(cls, kernel: jax.Array) -> Int8:
        """Quantise symmetrically: scale = max |w| / 127."""
        wide = kernel.astype(jnp.float32)
        scale = jnp.abs(wide).max(axis=-2) / 127
        return cls(jnp.rint(_share(wide, scale[..., None, :])).astype(jnp.int8), scale)

    @classmethod
    def shardings(cls, mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> Int8:
        """Where its arrays lie, for a kernel of these logical axes and shape."""
        lead, rows, columns = _partition(mesh, axes, shape, 1)
        whole = NamedSharding(mesh, PartitionSpec(*lead, rows, columns))
        return cls(whole, NamedSharding(mesh, PartitionSpec(*lead, columns)))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.q.shape

    @property
    def ndim(self) -> int:
        """That of the kernel."""
        return self.q.ndim

    def __getitem__(self, index: EllipsisType) -> Int8:
        return self

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantise: [..., in, out]."""
        return (self.q.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)

    def parts(self, dtype: Any) -> tuple[jax.Array, Any]:
        """(matrix of `dtype`, factors of its columns): the integers are exact in bfloat16, the products of
        weights and scales are not."""
        return self.q.astype(dtype), self.scale


Quantised = NF4 | Int8
KINDS: dict[str, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}


def _partition(mesh: Mesh, axes: Axes, shape: tuple[int, ...], block: int) -> tuple[Any, Any, Any]:
    """Mesh axes of the leading dimensions, of rows and of columns, so that no shard cuts a block.

    Where the columns' own mesh axes would, they divide the rows as well. Raises `UserError` where they
    cannot.
    """
    *lead, rows, columns = ((a,) if isinstance(a, str) else a or () for a in spec(axes))
    parts = lambda names: math.prod(mesh.shape[n] for n in names)  # noqa: E731
    if shape[-1] % (parts(columns) * block) and parts(columns) > 1:
        rows, columns = (*rows, *columns), ()
    if shape[-2] % parts(rows):
        raise UserError(
            f"a quantised matrix of {shape[-2]} x {shape[-1]} does not divide over {parts(rows)} devices: "
            f"blocks of {block} columns stay whole, and the rows do not divide",
            place="mesh",
            remedy=f"choose mesh.{' x mesh.'.join(rows)} as a divisor of {shape[-2]}",
        )
    return [a or None for a in lead], rows or None, columns or None


def quantise_base(base: Params, kind: Quantise) -> Params:
    """`base` with every layer's kernels quantised; norms, biases, embedding and head stay as they are."""
    if kind == "none":
        return base
    return base | {"layers": _kernels(base["layers"], KINDS[kind].of)}


def base_shardings(mesh: Mesh, axes: Params, shapes: Params, kind: Quantise) -> Params:
    """`tree_shardings` of a base with quantised kernels: in each one's place stands a `KINDS[kind]` of
    shardings.

    Raises `UserError` for a mesh that does not divide the model.
    """
    plain = tree_shardings(mesh, axes, shapes)
    if kind == "none":
        return plain
    lie = lambda _, a, s: KINDS[kind].shardings(mesh, a, s.shape)  # noqa: E731
    return plain | {"layers": _kernels(plain["layers"], lie, axes["layers"], shapes["layers"])}


def _kernels(tree: Params, change: Any, *others: Params) -> Params:
    """`tree` with `change` of every kernel and of what stands in its place in `others`."""
    out: Params = {}
    for name, value in tree.items():
        beside = [other[name] for other in others]
        if name == "kernel":
            out[name] = change(value, *beside)
        else:
            out[name] = _kernels(value, change, *beside) if isinstance(value, dict) else value
    return out


def dequantise_base(base: Params, dtype: Any = jnp.bfloat16) -> Params:
    """`base` with every quantised kernel as a plain array of `dtype`; the same tree where there is none."""
    is_quantised = lambda x: isinstance(x, Quantised)  # noqa: E731
    if not any(map(is_quantised, jax.tree.leaves(base, is_leaf=is_quantised))):
        return base
    return jax.tree.map(lambda x: x.astype(dtype) if is_quantised(x) else x, base, is_leaf=is_quantised)
