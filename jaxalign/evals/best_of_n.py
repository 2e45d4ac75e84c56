"""What reward the best of N samples has over its distance from the policy, and where tuned policies stand.

answers/         the samples of every policy, a line a prompt, as they finish; the same command goes on
samples.jsonl    every answer with its rewards, those of compared runs with their log-ratio
best.jsonl       every prompt with its best answer: rows that `train sft` reads (RAFT, arXiv:2304.06767)
result.json, report.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from jaxalign import distributed
from jaxalign.data.readers import read_prompts
from jaxalign.data.records import Prompt
from jaxalign.evals.base import TEMPLATES, Evaluation
from jaxalign.evals.best_of import best_of_kl, expected_best, sizes
from jaxalign.evals.policies import Distance, Passes, Policy, Sampled, open_policies, sample
from jaxalign.pages.charts import Chart, Interval, Series, line_chart
from jaxalign.pages.page import measured, write_page
from jaxalign.rl.rewards import Faults, Rewards, RewardsConfig, Scored, build_rewards
from jaxalign.rl.selection import chat_turns
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.sharding import MeshConfig
from jaxalign.stats import mean_interval
from jaxalign.train.folder import RunFolder

CHART = (720, 380)


class BestOfNEvaluation(RewardsConfig):
    """The keys of `jaxalign evaluate best_of_n`."""

    n: int = Field(16, ge=1)
    """answers to every prompt; the curve has N = 1, 2, 4, ... up to n"""
    compare: tuple[str, ...] = ()
    """output folders of runs over the same base, [ppo-run, rloo-run]: points on the plot, at the reward and
    the KL divergence of their own answers"""
    compare_n: int = Field(1, ge=1)
    """answers of a compared run to every prompt; more of them narrow its intervals"""
    temperature: float = Field(1.0, gt=0)
    """spread of the draws, and of the policies that are compared"""
    max_tokens: int = Field(256, ge=1)
    """longest answer, in tokens"""
    rollout_batch_size: int = Field(64, ge=1)
    """answers under way at the same time"""
    batch_size: int = Field(16, ge=1)
    """prompts of one pass that measures KL divergences, over all devices together"""
    max_bad_rows: float = Field(0.1, ge=0, le=1)
    """largest share of unreadable rows"""
    seed: int = Field(0, ge=0)
    """answers are a function of seed and row id; also of the bootstrap"""
    dtype: Literal["auto", "bf16", "f32"] = "auto"
    """precision of weights and products; auto is bf16 where the device multiplies it natively"""
    mesh: MeshConfig = MeshConfig()
    """how the devices share the work"""


@dataclass(frozen=True)
class Judged:
    """The answers of a policy with their rewards, [P, n] each; `ratios` are nats [P, n] of a compared run's
    log-probabilities over the policy's, None for the policy itself."""

    sampled: Sampled
    rewards: Scored
    faults: list[str]
    ratios: np.ndarray | None = None

    @property
    def unscored(self) -> int:
        """Answers without a reward."""
        return int(np.isnan(self.rewards.total).sum())

    @property
    def cut(self) -> int:
        """Answers that `max_tokens` ended."""
        return sum(c["finish"] == "length" for row in self.sampled.completions for c in row)


def evaluate_best_of_n(model: str, data: Any, out: Path, config: BestOfNEvaluation) -> dict[str, Any]:
    """Samples, scores and compares into the folder `out`. Returns what result.json says.

    Raises `UserError` for data, rewards, a model or compared runs that cannot be used, before any sampling.
    """
    rewards = build_rewards(config)
    prompts, rows = read_prompts(data, max_bad_rows=config.max_bad_rows)
    policies = open_policies(model, config.compare, prompts)
    distance = Distance(
        policies[0], Passes(config.batch_size, config.temperature, config.dtype, config.mesh), _say
    )
    sampled = [_sampled(policy, prompts, out, config, not i) for i, policy in enumerate(policies)]
    first = judge(sampled[0], rewards)
    runs = [
        judge(run, rewards, distance(run, run.policy.file(out / "answers", "kl", ".npz")))
        for run in sampled[1:]
    ]
    best = best_rows(first)
    report = summarise(first, runs, config.seed) | {
        "model": model,
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "config": config.model_dump(mode="json"),
        "rows": rows.lines(),
        "unanswered": len(prompts) - len(first.sampled.prompts),
        "best": len(best),
    }
    _write_lines(out, "samples.jsonl", (row for judged in (first, *runs) for row in sample_rows(judged)))
    _write_lines(out, "best.jsonl", best)
    page = TEMPLATES / "best_of_n.html"
    write_page(out, page, report, numbers="result.json", chart=chart(report), remarks=remarks(report))
    return report


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], out: Path, config: BestOfNEvaluation, first: bool
) -> Sampled:
    """The answers of a policy: n of the first one, compare_n of another."""
    asked = GenerateConfig(
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        n=config.n if first else config.compare_n,
        seed=config.seed,
        batch_size=config.rollout_batch_size,
        dtype=config.dtype,
        mesh=config.mesh,
    )
    file = policy.file(out / "answers", "policy" if first else "run", ".jsonl")
    return sample(policy, prompts, file, asked)


def judge(sampled: Sampled, rewards: Rewards, ratios: np.ndarray | None = None) -> Judged:
    """Scores the answers. Raises `UserError` where a reward scores none of them."""
    faults = Faults()
    found = rewards(sampled.answers(), faults)
    shape = (len(sampled.prompts), -1)
    parts = {name: values.reshape(shape) for name, values in found.parts.items()}
    return Judged(sampled, Scored(found.total.reshape(shape), parts), faults.lines(), ratios)


