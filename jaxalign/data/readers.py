"""Data sources -> records, with a report of what was read and what was left out and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jaxalign.data import group_formats, prompt_formats
from jaxalign.data.convert import check_policy
from jaxalign.data.files import READERS, Rows, find_files, read_file, suffix_of
from jaxalign.data.formats import KNOWN, to_records
from jaxalign.data.group_formats import CONVERSIONS, GROUP_FORMATS, GroupOptions, native, to_best, to_groups
from jaxalign.data.preferences import BinaryRecord, GroupRecord, PreferenceRecord, ScoredRecord
from jaxalign.data.prompt_formats import to_prompts
from jaxalign.data.records import Mended, Prompt, RowError, SFTRecord, UnwantedRowError
from jaxalign.data.sources import fft, harmfulqa, oasst, sparse_feedback
from jaxalign.errors import UserError, nearest

PLACES_KEPT = 3  # examples of each reason that a report remembers

HUB_ID = re.compile(
    r"^(?P<hf>hf:)?(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.\-\[\]%+:]+?))?(@(?P<config>[\w.-]+))?$"
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the rows of one data argument.

    rejects, skipped  {reason: (count, first places)}: rows at fault; sound rows that this use leaves out
    formats           {format name: records}
    contradictions    pairs that another pair turns round
    mended            {what was mended in a file: (count, first places)}
    """

    rows: int = 0
    records: int = 0
    rejects: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    contradictions: int = 0
    mended: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """How many rows were at fault."""
        return sum(count for count, _ in self.rejects.values())

    def lines(self) -> list[str]:
        """The report in plain lines."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        out = [f"{self.rows} rows read, {self.records} records ({kinds or 'none'})"]
        counted = (("rejected", self.rejects), ("skipped", self.skipped), ("mended", self.mended))
        for title, reasons in counted:
            for reason, (count, places) in sorted(reasons.items(), key=lambda item: -item[1][0]):
                more = ", ..." if count > len(places) else ""
                out.append(f"{title} {count}: {reason} ({', '.join(places)}{more})")
        if self.contradictions:
            out.append(f"{self.contradictions} pairs are there both ways round: choose one with `select`")
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


Item = TypeVar("Item", bound=Any)
# (row, place, source) -> (records with the faults among them, format name); raises RowError, UnwantedRowError
Convert = Callable[[Any, str, str], tuple[list[Any], str]]

# Formats whose records span several rows of a file, or whose rows are not yet what a record is made of.
JOINS = (fft.joined, harmfulqa.joined, oasst.joined, sparse_feedback.joined)


def load(
    sources: str | Path | Sequence[str | Path],
    convert: Convert,
    *,
    max_bad_rows: float,
    limit: int | None = None,
    known: str = KNOWN,
) -> tuple[list[Any], LoadReport]:
    """Records of files, folders or hub data sets, and the report of what was left out.

    Raises `UserError` when a source is missing, when more than the share `max_bad_rows` of the rows is
    at fault, or when no record is left. `limit` stops after so many records.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    report, records, rows = LoadReport(), [], 0
    for place, row, source in _rows_of(names):
        if isinstance(row, Mended):
            tally(report.mended, row.what, place)
            continue
        rows += 1
        records += _converted(row, place, source, convert, report)
        if limit is not None and len(records) >= limit:
            break
    records = records[:limit]
    report = replace(report, rows=rows, records=len(records))
    check_bad(report, max_bad_rows, ", ".join(map(str, names)), known)
    return unique_ids(records), report


def _rows_of(names: Sequence[str | Path]) -> Iterator[tuple[str, Any, str]]:
    """(place, row, source) of all sources."""
    for name in names:
        rows = read_rows(name)
        for join in JOINS:
            rows = join(rows)
        yield from ((place, row, str(name)) for place, row in rows)


def _converted(row: Any, place: str, source: str, convert: Convert, report: LoadReport) -> list[Any]:
    """The records of one row; the report's dictionaries are filled on the way."""
    try:
        if isinstance(row, RowError | UnwantedRowError):
            raise row
        parts, name = convert(row, place, source)
    except (RowError, UnwantedRowError) as reason:
        parts, name = [reason], ""
    records = []
    for part in parts:
        if isinstance(part, RowError):
            tally(report.rejects, str(part), place)
        elif isinstance(part, UnwantedRowError):
            tally(report.skipped, str(part), place)
        else:
            report.formats[name] = report.formats.get(name, 0) + 1
            records.append(part)
    return records


