"""What filters look at, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxalign.data.formats import KNOWN
from jaxalign.data.group_formats import KNOWN as KNOWN_GROUPS
from jaxalign.data.pieces import Exchange, any_records, exchange, said
from jaxalign.data.readers import LoadReport, load
from jaxalign.data.records import RowError, UnwantedRowError, content_id


@dataclass(frozen=True)
class Piece:
    """One text of a row: `side` is prompt or answer, `role` says which of its texts it is."""

    side: str
    role: str
    text: str


@dataclass(frozen=True)
class Item:
    """A row as it stands in its file, and what it says."""

    id: str
    place: str
    row: Any
    exchanges: tuple[Exchange, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Its texts, the prompts before the answers to them, those without a word left out."""
        found = []
        for number, each in enumerate(self.exchanges):
            which = f"{number}:" if number else ""  # a row may hold several records
            found.append(Piece("prompt", f"{which}prompt", said(each.prompt)))
            found += [Piece("answer", which + a.role, said(a.content)) for a in each.answers]
        return tuple(piece for piece in found if piece.text.strip())

    def of(self, side: str) -> tuple[Piece, ...]:
        """The texts of a side, or of `both`."""
        return tuple(piece for piece in self.pieces if side in ("both", piece.side))


@dataclass(frozen=True)
class Fault:
    """Why a row is left out: `reason` is what reports count by, `detail` is about this row."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Sieved:
    """What a filter answers: faults by the item's index, and what the report says of the rest."""

    faults: Mapping[int, Fault]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_items(data: Any, *, max_bad_rows: float, limit: int) -> tuple[list[Item], LoadReport]:
    """The rows of files, folders or hub data sets, those that no method can use left out, and the report of
    that. Raises `UserError` as `load` does."""

    def convert(row: Any, place: str, source: str) -> tuple[list[Any], str]:
        parts, name = any_records(row, source=source, place=place)
        records = [part for part in parts if not isinstance(part, RowError | UnwantedRowError)]
        if not records:
            return parts, name
        own = records[0].id if len(records) == 1 else str(row.get("id") or content_id(row))
        return [Item(own, place, row, tuple(map(exchange, records)))], name

    return load(
        data, convert, max_bad_rows=max_bad_rows, limit=limit or None, known=f"{KNOWN}; {KNOWN_GROUPS}"
    )


def counted(items: Sequence[Item], faults: Mapping[int, Fault]) -> list[Item]:
    """The items without a fault."""
    return [item for i, item in enumerate(items) if i not in faults]
