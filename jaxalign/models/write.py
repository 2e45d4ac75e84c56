"""Safetensors files written tensor by tensor from sharded arrays, and checked by reading them back."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.models.base import NameRule
from jaxalign.models.load import leaf, read_block, stored
from jaxalign.models.store import DTYPES, TensorStore, open_safetensors
from jaxalign.types import Params

_CHUNK = 1 << 24  # numbers that are gathered to the host at a time
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its rule, the layer it is of (None for a parameter without layers), its array."""

    rule: NameRule
    layer: int | None
    name: str
    shape: tuple[int, ...]
    array: Any
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """(index in our layout, values there) of chunks that follow each other in the file.

        Every process must go through the chunks of an array that is spread over several.
        """
        inner = self.array.shape[1:] if self.layer is not None else self.array.shape
        axis = len(inner) - 1 if self.rule.transpose else 0
        step = max(1, _CHUNK * inner[axis] // math.prod(inner))
        head = (slice(self.layer, self.layer + 1),) if self.layer is not None else ()
        for start in range(0, inner[axis], step):
            stop = min(start + step, inner[axis])
            part = [slice(0, n) for n in inner]
            part[axis] = slice(start, stop)
            index = (*head, *part)
            yield index, _gather(self.array, index, self.dtype)


def tensors(tree: Params, rules: list[NameRule], dtype: Any = None) -> list[Tensor]:
    """Every tensor of a parameter tree under its stored name; `dtype` casts, None keeps each array's own."""
    out = []
    for rule in rules:
        array = leaf(tree, rule.path)
        kind = np.dtype(dtype or array.dtype)
        out += [
            Tensor(rule, layer, name, shape, array, kind) for layer, name, shape in stored(rule, array.shape)
        ]
    return out


def write_files(
    items: list[Tensor], folder: Path, stem: str, max_bytes: int, metadata: dict[str, str]
) -> None:
    """Write tensors to `<stem>.safetensors`, or to numbered files of at most `max_bytes` with an index.

    Every process takes part in gathering; the first one writes.
    """
    groups = _groups(items, max_bytes)
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        where = {t.name: name for group, name in zip(groups, names, strict=True) for t in group}
        index = {"metadata": {"total_size": sum(t.bytes for t in items)}, "weight_map": where}
        if jax.process_index() == 0:
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for group, name in zip(groups, names, strict=True):
        blobs = (_bytes(t, values) for t in group for _, values in t.chunks())
        if jax.process_index() == 0:
            _write_file(folder / name, group, blobs, metadata)
        else:
            for _ in blobs:
                pass


def verify(items: list[Tensor], files: list[Path], place: Path) -> None:
    """Read every tensor back the way a model is loaded, and compare it bit for bit with the arrays.

    Every process takes part in gathering; the first one, which wrote the files, reads them.
    Raises `UserError` at the first difference.
    """
    store: TensorStore | None = open_safetensors(files) if jax.process_index() == 0 else None
    for item in items:
        for index, values in item.chunks():
            if store is not None:
                again = read_block(store, item.rule, item.array.shape, index, item.dtype)
                if again.tobytes() != np.ascontiguousarray(values).tobytes():
                    raise UserError(
                        f"tensor {item.name!r} was not written as it is in memory",
                        place=str(place),
                        remedy="the disk may be failing: export to another one",
                    )


def _groups(items: Iterable[Tensor], max_bytes: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.bytes
    return groups


def _bytes(item: Tensor, values: np.ndarray) -> bytes:
    values = values[0] if item.layer is not None else values
    return (values.T if item.rule.transpose else values).tobytes()


def _write_file(file: Path, group: list[Tensor], blobs: Iterable[bytes], metadata: dict[str, str]) -> None:
    """The format: 8 bytes of header length, a JSON header padded to 8 bytes, the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for item in group:
        offsets = [at, at + item.bytes]
        header[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            stream.write(blob)
        stream.flush()
        os.fsync(stream.fileno())  # a disk that is full or broken says so here at the latest


def _gather(array: Any, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """One block of a sharded array on this host, as one compiled slice whose result every device holds."""
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    size = tuple(s.stop - s.start for s in index)
    start = [np.int32(s.start) for s in index]
    return np.asarray(_slicer(sharding, size, dtype)(array, *start))


@lru_cache(maxsize=256)
def _slicer(sharding: Any, size: tuple[int, ...], dtype: np.dtype) -> Any:
    return jax.jit(
        lambda x, *start: jax.lax.dynamic_slice(x, start, size).astype(dtype), out_shardings=sharding
    )
