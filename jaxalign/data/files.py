"""Rows out of files: JSON, JSONL and CSV, also gzipped, Parquet and .xlsx. One generator per file format.

A reader yields `(place, row)`; for a row it cannot read, `(place, RowError(reason))`, and goes on.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxalign.data.records import Mended, RowError
from jaxalign.errors import UserError, nearest

Rows = Iterator[tuple[str, Any]]

CUT_OFF = "the file ends before the closing ] of its array"
LIST_KEYS = ("data", "rows", "instances", "examples", "train")  # where an object keeps its list of rows


def read_bytes(path: Path) -> bytes:
    """The whole file, unzipped when its name ends in .gz. Raises `UserError` when it is not gzip."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(
            f"not a whole gzip file ({error})", place=str(path), remedy="fetch it again"
        ) from error


def lines_of(path: Path) -> Iterator[bytes]:
    """The file's lines, unzipped when its name ends in .gz; a broken archive is a `UserError`."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            yield from stream
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(
            f"not a whole gzip file ({error})", place=str(path), remedy="fetch it again"
        ) from error


def read_jsonl(path: Path) -> Rows:
    """One JSON value a line; blank lines are passed over."""
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip(b"\xef\xbb\xbf \t\r\n"):
            continue
        yield f"{path}:{number}", parse_line(line)


def parse_line(line: bytes) -> Any:
    """The JSON value of one line, or a `RowError` that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON ({error.msg})")


def read_json(path: Path) -> Rows:
    """An array of rows, an object that holds one (one of `LIST_KEYS`, or its only list), or JSON lines."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        cause = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise UserError(cause, place=f"{path}:{line}", remedy="save the file as UTF-8") from error
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from array_rows(text, start + 1, path)
        return
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            where = f"{path}:{error.lineno}"
            raise UserError(f"not JSON ({error.msg})", place=where, remedy="mend the file there") from error
        yield from read_jsonl(path)  # several values, one a line, under the name .json
        return
    for index, row in enumerate(list_in(found, path), start=1):
        yield f"{path}:row {index}", row


def list_in(found: Any, path: Path) -> list[Any]:
    """The list of rows inside a JSON object. Raises `UserError` when there is none or more than one."""
    lists = {k: v for k, v in found.items() if isinstance(v, list)} if isinstance(found, dict) else {}
    named = [lists[key] for key in LIST_KEYS if key in lists]
    if named or len(lists) == 1:
        return (named or list(lists.values()))[0]
    if isinstance(found, dict):
        return [found]  # a file with one row
    raise UserError("holds no list of rows", place=str(path), remedy="give an array, or JSON lines")


def array_rows(text: str, at: int, path: Path) -> Rows:
    """The elements of a JSON array whose `[` lies before `at`, each with the line it starts on.

    Decoded one by one: what precedes a broken element is kept. A missing `]` after a whole element is mended;
    after a comma it is a bad row, since an element is missing with it.
    """
    decode, line, counted, last = json.JSONDecoder().raw_decode, 1, 0, -1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            whole = last >= 0 and "," not in text[last:]
            yield f"{path}:{line}", Mended("no closing ] of the array") if whole else RowError(CUT_OFF)
            return
        if text[at] == "]":
            return
        try:
            row, at = decode(text, at)
        except json.JSONDecodeError as error:
            cause = f"not JSON ({error.msg}); what follows in the array cannot be read"
            raise UserError(cause, place=f"{path}:{error.lineno}", remedy="mend the file there") from error
        last = at
        yield f"{path}:{line}", row


def read_csv(path: Path) -> Rows:
    """Comma-separated rows under a header; a row with more or fewer fields than the header is bad.

    A first row that `HEADERLESS` knows is data, and its columns are named there.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = (line.decode("utf-8-sig", errors="surrogateescape") for line in lines_of(path))
    reader = csv.reader(text, strict=True)
    header = next(reader, None)
    if not header:
        raise UserError("an empty file", place=str(path), remedy="the first line names the columns")
    named = next((names for names in (known(header) for known in HEADERLESS) if names), None)
    if named is not None:
        yield f"{path}:1", csv_row(named, header)
        header = named
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, RowError(f"not CSV ({error})")
            continue
        if row:
            yield place, csv_row(header, row)


def rating_columns(first: list[str]) -> list[str] | None:
    """The columns of a file of ratings or rankings (`sources.sparse_feedback`), by its first row of data."""
    columns = ["instruction", "input", "output", "rating"]
    if len(first) == 5 and first[-1] in ("(a)", "(b)", "equal"):
        return ["instruction", "input", "output1", "output2", "ranking"]
    return columns if len(first) == len(columns) and first[-1] in tuple("1234567") else None


# Published CSV files without a header: first row -> names of its columns, or None for another file.
HEADERLESS: tuple[Callable[[list[str]], list[str] | None], ...] = (rating_columns,)


def csv_row(header: list[str], row: list[str]) -> Any:
    """The row as {column: text}, or a `RowError`."""
    if len(row) != len(header):
        return RowError(f"{len(row)} fields under a header of {len(header)}")
    if any("\udc80" <= char <= "\udcff" for value in row for char in value):
        return RowError("not UTF-8")
    return dict(zip(header, row, strict=True))


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file. Raises `UserError` for a file that is not Parquet or is cut off."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                index += 1
                yield f"{path}:row {index}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"not a whole Parquet file ({reason})", place=str(path), remedy="fetch it again"
        ) from error


def read_xlsx(path: Path) -> Rows:
    """Rows of the first sheet of a workbook under its header."""
    from jaxalign.data.xlsx import table

    yield from table(path)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json.gz": read_json,
    ".jsonl.gz": read_jsonl,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
    ".xlsx": read_xlsx,
}


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` of `a.b.jsonl.gz`: the ending that says how to read a file, in lower case."""
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    return Path(stem).suffix + name[len(stem) :]


def read_file(path: Path) -> Rows:
    """The rows of one file, by its ending. Raises `UserError` for an unknown ending."""
    suffix = suffix_of(path)
    if suffix not in READERS:
        known = " ".join(READERS)
        raise UserError(
            f"cannot read {suffix or 'a file without an ending'}", place=str(path), remedy=f"known: {known}"
        )
    return READERS[suffix](path)


def find_files(path: Path) -> list[Path]:
    """The file itself, or a folder's readable files in name order. Raises `UserError` naming near files."""
    if path.is_file():
        return [path]
    if not path.exists():
        folder = path.parent
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        hint = nearest(path.name, there)
        listing = (
            f"{folder} holds: {', '.join(there[:12]) or 'nothing'}"
            if folder.is_dir()
            else f"no folder {folder}"
        )
        raise UserError(f"no such file{hint}", place=str(path), remedy=listing)
    hidden = (
        p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    files = sorted(p for p in hidden if p.is_file() and suffix_of(p) in READERS)
    if not files:
        raise UserError("no data files in this folder", place=str(path), remedy=f"known: {' '.join(READERS)}")
    return files
