"""Data sources -> records, with a report of what was read and what was left out and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jaxalign.data.files import READERS, Rows, find_files, read_file, suffix_of
from jaxalign.data.formats import KNOWN, is_turns, structured, to_record, with_system
from jaxalign.data.records import (
    Message,
    Prompt,
    RowError,
    SFTRecord,
    UnwantedRowError,
    as_messages,
    as_text,
    check_roles,
    content_id,
)
from jaxalign.errors import UserError

PLACES_KEPT = 3  # examples of each reason that a report remembers

HUB_ID = re.compile(
    r"^(?P<hf>hf:)?(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.\-\[\]%+:]+?))?(@(?P<config>[\w.-]+))?$"
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of one data argument.

    rejects, skipped  {reason: (count, first places)}: rows at fault; sound rows that this use leaves out
    formats           {format name: records}
    """

    rows: int = 0
    records: int = 0
    rejects: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """How many rows were at fault."""
        return sum(count for count, _ in self.rejects.values())

    def lines(self) -> list[str]:
        """The report in plain lines."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        out = [f"{self.rows} rows read, {self.records} records ({kinds or 'none'})"]
        for title, reasons in (("rejected", self.rejects), ("skipped", self.skipped)):
            for reason, (count, places) in sorted(reasons.items(), key=lambda item: -item[1][0]):
                more = ", ..." if count > len(places) else ""
                out.append(f"{title} {count}: {reason} ({', '.join(places)}{more})")
        return out


def tally(reasons: dict[str, tuple[int, tuple[str, ...]]], reason: str, place: str) -> None:
    """Count one more row under `reason`, remembering the first places."""
    count, places = reasons.get(reason, (0, ()))
    reasons[reason] = (count + 1, (*places, place) if len(places) < PLACES_KEPT else places)


def hub_name(text: str) -> re.Match[str] | None:
    """The parts of a hub data set's name, or None for a path. `hf:` in front decides; else `org/name` is one
    unless it exists here, ends like a data file, or `org` is a folder: a mistyped path must not download."""
    match = HUB_ID.match(text)
    if match is None or match["hf"]:
        return match
    path = Path(text)
    local = path.exists() or suffix_of(path) in READERS or path.parent.is_dir()
    return None if local or "/" not in match["id"] else match


def read_rows(source: str | Path) -> Rows:
    """`(place, row)` of a file, a folder, or a hub data set `org/name[:split][@config]`."""
    hub = hub_name(str(source))
    if hub is not None:
        yield from read_hub(hub["id"], hub["split"], hub["config"])
        return
    for file in find_files(Path(source).expanduser()):
        yield from read_file(file)


def read_hub(name: str, split: str | None, config: str | None) -> Rows:
    """Rows of a Hugging Face data set, which `datasets` downloads or finds in its cache."""
    import datasets

    typed = f"{name}{':' + split if split else ''}{'@' + config if config else ''}"
    try:
        found: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such set, gated, bad split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "give a local file, or check the name (org/name:split@config) and the network"
        raise UserError(
            f"neither a file here nor a data set that could be loaded: {reason}", place=typed, remedy=remedy
        ) from error
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise UserError(
                "several splits and none called train", place=typed, remedy=f"one of: {', '.join(found)}"
            )
        found = found["train"] if "train" in found else next(iter(found.values()))
    for index, row in enumerate(found):
        yield f"{typed}:row {index}", row


def records_of(rows: Rows, source: str, report: LoadReport) -> Iterator[SFTRecord]:
    """Records of the rows; the report's dictionaries are filled on the way."""
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            record, name = to_record(row, source=source, place=place)
        except RowError as reason:
            tally(report.rejects, str(reason), place)
        except UnwantedRowError as reason:
            tally(report.skipped, str(reason), place)
        else:
            report.formats[name] = report.formats.get(name, 0) + 1
            yield record


