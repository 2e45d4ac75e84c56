"""Rows of the first sheet of an .xlsx workbook (ECMA-376): a zip of XML files, read without a dependency."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jaxalign.data.records import RowError
from jaxalign.errors import UserError

MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
LINKS = "{http://schemas.openxmlformats.org/package/2006/relationships}"
REFERENCE = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def sheet_rows(path: Path) -> list[tuple[int, dict[int, Any]]]:
    """(row number, {column from 0: value}) of every row with a value. Raises `UserError` for another file."""
    try:
        with zipfile.ZipFile(path) as book:
            shared = _shared_strings(book)
            root = ElementTree.fromstring(book.read(_first_sheet(book)))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError, StopIteration) as error:
        raise UserError(
            f"not a whole .xlsx file ({error})", place=str(path), remedy="fetch it again"
        ) from error
    out = []
    for count, row in enumerate(root.iter(f"{MAIN}row"), start=1):
        cells = {_column(cell, i): _value(cell, shared) for i, cell in enumerate(row.iter(f"{MAIN}c"))}
        cells = {at: value for at, value in cells.items() if value is not None}
        if cells:
            out.append((int(row.get("r", count)), cells))
    return out


def table(path: Path) -> list[tuple[str, Any]]:
    """(place, row) under the header in the first row; columns without a name are left out."""
    rows = sheet_rows(path)
    if not rows:
        raise UserError("an empty sheet", place=str(path), remedy="the first row names the columns")
    header = {at: str(name) for at, name in rows[0][1].items()}
    out: list[tuple[str, Any]] = []
    for number, cells in rows[1:]:
        row = {name: cells.get(at) for at, name in header.items()}
        blank = all(value is None for value in row.values())
        out.append((f"{path}:row {number}", RowError("no named column has a value") if blank else row))
    return out


def _first_sheet(book: zipfile.ZipFile) -> str:
    """The name in the archive of the sheet that the workbook lists first."""
    sheet = next(ElementTree.fromstring(book.read("xl/workbook.xml")).iter(f"{MAIN}sheet"))
    links = ElementTree.fromstring(book.read("xl/_rels/workbook.xml.rels"))
    target = next(
        link.get("Target", "")
        for link in links.iter(f"{LINKS}Relationship")
        if link.get("Id") == sheet.get(REFERENCE)
    )
    return target.lstrip("/") if target.startswith("/") else f"xl/{target}"


def _shared_strings(book: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in book.namelist():
        return []
    root = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
    return [_text(item) for item in root.iter(f"{MAIN}si")]


def _text(item: ElementTree.Element) -> str:
    """All runs of a string but its phonetic reading; `_x000D_` stands for a character."""
    phonetic = {id(t) for part in item.iter(f"{MAIN}rPh") for t in part.iter(f"{MAIN}t")}
    runs = (t.text or "" for t in item.iter(f"{MAIN}t") if id(t) not in phonetic)
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda m: chr(int(m[1], 16)), "".join(runs))


def _column(cell: ElementTree.Element, default: int) -> int:
    """Column from 0 of a cell named like `AB12`."""
    letters = re.match(r"[A-Z]+", cell.get("r", ""))
    if letters is None:
        return default
    at = 0
    for letter in letters[0]:
        at = at * 26 + ord(letter) - ord("A") + 1
    return at - 1


def _value(cell: ElementTree.Element, shared: list[str]) -> Any:
    """Text, a number, a boolean or None."""
    kind, raw = cell.get("t", "n"), cell.findtext(f"{MAIN}v")
    if kind == "inlineStr":
        return _text(cell)
    if raw is None:
        return None
    if kind == "s":
        return shared[int(raw)]
    if kind == "b":
        return raw == "1"
    if kind != "n":
        return raw
    return int(raw) if raw.lstrip("-").isdigit() else float(raw)
