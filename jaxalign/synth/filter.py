"""`jaxalign build filter`: rows of any known kind in, those that pass out, their keys as they were.

The filters come in one order whatever the order of the keys: lengths, languages, repeated rows (exact, ngram,
minhash), contamination, perplexity and IFD, balance. What is cheap comes first; balance counts what is left.
Every row that was left out stands in `dropped.jsonl` with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError
from jaxalign.synth.base import Builder, Built, Work
from jaxalign.synth.quality import balance, bands, contamination, dedup, language, likelihood
from jaxalign.synth.quality.items import Fault, Item, Sieved, counted, read_items
from jaxalign.synth.quality.settings import FilterConfig


@dataclass(frozen=True)
class Filter:
    """One filter: its name in the report, the keys one of which switches it on, and its work."""

    name: str
    wanted: Callable[[FilterConfig], bool]
    run: Callable[[Sequence[Item], Work], Sieved]


def _by_likelihood(config: FilterConfig) -> bool:
    return config.perplexity is not None or config.ifd is not None


FILTERS = (
    Filter("length", lambda c: any(getattr(c, key) is not None for key in bands.LENGTHS), bands.lengths),
    Filter("language", lambda c: bool(c.language), language.languages),
    Filter("exact", lambda c: "exact" in c.dedup, dedup.exact),
    Filter("ngram", lambda c: "ngram" in c.dedup, dedup.ngram),
    Filter("minhash", lambda c: "minhash" in c.dedup, dedup.minhash),
    Filter("contamination", lambda c: bool(c.contamination), contamination.contamination),
    Filter("likelihood", _by_likelihood, likelihood.likelihoods),
    Filter("balance", lambda c: bool(c.balance), balance.balance),
)


def run(work: Work) -> Built:
    """Raises `UserError` where no key switches a filter on, and as the reader and the filters do."""
    chosen = [known for known in FILTERS if known.wanted(work.config)]
    if not chosen:
        remedy = "name one, such as dedup=exact; `jaxalign build filter --help` lists the keys"
        raise UserError("no filter is switched on", place="build filter", remedy=remedy)
    items, report = read_items(work.data, max_bad_rows=work.config.max_bad_rows, limit=work.config.limit)
    for line in report.lines():
        work.say(line)
    work.read(report.rows)
    reasons = {**report.rejects, **report.skipped}
    dropped = Counter({f"unreadable: {reason}": count for reason, (count, _) in reasons.items()})
    beside: list[dict[str, Any]] = []
    about = {}
    for each in chosen:
        found = each.run(items, work)
        dropped.update(fault.reason for fault in found.faults.values())
        beside += [_left_out(items[i], fault) for i, fault in sorted(found.faults.items())]
        about[each.name] = {"in": len(items), "dropped": len(found.faults), **found.about}
        items = counted(items, found.faults)
    return Built(
        [item.row for item in items],
        {"formats": report.formats, "filters": about},
        dict(dropped),
        {"dropped.jsonl": beside},
    )


def _left_out(item: Item, fault: Fault) -> dict[str, Any]:
    return {
        "reason": fault.reason,
        "detail": fault.detail,
        "id": item.id,
        "place": item.place,
        "row": item.row,
    }


BUILDER = Builder(FilterConfig, run, roles=("scorer",), model=False, asks=_by_likelihood)