def read_records(
    sources: str | Path | Sequence[str | Path], *, max_bad_rows: float = 0.1, limit: int | None = None
) -> tuple[list[SFTRecord], LoadReport]:
    """Rows to imitate, of scored answers the best; `load` says what it raises."""

    def convert(row: Any, place: str, source: str) -> tuple[list[Any], str]:
        best = to_best(row, source=source, place=place)
        return best if best is not None else to_records(row, source=source, place=place)

    return load(sources, convert, max_bad_rows=max_bad_rows, limit=limit)


def read_groups(
    sources: str | Path | Sequence[str | Path],
    kind: str,
    *,
    options: GroupOptions | None = None,
    max_bad_rows: float = 0.1,
    limit: int | None = None,
) -> tuple[list[GroupRecord], LoadReport]:
    """Rows that compare or judge answers. `kind` is what the method learns from: pairs (`PreferenceRecord`),
    binary (`BinaryRecord`) or lists (`ScoredRecord`); rows of another kind are converted where that can be.

    Raises `UserError` for an unknown kind or policy, and as `load` does.
    """
    chosen = options or GroupOptions()
    check_policy(chosen.pairs)
    if kind not in CONVERSIONS:
        remedy = f"known: {', '.join(CONVERSIONS)}"
        raise UserError(f"unknown kind of rows {kind!r}{nearest(kind, CONVERSIONS)}", remedy=remedy)

    def convert(row: Any, place: str, source: str) -> tuple[list[Any], str]:
        return to_groups(row, kind, chosen, source=source, place=place)

    records, report = load(
        sources, convert, max_bad_rows=max_bad_rows, limit=limit, known=group_formats.KNOWN
    )
    return records, replace(report, contradictions=count_contradictions(records))


def kind_of(sources: str | Path | Sequence[str | Path]) -> str:
    """What the first usable row is by itself: pairs, binary, lists, or else sft."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    kinds = {PreferenceRecord: "pairs", BinaryRecord: "binary", ScoredRecord: "lists"}
    for _, row, _ in _rows_of(names):
        if isinstance(row, dict) and not any(known.matches(row) for known in GROUP_FORMATS):
            return "sft"
        try:
            parts = [] if isinstance(row, RowError | UnwantedRowError) else native(row)[0]
        except (RowError, UnwantedRowError):
            continue
        found = next((kinds[type(part)] for part in parts if type(part) in kinds), None)
        if found is not None:
            return found
    return "sft"


def count_contradictions(records: Sequence[GroupRecord]) -> int:
    """How many pairs another pair turns round: the same prompt, chosen and rejected exchanged."""
    pairs = {(r.prompt, r.answers) for r in records if isinstance(r, PreferenceRecord)}
    return sum(1 for prompt, answers in pairs if (prompt, answers[::-1]) in pairs) // 2


def check_bad(report: LoadReport, max_bad_rows: float, place: str, known: str = KNOWN) -> None:
    """Raise `UserError` when too many rows are at fault or none is left."""
    remedy = "\n  ".join([*report.lines()[1:], *_remedies(report, known)])
    # One row may hold many records, and as many faults.
    total = max(report.rows, report.records + report.rejected, 1)
    if report.rejected > max_bad_rows * total:
        cause = f"{report.rejected} of {total} rows cannot be used, more than max_bad_rows={max_bad_rows:g}"
        raise UserError(cause, place=place, remedy=remedy)
    if not report.records:
        raise UserError("no usable row", place=place, remedy=remedy)


# What reasons begin with that are about the form of the rows, and not about what stands in one of them.
_FORM = ("unknown columns", "the row is not an object")


def _remedies(report: LoadReport, known: str) -> list[str]:
    """What helps against the faults of a report: another form, or mended rows."""
    about_form = [reason.startswith(_FORM) or " does not make " in reason for reason in report.rejects]
    out = [f"rows known: {known}"] if any(about_form) or not report.rejects else []
    return out if all(about_form) else ["mend these rows, or raise max_bad_rows to go on without them", *out]


def unique_ids(rows: list[Item]) -> list[Item]:
    """The rows with `#2`, `#3`, ... added to ids that occurred before, so that every id is one row's."""
    seen: dict[str, int] = {}
    out = []
    for row in rows:
        count = seen[row.id] = seen.get(row.id, 0) + 1
        out.append(row if count == 1 else replace(row, id=f"{row.id}#{count}"))
    return out


def read_prompts(source: str | Path, *, max_bad_rows: float = 0.1) -> tuple[list[Prompt], LoadReport]:
    """Prompts to answer, and the report. Raises `UserError` as `load` does."""
    return load(source, to_prompts, max_bad_rows=max_bad_rows, known=prompt_formats.KNOWN)
