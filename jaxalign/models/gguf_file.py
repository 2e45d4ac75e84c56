"""The GGUF container: metadata and quantised tensors, read through a memory map.

`gguf.GGUFReader` makes several numpy objects of every vocabulary entry (seconds, and a hundred megabytes, for
a quarter of a million tokens) and fails on a truncated file with a reshape error; this reader takes the types
and the dequantisers from the `gguf` library and the header from the format's definition
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from jaxalign.errors import UserError
from jaxalign.models.store import BROKEN

_FLOAT, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_PLAIN: dict[gguf.GGMLQuantizationType, Any] = {
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F16: np.float16,
    gguf.GGMLQuantizationType.F64: np.float64,
    gguf.GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: numpy's order of dimensions (rows first), ggml type, and its bytes' place in the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    stop: int


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. `data` is the mapped file; metadata arrays are tuples."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    data: np.ndarray

    def rows(self, name: str, rows: slice | np.ndarray, columns: slice) -> np.ndarray:
        """Rows (a slice, or row numbers) and columns of a matrix, dequantised; a vector is one row.

        Only the blocks that hold them are unpacked. Raises `UserError` for a type that cannot be unpacked.
        """
        tensor = self.tensors[name]
        raw = self.data[tensor.start : tensor.stop]
        if tensor.kind in _PLAIN:
            table = raw.view(_PLAIN[tensor.kind]).reshape(-1, tensor.shape[-1])
            return table[rows][:, columns]
        block, size = GGML_QUANT_SIZES[tensor.kind]
        first, last, _ = columns.indices(tensor.shape[-1])
        low, high = first // block, -(-last // block)
        packed = raw.reshape(-1, tensor.shape[-1] // block * size)[rows][:, low * size : high * size]
        try:
            values = gguf.dequantize(np.ascontiguousarray(packed), tensor.kind)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {name!r} has type {tensor.kind.name}, which cannot be unpacked",
                place=str(self.path),
                remedy="take the model in another quantisation, such as Q4_K_M or Q8_0",
            ) from error
        return values[:, first - low * block : last - low * block]


class _Cursor:
    """Reads the header's little-endian values one after another; raises `EOFError` at the end of the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data.data, 0

    def take(self, code: str, count: int = 1) -> tuple[Any, ...]:
        pattern = f"<{count}{code}"
        return struct.unpack(pattern, self.raw(struct.calcsize(pattern)))

    def raw(self, size: int) -> memoryview:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise EOFError
        return self.data[start : self.at]

    def string(self) -> str:
        (length,) = _LENGTH.unpack(self.raw(8))  # a vocabulary is a hundred thousand of these
        return str(self.raw(length), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _FLOAT:
            # The shortest decimal: the metadata says 1e-05, not 9.99999974737875e-06.
            return float(str(np.float32(self.take("f")[0])))
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        inner, count = self.take("I")[0], self.take("Q")[0]
        if inner in _SCALARS:
            return self.take(_SCALARS[inner], count)
        return tuple(self.value(inner) for _ in range(count))


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file by its header. Raises `UserError` for anything but a whole, little-endian v2 or v3."""
    if path.stat().st_size == 0:
        raise UserError("the file is empty", place=str(path), remedy=BROKEN)
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(data)
    try:
        magic, version = bytes(cursor.raw(4)), cursor.take("I")[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise UserError(
                f"is not a GGUF file of version 2 or 3 (magic {magic!r}, version {version})",
                place=str(path),
                remedy="give a little-endian .gguf file as llama.cpp writes it today",
            )
        count, keys = cursor.take("Q", 2)
        metadata = {cursor.string(): cursor.value(cursor.take("I")[0]) for _ in range(keys)}
        infos = [_info(cursor) for _ in range(count)]
    except EOFError as error:
        raise UserError("truncated in the header", place=str(path), remedy=BROKEN) from error
    except (KeyError, ValueError, OverflowError, MemoryError, struct.error) as error:
        raise UserError(f"damaged header: {error}", place=str(path), remedy=BROKEN) from error
    align = metadata.get("general.alignment", 32)
    base = -(-cursor.at // align) * align
    return GGUFFile(path, metadata, {n: _place(path, n, i, base, len(data)) for n, *i in infos}, data)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.string()
    dims = cursor.take("Q", cursor.take("I")[0])
    return name, tuple(reversed(dims)), gguf.GGMLQuantizationType(cursor.take("I")[0]), cursor.take("Q")[0]


def _place(path: Path, name: str, info: list[Any], base: int, size: int) -> GGUFTensor:
    shape, kind, offset = info
    block, width = GGML_QUANT_SIZES[kind]
    start = base + offset
    stop = start + int(np.prod(shape, dtype=np.int64)) // block * width
    whole = bool(shape) and shape[-1] % block == 0
    if stop > size or not whole:
        what = (
            f"ends at byte {stop}, the file has {size}"
            if whole
            else f"has rows of no whole {kind.name} block"
        )
        raise UserError(
            f"{'truncated' if whole else 'damaged'}: tensor {name!r} {what}", place=str(path), remedy=BROKEN
        )
    return GGUFTensor(shape, kind, start, stop)
