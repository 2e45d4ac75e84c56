"""The keys of `jaxalign build filter`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from jaxalign.synth.base import BuildConfig


def _listed(value: Any) -> Any:
    """One name stands for a list of one."""
    return (value,) if isinstance(value, str) else value


def _ordered(value: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    least, most = value
    if least is not None and most is not None and least > most:
        raise ValueError(f"the least ({least:g}) is more than the most ({most:g})")
    return value


Side = Literal["prompt", "answer", "both"]
Band = Annotated[tuple[float | None, float | None], AfterValidator(_ordered)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Kinds = Annotated[tuple[Literal["exact", "ngram", "minhash"], ...], BeforeValidator(_listed)]


class FilterConfig(BuildConfig):
    """Nothing is left out but what a key asks for. A band is `[least, most]`, `null` where it is open."""

    prompt_chars: Band | None = None
    """band of a prompt's characters"""
    prompt_words: Band | None = None
    """band of a prompt's words; a Chinese or Japanese character is one"""
    answer_chars: Band | None = None
    """band of every answer's characters"""
    answer_words: Band | None = None
    """band of every answer's words"""
    language: Names = ()
    """ISO 639-1 codes of the languages to keep, such as en or [en, zh]"""
    language_of: Side = "both"
    """whose language is looked at"""
    language_certainty: float = Field(default=0.7, ge=0, le=1)
    """a text of which no language is as certain as this passes: it is too short, or code"""
    dedup: Kinds = ()
    """which rows count as repeated: exact, ngram, minhash, or a list of them. The first one stays"""
    dedup_of: Side = "both"
    """what is compared: the prompt, the answers, or both in one"""
    dedup_ngram: int = Field(default=3, ge=1)
    """words of an n-gram of ngram and minhash; none reaches over the end of a sentence"""
    dedup_jaccard: float = Field(default=0.8, gt=0, le=1)
    """rows whose n-grams overlap by at least this share of both are repeated"""
    dedup_permutations: int = Field(default=128, ge=16)
    """hashes of minhash: more find more"""
    contamination: Names = ()
    """evaluation sets, files or folders, of which nothing may stand in the rows"""
    contamination_ngram: int = Field(default=13, ge=1)
    """so many words in a row that stand in an evaluation set too are one too many"""
    perplexity: Band | None = None
    """band of every answer's perplexity after its prompt, by the model of -m or scorer"""
    ifd: Band | None = None
    """band of NLL(answer | prompt) / NLL(answer), nats a token, by the model of -m or scorer"""
    scorer: str | None = None
    """what perplexity and ifd are measured with; null is the model of -m"""
    balance: str = ""
    """a key of meta, or of the row: as many rows of each of its values"""
    balance_cap: int = Field(default=0, ge=0)
    """most rows of a value; 0 is as many as the rarest value has"""