def read_records(
    sources: str | Path | Sequence[str | Path], *, max_bad_rows: float = 0.1, limit: int | None = None
) -> tuple[list[SFTRecord], LoadReport]:
    """Records of files, folders or hub data sets, and the report of what was left out.

    Raises `UserError` when a source is missing, when more than the share `max_bad_rows` of the rows is
    at fault, or when no record is left. `limit` stops after so many records.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    report, records = LoadReport(), []
    for name in names:
        for record in records_of(read_rows(name), str(name), report):
            records.append(record)
            if len(records) == limit:
                break
        if len(records) == limit:
            break
    skipped = sum(count for count, _ in report.skipped.values())
    report = replace(report, rows=len(records) + report.rejected + skipped, records=len(records))
    check_bad(report, max_bad_rows, ", ".join(map(str, names)))
    return unique_ids(records), report


def check_bad(report: LoadReport, max_bad_rows: float, place: str) -> None:
    """Raise `UserError` when too many rows are at fault or none is left."""
    remedy = "\n  ".join([*report.lines()[1:], f"rows known: {KNOWN}"])
    if report.rejected > max_bad_rows * max(report.rows, 1):
        cause = (
            f"{report.rejected} of {report.rows} rows cannot be used, more than max_bad_rows={max_bad_rows:g}"
        )
        raise UserError(cause, place=place, remedy=remedy)
    if not report.records:
        raise UserError("no usable row", place=place, remedy=remedy)


Row = TypeVar("Row", SFTRecord, Prompt)


def unique_ids(rows: list[Row]) -> list[Row]:
    """The rows with `#2`, `#3`, ... added to ids that occurred before, so that every id is one row's."""
    seen: dict[str, int] = {}
    out = []
    for row in rows:
        count = seen[row.id] = seen.get(row.id, 0) + 1
        out.append(row if count == 1 else replace(row, id=f"{row.id}#{count}"))
    return out


def to_prompt(row: Any, place: str) -> Prompt:
    """One row as a prompt. Raises `RowError`.

    `messages` and `conversations` (and a `prompt` that is a list of turns) go through the chat template; if
    they end on an assistant turn, that turn is the answer to give and is cut. `instruction` is one user turn.
    `prompt` and `text` strings are continued as they stand.
    """
    if not isinstance(row, dict):
        raise RowError("the row is not an object")
    turns = next(
        (row[key] for key in ("messages", "conversations", "prompt") if is_turns(row.get(key))), None
    )
    messages, text = None, None
    if turns is not None:
        messages = with_system(row, as_messages(structured(turns)))
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        messages = check_roles(messages)
    elif "prompt" in row or "text" in row:
        text = as_text(row.get("prompt", row.get("text")), "prompt")
    elif "instruction" in row:
        extra = as_text(row.get("input"), "input")
        question = as_text(row["instruction"], "instruction")
        messages = check_roles((Message("user", f"{question}\n{extra}" if extra.strip() else question),))
    else:
        raise RowError(f"unknown columns ({', '.join(map(str, list(row)[:6]))})")
    if text is not None and not text.strip():
        raise RowError("empty prompt")
    own = row.get("id")
    content = [[m.role, m.content] for m in messages or ()]
    name = content_id(content, text) if own is None or not str(own).strip() else str(own)
    return Prompt(name, messages, text, row, place)


def read_prompts(source: str | Path, *, max_bad_rows: float = 0.1) -> tuple[list[Prompt], LoadReport]:
    """Prompts to answer, and the report. Raises `UserError` as `read_records` does."""
    report, prompts = LoadReport(), []
    for place, row in read_rows(source):
        try:
            if isinstance(row, RowError):
                raise row
            prompts.append(to_prompt(row, place))
        except RowError as reason:
            tally(report.rejects, str(reason), place)
    report.formats["prompts"] = len(prompts)
    report = replace(report, rows=len(prompts) + report.rejected, records=len(prompts))
    check_bad(report, max_bad_rows, str(source))
    return unique_ids(prompts), report
