"""Named tensors on a disk, read slice by slice: what loading, importing and checking an export share."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxalign.errors import UserError

Index = tuple[slice, ...]

BROKEN = "the file is incomplete or damaged: download or copy it again"

# The dtypes of the safetensors format that hold weights as they are. Others (F8, I8) are quantised weights,
# which mean nothing without their scales.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class TensorStore(Protocol):
    """Tensors under transformers' names, in transformers' layout ([out, in] matrices)."""

    @property
    def names(self) -> Iterable[str]:
        """The name of every tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; raises `KeyError` for an unknown name."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """One slice of a tensor, in a float dtype. Only that slice is held in memory."""
        ...

    def place(self, name: str) -> str:
        """The file that holds (or should hold) a tensor, for messages."""
        ...


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a safetensors file; `start` counts from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class RenamedStore:
    """Another store's tensors under new names. `old` maps a new name to the stored one."""

    store: TensorStore
    old: Mapping[str, str]

    @property
    def names(self) -> Iterable[str]:
        """The new name of every tensor."""
        return self.old.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; raises `KeyError` for an unknown name."""
        return self.store.shape(self.old[name])

    def read(self, name: str, index: Index) -> np.ndarray:
        """One slice of a tensor."""
        return self.store.read(self.old[name], index)

    def place(self, name: str) -> str:
        """The file that holds (or should hold) a tensor, for messages."""
        return self.store.place(self.old.get(name, name))


@dataclass(frozen=True)
class SafetensorsStore:
    """The tensors of one or many safetensors files, memory-mapped. `metadata` is the first file's.

    The library's own reader copies every slice and does not say which tensor of a truncated file is cut off.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    folder: Path
    maps: dict[Path, np.memmap] = field(default_factory=dict)

    @property
    def names(self) -> Iterable[str]:
        """The name of every tensor."""
        return self.entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor; raises `KeyError` for an unknown name."""
        return self.entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor; raises `UserError` for one that numpy cannot hold."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"tensor {name!r} has dtype {entry.dtype}, which is not supported",
                place=str(entry.file),
                remedy=f"save the model as one of {', '.join(DTYPES)}",
            )
        return np.dtype(DTYPES[entry.dtype])

    def read(self, name: str, index: Index) -> np.ndarray:
        """One slice of a tensor, as a view of the mapped file in the file's dtype."""
        entry = self.entries[name]
        if entry.file not in self.maps:
            self.maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        raw = self.maps[entry.file][entry.start : entry.stop]
        return raw.view(self.dtype(name)).reshape(entry.shape)[index]

    def place(self, name: str) -> str:
        """The file that holds (or should hold) a tensor, for messages."""
        return str(self.entries[name].file if name in self.entries else self.folder)


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in order; empty if there are none.

    Raises `UserError` for an index that cannot be read or that names a file which is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        others = (
            f for f in folder.glob("*.safetensors") if not f.name.startswith(("adapter_", "consolidated"))
        )
        return [single] if single.exists() else sorted(others)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("has no weight_map", place=str(index), remedy=BROKEN)
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            tensor = next(t for t, name in weight_map.items() if name == file.name)
            raise UserError(
                f"missing file, named in {index.name}; it holds {tensor!r}",
                place=str(file),
                remedy="download or copy the missing file into the folder",
            )
    return files


def open_safetensors(files: list[Path]) -> SafetensorsStore:
    """Open weight files by their headers alone. Raises `UserError` for a truncated or damaged one."""
    entries: dict[str, Entry] = {}
    metadata: list[dict[str, str]] = []
    for file in files:
        header = _header(file)
        metadata.append(header.pop("__metadata__", None) or {})
        entries |= header
    return SafetensorsStore(entries, metadata[0] if metadata else {}, files[0].parent if files else Path())


def _header(file: Path) -> dict[str, Any]:
    """The header of one file: 8 bytes of length, then JSON {name: {dtype, shape, data_offsets}}."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(
                f"truncated header: it should have {length} bytes, the file has {size}",
                place=str(file),
                remedy=BROKEN,
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        out = {n: _entry(file, length + 8, e) for n, e in header.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"damaged header: {error}", place=str(file), remedy=BROKEN) from error
    for name, entry in out.items():
        _check_extent(name, entry, size)
    return out | {"__metadata__": header.get("__metadata__")}


def _entry(file: Path, base: int, entry: dict[str, Any]) -> Entry:
    start, stop = entry["data_offsets"]
    return Entry(file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop)


def _check_extent(name: str, entry: Entry, size: int) -> None:
    if entry.stop > size:
        raise UserError(
            f"truncated: tensor {name!r} ends at byte {entry.stop}, the file has {size}",
            place=str(entry.file),
            remedy=BROKEN,
        )
    if entry.dtype in DTYPES:
        need = int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(DTYPES[entry.dtype]).itemsize
        if need != entry.stop - entry.start:
            raise UserError(
                f"damaged header: tensor {name!r} of shape {entry.shape} needs {need} bytes, "
                f"it has {entry.stop - entry.start}",
                place=str(entry.file),
                remedy=BROKEN,
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` when the file is missing, unreadable or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", place=str(file), remedy="is the model folder complete?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", place=str(file), remedy=BROKEN) from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", place=str(file), remedy=BROKEN)
    return value
