"""The language of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jaxalign.errors import UserError, nearest
from jaxalign.extras import optional
from jaxalign.synth.base import Work
from jaxalign.synth.quality.items import Fault, Item, Sieved


def languages(items: Sequence[Item], work: Work) -> Sieved:
    """Rows with a text in a language that is not wanted. Raises `UserError` for an unknown code."""
    config = work.config
    tell = identifier(config.language)
    counts: Counter[str] = Counter()
    faults: dict[int, Fault] = {}
    for i, item in enumerate(items):
        for piece in item.of(config.language_of):
            code, certainty = tell(piece.text)
            certain = certainty >= config.language_certainty
            counts[code if certain else "uncertain"] += 1
            if certain and code not in config.language:
                faults.setdefault(i, Fault(f"language: {code}", f"{piece.role}, certain by {certainty:.2f}"))
    return Sieved(faults, {"texts": dict(counts.most_common())})


def identifier(wanted: Sequence[str]) -> Callable[[str], tuple[str, float]]:
    """text -> (ISO 639-1 code, certainty). Raises `UserError` for an unknown code among those wanted."""
    found = _model()
    unknown = [code for code in wanted if code not in found.labels]
    if unknown:
        remedy = f"known: {', '.join(sorted(found.labels))}"
        cause = f"unknown language {unknown[0]!r}{nearest(unknown[0], found.labels)}"
        raise UserError(cause, place="language", remedy=remedy)
    return found.classify


@cache
def _model() -> Any:
    """It comes with the library: nothing is fetched."""
    module: Any = optional("py3langid.langid", "py3langid", extra="quality", place="language")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
