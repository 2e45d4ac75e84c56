"""Evaluation of a reward model on pairs: how often the chosen answer scores higher, and why that may be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from jaxalign.config import Config
from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.readers import read_groups
from jaxalign.data.tokenize import Truncation, tokenize_groups
from jaxalign.evals.base import TEMPLATES, Evaluation
from jaxalign.pages.page import percent, write_page
from jaxalign.sharding import MeshConfig
from jaxalign.stats import rate_interval
from jaxalign.train.reward_model import load_reward_model
from jaxalign.train.settings import PairPolicy

BINS = 5  # of confidence, from 0.5 to 1
PARTS = 10  # of the answers, by length
SUSPICIOUS = 0.5  # a correlation with length from which rewards are called hackable


class RewardEvaluation(Config):
    """The keys of `jaxalign evaluate reward`."""

    batch_size: int = Field(16, ge=1)
    """pairs of one pass, over all devices together"""
    max_length: int = Field(1024, ge=2)
    """longest prompt and answer in tokens"""
    truncation: Truncation = "keep_start"
    """what happens to an answer over max_length"""
    pairs: PairPolicy = "all_pairs"
    """which pairs a list of scored or ranked answers gives"""
    select: dict[str, str] = Field(default_factory=dict)
    """keys of a row's meta with the value that they must have, such as {aspect: harmless}"""
    max_bad_rows: float = Field(0.1, ge=0, le=1)
    """largest share of unreadable rows"""
    cost: bool = False
    """the model scores cost: the chosen answer should score lower"""
    seed: int = 0
    """of random pairs"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of matrix products"""
    mesh: MeshConfig = MeshConfig()
    """how the devices share the work"""


@dataclass(frozen=True)
class ScoredPair:
    """Scores and lengths in tokens of (chosen, rejected)."""

    id: str
    scores: tuple[float, float]
    lengths: tuple[int, int]

    @property
    def gap(self) -> float:
        """Score of the chosen answer less that of the rejected."""
        return self.scores[0] - self.scores[1]


def evaluate_reward(model: str, data: Any, out: Path, config: RewardEvaluation) -> dict[str, Any]:
    """Scores the pairs of `data` and writes `scores.jsonl`, `report.json` and `report.html` into `out`.

    Returns what the report says. Raises `UserError` for data or a model that cannot be used.
    """
    scorer = load_reward_model(model, config.dtype, config.mesh)
    options = GroupOptions(config.pairs, None, None, config.select, config.seed)
    records, rows = read_groups(data, "pairs", options=options, max_bad_rows=config.max_bad_rows)
    groups, tokens = tokenize_groups(records, scorer.tokenizer, config.max_length, config.truncation)
    found = scorer.scores(groups, rows=config.batch_size, max_length=config.max_length)
    sign = -1.0 if config.cost else 1.0
    pairs = [
        ScoredPair(
            group.id,
            (sign * float(scores[0]), sign * float(scores[1])),
            (int(group.members[0].mask.sum()), int(group.members[1].mask.sum())),
        )
        for group, scores in zip(groups, found, strict=True)
    ]
    report = summarise(pairs) | {
        "model": model,
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "config": config.model_dump(mode="json"),
        "rows": [*rows.lines(), *tokens.lines()],
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
    (out / "scores.jsonl").write_text(lines, encoding="utf-8")
    write_page(out, TEMPLATES / "reward.html", report, remarks=remarks(report))
    return report


def summarise(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The statistics of scored pairs, ready for JSON.

    accuracy            share of pairs whose chosen answer scores strictly higher (a tie is a miss)
    longer              share of pairs of unequal length whose chosen answer is the longer one: what a model
                        that only counts tokens would reach
    length_correlation  Spearman's, of score and length over all answers; null where either is constant
    calibration         of sigmoid(|gap|) as the probability to be right, in bins; `error` is the expected
                        calibration error (arXiv:1706.04599, eq. 3)
    by_length           mean score of answers from the shortest to the longest tenth
    """
    gaps = np.array([pair.gap for pair in pairs])
    lengths = np.array([pair.lengths for pair in pairs])
    unequal = lengths[lengths[:, 0] != lengths[:, 1]]
    scores = np.array([pair.scores for pair in pairs])
    return {
        "pairs": len(pairs),
        "accuracy": rate_interval(int((gaps > 0).sum()), len(pairs)).to_json(),
        "ties": int((gaps == 0).sum()),
        "margin": {"mean": float(gaps.mean()), "sd": float(gaps.std())},
        "chosen": float(scores[:, 0].mean()),
        "rejected": float(scores[:, 1].mean()),
        "longer": rate_interval(int((unequal[:, 0] > unequal[:, 1]).sum()), len(unequal)).to_json(),
        "length_correlation": _spearman(scores.ravel(), lengths.ravel()),
        "calibration": calibration(gaps),
        "by_length": _by_length(scores.ravel(), lengths.ravel()),
    }


def calibration(gaps: np.ndarray) -> dict[str, Any]:
    """Confidence sigmoid(|gap|) against how often the sign is right, in `BINS` bins from 0.5 to 1."""
    confidence, hit = 1 / (1 + np.exp(-np.abs(gaps))), gaps > 0
    places = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in range(BINS):
        here = places == place
        count = int(here.sum())
        row = {"from": 0.5 + place / (2 * BINS), "to": 0.5 + (place + 1) / (2 * BINS), "pairs": count}
        if count:
            said, right = float(confidence[here].mean()), float(hit[here].mean())
            error += count / len(gaps) * abs(said - right)
            row |= {"confidence": said, "right": rate_interval(int(hit[here].sum()), count).to_json()}
        bins.append(row)
    return {"bins": bins, "error": error}


def _spearman(scores: np.ndarray, lengths: np.ndarray) -> float | None:
    if np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return None
    from scipy.stats import spearmanr

    result: Any = spearmanr(scores, lengths)
    value = float(result.statistic)
    return value if math.isfinite(value) else None


def _by_length(scores: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    parts = np.array_split(np.argsort(lengths, kind="stable"), min(PARTS, len(lengths)))
    return [
        {
            "tokens": [int(lengths[part].min()), int(lengths[part].max())],
            "answers": len(part),
            "score": float(scores[part].mean()),
        }
        for part in parts
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting the model."""
    found, correlation = [], report["length_correlation"]
    if correlation is not None and abs(correlation) > SUSPICIOUS:
        found.append(
            f"Scores follow the length of the answer (correlation {correlation:+.2f}): a policy trained on "
            "them will change the length of its answers."
        )
    low = report["accuracy"]["low"]
    if low is not None and low <= 0.5:
        found.append("The interval of the accuracy contains one half: this may be chance.")
    if report["ties"]:
        found.append(f"{report['ties']} pairs have two equal scores; they count as misses.")
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    rate, longer = report["accuracy"], report["longer"]
    correlation = report["length_correlation"]
    followed = "not defined" if correlation is None else f"{correlation:+.2f}"
    return [
        f"{rate['passed']} of {rate['n']} chosen answers score higher: {percent(rate['rate'])}, "
        f"95 % interval {percent(rate['low'])} to {percent(rate['high'])}",
        f"the longer answer is the chosen one in {percent(longer['rate'])} of {longer['n']} pairs; "
        f"correlation of score and length {followed}",
        f"margin {report['margin']['mean']:.3f}, calibration error {report['calibration']['error']:.3f}",
        *remarks(report),
    ]


EVALUATION = Evaluation(RewardEvaluation, evaluate_reward, lines)