def summarise(first: Judged, runs: Sequence[Judged], seed: int) -> dict[str, Any]:
    """The numbers, ready for JSON. Means and intervals are over prompts, KL divergences in nats.

    points  N, `kl` (`best_of_kl`, an upper bound) and `reward`, over the prompts that have N scored answers
    runs    `reward`, over the prompts that have a scored answer, and `kl`, measured on all answers
    """
    total = first.rewards.total
    return {
        "prompts": len(total),
        "n": total.shape[1],
        **_counts(first),
        "points": [_point(total, size, seed) for size in sizes(total.shape[1])],
        "runs": [_run(run, seed) for run in runs],
    }


def _counts(judged: Judged) -> dict[str, Any]:
    total = judged.rewards.total
    return {"answers": total.size, "unscored": judged.unscored, "cut": judged.cut, "faults": judged.faults}


def _point(total: np.ndarray, size: int, seed: int) -> dict[str, Any]:
    """Best of `size`, from rewards [P, n]."""
    known = [row[np.isfinite(row)] for row in total]
    values = [expected_best(row, size) for row in known if len(row) >= size]
    return {"N": size, "kl": best_of_kl(size), "reward": mean_interval(values, seed=seed).to_json()}


def _run(run: Judged, seed: int) -> dict[str, Any]:
    """A compared run."""
    assert run.ratios is not None, "the distance of a run was measured"
    known = [row[np.isfinite(row)] for row in run.rewards.total]
    return {
        "name": run.sampled.policy.label,
        "run": run.sampled.policy.name,
        **_counts(run),
        "reward": mean_interval([row.mean() for row in known if len(row)], seed=seed).to_json(),
        "kl": mean_interval(run.ratios.mean(axis=1), seed=seed).to_json(),
    }


def sample_rows(judged: Judged) -> Iterable[dict[str, Any]]:
    """One row an answer; a reward that is not there is null."""
    sampled, scored, ratios = judged.sampled, judged.rewards, judged.ratios
    for p, (prompt, row) in enumerate(zip(sampled.prompts, sampled.completions, strict=True)):
        for g, completion in enumerate(row):
            yield {
                "policy": sampled.policy.label,
                "id": prompt.id,
                "sample": g,
                **{name: completion[name] for name in ("text", "tokens", "finish")},
                "reward": _number(scored.total[p, g]),
                "rewards": {name: _number(values[p, g]) for name, values in scored.parts.items()},
                **({} if ratios is None else {"log_ratio": float(ratios[p, g])}),
            }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def best_rows(judged: Judged) -> list[dict[str, Any]]:
    """A prompt/completion row of every prompt that has an answer with words and a reward: its best one, of
    equals the first."""
    found = []
    sampled = judged.sampled
    for prompt, row, rewards in zip(sampled.prompts, sampled.completions, judged.rewards.total, strict=True):
        usable = [g for g, c in enumerate(row) if np.isfinite(rewards[g]) and c["text"].strip()]
        if not usable:
            continue
        best = max(usable, key=lambda g: rewards[g])
        asked = prompt.text if prompt.messages is None else chat_turns(prompt)
        answer = {"id": prompt.id, "prompt": asked, "completion": row[best]["text"]}
        found.append({**answer, "reward": float(rewards[best]), "n": len(usable)})
    return found


def chart(report: dict[str, Any]) -> Chart:
    """Reward over KL: a line of best of N, a point for each run."""
    drawn = [point for point in report["points"] if point["reward"]["mean"] is not None]
    line = Series(
        "best of N",
        "train",
        [(point["kl"], point["reward"]["mean"]) for point in drawn],
        dots=True,
        marks=[str(point["N"]) for point in drawn],
        bars=[_ends(point["reward"]) for point in drawn],
    )
    points = [
        Series(
            run["name"],
            "eval",
            [(run["kl"]["mean"], run["reward"]["mean"])],
            dots=True,
            marks=[run["name"]],
            bars=[_ends(run["reward"])],
            spans=[_ends(run["kl"])],
        )
        for run in report["runs"]
    ]
    return line_chart("Reward", [line, *points], x_label="KL divergence from the policy, nats", size=CHART)


def _ends(mean: dict[str, Any]) -> Interval:
    return None if mean["low"] is None else (mean["low"], mean["high"])


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader should know: what is left out, and what ended early."""
    found = []
    if report["unanswered"]:
        found.append(f"{report['unanswered']} prompts are too long for an answer of max_tokens: left out.")
    for who, part in (("the policy", report), *((run["name"], run) for run in report["runs"])):
        found += [f"{who}: {line}; left out." for line in part["faults"]]
        if part["cut"]:
            found.append(f"{who}: {part['cut']} of {part['answers']} answers end at max_tokens.")
    few = [p for p in report["points"] if p["reward"]["n"] < report["prompts"]]
    if few:
        least = min(p["reward"]["n"] for p in few)
        found.append(
            f"Not every prompt has N answers with a reward: from N = {few[0]['N']} on some are left out, and "
            f"{least} of {report['prompts']} prompts are left in the least case."
        )
    if report["best"] < report["prompts"]:
        found.append(f"{report['prompts'] - report['best']} prompts have no best answer in best.jsonl.")
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    out = [f"{report['prompts']} prompts, {report['n']} answers to each"]
    out += [
        f"best of {p['N']}: reward {measured(p['reward'])}, KL at most {p['kl']:.3f}"
        for p in report["points"]
    ]
    out += [f"{r['name']}: reward {measured(r['reward'])}, KL {measured(r['kl'])}" for r in report["runs"]]
    return [*out, *remarks(report)]


def _write_lines(out: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Replaces a JSONL file."""
    RunFolder(out).write_text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _say(text: str) -> None:
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


EVALUATION = Evaluation(BestOfNEvaluation, evaluate_best_of_n, lines)
