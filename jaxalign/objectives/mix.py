"""Weighted sums of losses over pairs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import jax
from pydantic import AfterValidator, Field, ValidationError, model_validator

from jaxalign.errors import nearest
from jaxalign.objectives.answers import Answers, Pair, Result, over_pairs
from jaxalign.objectives.base import Scores, TokenLoss
from jaxalign.registry import OBJECTIVES
from jaxalign.types import Batch


class ChosenNLL(TokenLoss):
    """Supervised fine-tuning on the chosen answers: their negative log-likelihood, a mean over the tokens of
    the step."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens_per_group"})

    __call__ = over_pairs

    def loss(self, pair: Pair) -> jax.Array:
        """float32 [B]."""
        return pair.nll

    def reward(self, answer: Answers) -> jax.Array:
        """log p."""
        return answer.logp


SFT = "sft"  # the one part that is not a method over pairs of that name

Spec = Any  # a weight, or {"weight": 1, a key of the loss: its value}; `part_of` refuses what is neither

_ITERATIVE_RPO: dict[str, Spec] = {"dpo": 1.0, SFT: 1.0}
_MPO: dict[str, Spec] = {"dpo": 0.8, "bco_pair": 0.2, SFT: 1.0}


def part_of(name: str, spec: Spec, beta: float | None = None) -> tuple[float, Any]:
    """(weight, loss) of one part. `beta` is for a loss that has one and is not told it in `spec`.

    Raises `ValueError` for a name or a value that no part has.
    """
    cls, own = _class_of(name), dict(spec) if isinstance(spec, dict) else {"weight": spec}
    weight = own.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"{name}: the weight is not a number above 0: {weight!r}")
    if beta is not None and "beta" in cls.model_fields:
        own = {"beta": beta} | own
    unknown = next((key for key in own if key not in cls.model_fields), None)
    if unknown is not None:
        raise ValueError(f"{name}.{unknown}: unknown key{nearest(unknown, (*cls.model_fields, 'weight'))}")
    try:
        return float(weight), cls(**own)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join((name, *map(str, first["loc"])))
        raise ValueError(f"{key}: {first['msg'].lower()} (found {first['input']!r})") from None


def _class_of(name: str) -> Any:
    """The class of a part. Raises `ValueError` with the nearest name."""
    if name == SFT:
        return ChosenNLL
    known = [n for n in OBJECTIVES if n == SFT or _mixes(OBJECTIVES[n])]
    if name not in OBJECTIVES.entries:
        space = " (in YAML a space follows the colon)" if ":" in name else ""
        raise ValueError(f"unknown loss {name!r}{space}{nearest(name, known)}")
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        raise ValueError(f"{name} is not a loss over pairs of answers{hint}")
    return OBJECTIVES[name]


def _mixes(cls: Any) -> bool:
    return cls.kind == "tokens" and cls.data == "pairs" and not issubclass(cls, Mix)


def _checked(losses: dict[str, Spec]) -> dict[str, Spec]:
    if not set(losses) - {SFT}:
        raise ValueError("no loss that compares answers")
    for name, spec in losses.items():
        part_of(name, spec)
    return losses


class Mix(TokenLoss):
    """A weighted sum of losses over pairs: L = sum_k w_k L_k, each L_k a mean over the pairs of the step."""

    group: ClassVar[int] = 2
    data: ClassVar[str] = "pairs"
    rates: ClassVar[tuple[float, float]] = (5e-7, 5e-6)

    losses: Annotated[dict[str, Spec], AfterValidator(_checked)] = Field(default=_ITERATIVE_RPO)
    """methods over pairs by name, and sft for the likelihood of the chosen answers: a weight each, or a block
    with the loss's own keys, such as {dpo: 0.8, dpop: {weight: 0.2, penalty: 5}}"""
    beta: float | None = Field(default=None, gt=0)
    """beta of the losses whose block does not set one; null takes each loss's own default"""

    @model_validator(mode="after")
    def _beta_suits(self) -> Mix:
        assert self.parts, "built with the shared beta"
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def parts(self) -> dict[str, tuple[float, Any]]:
        """{name: (weight, loss)}."""
        return {name: part_of(name, spec, self.beta) for name, spec in self.losses.items()}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What its parts ask for."""
        return frozenset().union(*(loss.needs for _, loss in self.parts.values()))

    def fault(self, aux: dict[str, Any]) -> str | None:
        """The first fault that one of its parts finds in a row."""
        found = (loss.fault(aux) for _, loss in self.parts.values())
        return next((fault for fault in found if fault), None)

    def __call__(self, scores: Scores, batch: Batch) -> Result:
        """The weighted sum over the pairs, and their number. The rewards are the first comparing part's;
        `losses/NAME` is each part's own loss, without its weight."""
        results = {name: (weight, loss(scores, batch)) for name, (weight, loss) in self.parts.items()}
        _, (_, count, metrics) = next(found for name, found in results.items() if name != SFT)
        own = {f"losses/{name}": (jax.lax.stop_gradient(x), count) for name, (_, (x, *_)) in results.items()}
        return sum(weight * x for weight, (x, *_) in results.values()), count, metrics | own  # type: ignore


class MPO(Mix):
    """Mixed preference optimisation (arXiv:2411.10442): preference, quality and generation,
    L = 0.8 DPO + 0.2 BCO + NLL_w, the last a mean over the tokens of the step."""

    rates: ClassVar[tuple[float, float]] = (5e-6, 5e-5)

    losses: Annotated[dict[str, Spec], AfterValidator(_checked)] = Field(default=_MPO)
    """methods over pairs by name, and sft for the likelihood of the chosen answers: a weight each, or a block
    with the loss's own keys"""
    beta: float | None = Field(default=0.1, gt=0)
    """beta of the losses whose block does not set one; null takes each loss's own default"""
