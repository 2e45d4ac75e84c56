"""How likely a model finds the answers: perplexity, and IFD (arXiv:2308.12032)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jaxalign.data.pieces import said
from jaxalign.llm.base import Likelihood, Prompt, Question
from jaxalign.synth.base import Work
from jaxalign.synth.quality.bands import Limits, outside, spread
from jaxalign.synth.quality.items import Fault, Item, Sieved
from jaxalign.synth.stage import Choose


def likelihoods(items: Sequence[Item], work: Work) -> Sieved:
    """Rows with an answer outside the bands `perplexity`, exp NLL(y|x), and `ifd`, NLL(y|x) / NLL(y), both
    nats a token. A row passes only where the model could tell of all of its answers."""
    config = work.config
    answers = {item.id: list(_answers(item)) for item in items}
    names = [(item.id, k) for item in items for k in range(len(answers[item.id]))]
    pick = lambda name: answers[name[0]][name[1]]  # noqa: E731
    given = _measured(work, "given", [(name, *pick(name)) for name in names])
    alone: dict[str, Likelihood] = {}
    if config.ifd is not None:  # an answer to nothing has no IFD
        alone = _measured(work, "alone", [(name, "", pick(name)[1]) for name in names if pick(name)[0]])
    found = {f"{name}:{k}": _values(given, alone, f"{name}:{k}") for name, k in names}
    bands = {key: getattr(config, key) for key in ("perplexity", "ifd") if getattr(config, key) is not None}
    faults: dict[int, Fault] = {}
    for i, item in enumerate(items):
        rows = [found[f"{item.id}:{k}"] for k in range(len(answers[item.id]))]
        fault = next((f for values in rows for f in _faults(values, bands)), None)
        if fault is not None:
            faults[i] = fault
    return Sieved(faults, {key: spread(v[key] for v in found.values() if key in v) for key in bands})


def _faults(values: dict[str, float], bands: dict[str, Limits]) -> Iterator[Fault]:
    for key, band in bands.items():
        if key not in values:
            yield Fault(f"{key}: not told")
        elif outside(values[key], band):
            yield Fault(f"{key}: outside its band", f"{values[key]:.4g}")


def _values(given: dict[str, Likelihood], alone: dict[str, Likelihood], name: str) -> dict[str, float]:
    """{key: value} of an answer, without those that cannot be told."""
    if name not in given:
        return {}
    out = {"perplexity": math.exp(given[name].nll)}
    if name in alone and alone[name].nll > 0:
        out["ifd"] = given[name].nll / alone[name].nll
    return out


def _measured(
    work: Work, stage: str, asked: Sequence[tuple[tuple[str, int], Prompt, str]]
) -> dict[str, Likelihood]:
    items = [Choose(f"{name}:{k}", Question(prompt, (text,))) for (name, k), prompt, text in asked]
    return {name: found[0] for name, found in work.likelihoods(stage, items, "scorer").items()}


def _answers(item: Item) -> Iterator[tuple[Prompt, str]]:
    """Every answer's last turn after all that precedes it."""
    for each in item.exchanges:
        for answer in each.answers:
            if isinstance(each.prompt, str) or isinstance(answer.content, str):
                yield said(each.prompt), said(answer.content)
            else:
                yield (*each.prompt, *answer.content[:-1]), answer.content[-1].content
