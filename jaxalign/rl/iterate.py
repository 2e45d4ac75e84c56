"""Rounds: the policy answers, rewards judge, an offline method learns, and the result answers again.

    round-1/samples.jsonl   answers of the policy to the prompts
    round-1/scored.jsonl    what is learned of them, with rewards: rows that every offline method reads
    round-1/run/            the training run on them; its start is also its reference policy
    eval/0.jsonl, 1.jsonl   answers to the held-out prompts before the first round, after it, ...
    rounds.jsonl            one line a round: rewards, win rate over the round before
    adapter/ or model/      the result, a copy of the last round's

Every file is written as it comes and what is there is not done again, so that the same command goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import Field, create_model

from jaxalign import distributed
from jaxalign.data.readers import read_prompts
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.rl.base import Method
from jaxalign.rl.prompts import divide
from jaxalign.rl.rewards import Answer, Faults, Rewards, RewardsConfig, build_rewards
from jaxalign.rl.rollout import MOMENTS
from jaxalign.rl.selection import AgainstRow, ClearPairs, Everything, Judged, RejectionSampled, Selection
from jaxalign.rl.steering import Conditioned, graded
from jaxalign.sampling.generate import answer_file
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.train.folder import RunFolder, check_same, disk_errors, locked
from jaxalign.train.run import train
from jaxalign.train.settings import TrainConfig, config_for

HELD_OUT_SAMPLES = 1  # answers to a held-out prompt, of every policy


class RoundsConfig(RewardsConfig):
    """The keys of a method that works in rounds."""

    rounds: int = Field(3, ge=1)
    """rounds of sampling and training at most"""
    n: int = Field(4, ge=1)
    """answers to every prompt, in every round"""
    temperature: float = Field(1.0, gt=0)
    """spread of the draws"""
    top_p: float = Field(1.0, gt=0, le=1)
    """draw from the likeliest tokens whose probabilities add up to this; 1 is off"""
    max_tokens: int = Field(256, ge=1)
    """longest answer, in tokens"""
    rollout_batch_size: int = Field(64, ge=1)
    """answers under way at the same time"""
    least_win_rate: float = Field(0.52, ge=0, le=1)
    """rounds end when the new policy's share of wins over the last one, on the held-out prompts, is less"""


@dataclass(frozen=True)
class Ended:
    """How the rounds ended: `rows` has a line for each, `result` is the folder of what was trained."""

    folder: Path
    rows: list[dict[str, Any]]
    result: Path


def iterate(
    name: str,
    objective: str,
    selection: Any,
    model: str,
    data: Any,
    out: Path,
    config: Any,
    say: Callable[[str], None],
) -> Ended:
    """Rounds of `objective` from `model` on the prompts of `data`, into the folder `out`; `selection` is the
    class of what chooses the answers to learn from. The same call goes on where an earlier one stopped.

    Raises `UserError` for bad input before any work, and where a round has nothing to learn from.
    """
    chosen = selection(**{key: getattr(config, key) for key in selection.model_fields})
    rewards = build_rewards(config) if selection.rewarded or config.rewards else Rewards({})
    folder = RunFolder(Path(out))
    with disk_errors(folder.path), locked(folder.path):
        recorded = folder.read("run.json")
        if recorded:
            check_same(folder.path, recorded, name, config)
        asked = {"method": name, "model": model, "data": str(data)}
        learned, held_out = _prompts(data, config, say)
        folder.begin(asked, config, config.rounds)
        work = _Rounds(folder.path, model, objective, config, rewards, chosen, learned, held_out, say)
        rows = work.all()
        result = _keep(folder.path, work.run(len(rows)))
        folder.write("result.json", {"step": len(rows), "result": result.name, "metrics": rows[-1]})
    say(f"finished after {len(rows)} rounds; the result is in {result}")
    return Ended(folder.path, rows, result)


def _prompts(data: Any, config: Any, say: Callable[[str], None]) -> tuple[list[Prompt], list[Prompt]]:
    """(to learn from, held out)."""
    prompts, report = read_prompts(data, max_bad_rows=config.max_bad_rows)
    for line in report.lines():
        say(f"prompts: {line}")
    if config.eval_data is not None:
        held_out, _ = read_prompts(config.eval_data, max_bad_rows=config.max_bad_rows)
        return prompts, held_out
    return divide(prompts, config.eval_fraction, config.seed)


@dataclass(frozen=True)
class _Rounds:
    """The work of one folder."""

    path: Path
    model: str
    objective: str
    config: Any
    rewards: Rewards
    selection: Selection
    prompts: list[Prompt]
    held_out: list[Prompt]
    say: Callable[[str], None]

    def run(self, number: int) -> Path:
        """The training run of a round."""
        return self.path / f"round-{number}" / "run"

    def policy(self, number: int) -> str:
        """The policy after round `number`; that of round 0 is where it all started."""
        return str(self.run(number)) if number else self.model

    def all(self) -> list[dict[str, Any]]:
        """Every round, and its line in rounds.jsonl."""
        rows: list[dict[str, Any]] = []
        last = self.judged(0)
        for number in range(1, self.config.rounds + 1):
            row = self.round(number)
            new = self.judged(number)
            if new is not None and last is not None:
                row |= compared(last, new)
            rows.append(row)
            self.write("rounds.jsonl", rows)
            self.say(f"round {number}: {told(row)}")
            last = new
            if row.get("eval/win_rate", 1.0) < self.config.least_win_rate:
                self.say(f"round {number} wins too little over the round before: this was the last")
                break
        return rows

    def round(self, number: int) -> dict[str, Any]:
        """Answers, rewards and training of one round."""
        folder = self.path / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        sampled = self.sample(number - 1, self.prompts, folder / "samples.jsonl", self.config.n)
        scored = folder / "scored.jsonl"
        row = self.score(sampled, scored)
        found = train(
            self.objective, self.policy(number - 1), str(scored), self.run(number), self.settings(number)
        )
        return {"round": number, **row, **{f"train/{k}": v for k, v in found.metrics.items()}}

    def settings(self, number: int) -> TrainConfig:
        """The round's training configuration: the method's own keys."""
        kind = config_for(self.objective)
        given = self.config.model_dump(exclude_unset=True)
        shared = {k: v for k, v in given.items() if k in kind.model_fields and k not in _OURS}
        mine = {name: getattr(self.config, name) for name in _DEFAULTS if name in kind.model_fields}
        return kind.model_validate({**mine, **shared, "seed": self.config.seed + number})

    def sample(self, policy: int, prompts: Sequence[Prompt], file: Path, n: int) -> list[dict[str, Any]]:
        """The rows of `file`: `n` answers of a policy to every prompt."""
        c = self.config
        wanted = [self.selection.asked(prompt, policy, list(self.rewards.parts)) for prompt in prompts]
        asked = GenerateConfig(
            temperature=c.temperature,
            top_p=c.top_p,
            max_tokens=c.max_tokens,
            n=n,
            seed=c.seed + policy,
            batch_size=c.rollout_batch_size,
            dtype=c.dtype,
            mesh=c.mesh,
        )
        answer_file(self.policy(policy), wanted, file, asked)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def score(self, sampled: Sequence[Mapping[str, Any]], file: Path) -> dict[str, Any]:
        """Writes the rows that the round learns from; what the rewards were."""
        values, parts, faults = self.valued(sampled, self.prompts)
        by_id = {prompt.id: prompt for prompt in self.prompts}
        grades, rows = self.grades(parts), list[dict[str, Any]]()
        for i, (row, scores) in enumerate(zip(sampled, values, strict=True)):
            texts = [c["text"] for c in row["completions"]]
            kept = [j for j, text in enumerate(texts) if text.strip() and np.isfinite(scores[j])]
            rows += self.selection(
                Judged(
                    by_id[row["id"]],
                    [texts[j] for j in kept],
                    [float(scores[j]) for j in kept],
                    self.config.seed,
                    [grades[i * len(texts) + j] for j in kept] if grades else (),
                )
            )
        if not any("scores" not in row or len(set(row["scores"])) > 1 for row in rows):
            raise UserError(
                "no prompt has two answers of different reward: there is nothing to learn",
                place=str(file),
                remedy="look at the answers in samples.jsonl; raise temperature or n, or change the rewards",
            )
        _write_lines(file, rows)
        for line in faults.lines():
            self.say(line)
        return _means("reward", values, parts) | {"reward/unscored": int(np.isnan(values).sum())}

    def grades(self, parts: Mapping[str, np.ndarray]) -> list[dict[str, int]]:
        """The levels of all answers, row by row, where the selection has levels."""
        levels = self.selection.levels
        flat = {name: values.ravel() for name, values in parts.items()}
        return graded(flat, levels, self.path / "levels.json") if levels else []

    def valued(
        self, sampled: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], Faults]:
        """(rewards [prompts, n], their parts, what could not be scored)."""
        by_id = {prompt.id: prompt for prompt in prompts}
        answers = [Answer(by_id[r["id"]], c["text"], c["finish"]) for r in sampled for c in r["completions"]]
        faults = Faults()
        found = self.rewards(answers, faults, self.path / MOMENTS)
        shape = (len(sampled), -1)
        return found.total.reshape(shape), {k: v.reshape(shape) for k, v in found.parts.items()}, faults

    def judged(self, number: int) -> dict[str, float] | None:
        """{id: reward} of a policy's answers to the held-out prompts; None where there are none, or no
        rewards."""
        if not self.held_out or not self.rewards.parts:
            return None
        file = self.path / "eval" / f"{number}.jsonl"
        sampled = self.sample(number, self.held_out, file, HELD_OUT_SAMPLES)
        values, _, _ = self.valued(sampled, self.held_out)
        return {row["id"]: float(v) for row, v in zip(sampled, values[:, 0], strict=True) if np.isfinite(v)}

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces a file of lines."""
        _write_lines(self.path / name, rows)


def compared(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    """Mean rewards of two policies on the prompts that both answered, and the share of wins of the new one;
    a tie is half a win."""
    both = [key for key in new if key in old]
    before, after = (np.array([x[key] for key in both]) for x in (old, new))
    wins = float((after > before).mean() + 0.5 * (after == before).mean()) if both else float("nan")
    return {
        "eval/reward_before": float(before.mean()),
        "eval/reward": float(after.mean()),
        "eval/win_rate": wins,
        "eval/prompts": len(both),
    }


def told(row: Mapping[str, Any]) -> str:
    """A round in one line."""
    names = ("reward/mean", "reward/best", "eval/reward_before", "eval/reward", "eval/win_rate")
    return ", ".join(f"{name} {row[name]:.3f}" for name in names if name in row)


def _means(name: str, values: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    known = values[np.isfinite(values).all(axis=1)]
    return {
        f"{name}/mean": float(np.nanmean(values)),
        f"{name}/best": float(known.max(axis=1).mean()) if len(known) else float("nan"),
        f"{name}/std": float(np.nanstd(values)),
        **{f"{name}/{part}": float(np.nanmean(found)) for part, found in parts.items()},
    }


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a JSONL file."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    RunFolder(file.parent).write_text(file.name, lines)


def _keep(path: Path, run: Path) -> Path:
    """Copies the result of the last round's run to where a run has it."""
    for part in ("model", "adapter"):
        if (run / part).is_dir() and distributed.is_first():
            shutil.rmtree(path / part, ignore_errors=True)
            shutil.copytree(run / part, path / part)
    distributed.wait_for_all("the result is copied")
    return next(path / part for part in ("model", "adapter") if (path / part).is_dir())


_DEFAULTS: dict[str, Any] = {"epochs": 1.0, "pairs": "best_vs_worst"}
# Keys that mean something else to the rounds than to the training in them.
_OURS = {"eval_data", "eval_fraction", "seed"}


def _method(name: str, about: str, objective: str, selection: Any = Everything, **defaults: Any) -> Method:
    offline, own = config_for(objective), selection.model_fields
    known = RoundsConfig.model_fields | offline.model_fields | own
    fields: dict[str, Any] = {k: (info.annotation, info) for k, info in own.items()}
    for key, default in {**_DEFAULTS, **defaults}.items():
        if key in known:
            info = copy(known[key])  # with its bounds
            info.default = default
            fields[key] = (info.annotation, info)
    config = create_model(f"{name}_config", __base__=(RoundsConfig, offline), __doc__=about, **fields)
    return Method(cast(Any, config), partial(iterate, name, objective, selection, say=_say), objective)


def _say(text: str) -> None:
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


ITERATIVE_DPO = _method(
    "iterative_dpo",
    "Rounds of DPO: best against worst of the policy's own answers, the policy itself the reference.",
    "dpo",
)
RAFT = _method(
    "raft", "Rounds of SFT on the best of the policy's own answers (RAFT, arXiv:2304.06767).", "sft"
)
STEERLM = _method(
    "steerlm",
    "Rounds of SFT on the policy's own answers, each with the levels of its rewards in the prompt; then the "
    "highest are asked for (SteerLM, arXiv:2310.05344).",
    "sft",
    Conditioned,
    rounds=2,
)
SPPO = _method(
    "sppo",
    "Self-play preference optimisation (arXiv:2405.00675): rounds of its loss on best against worst.",
    "sppo_hard",
    n=5,
)
SPIN = _method(
    "spin",
    "Self-play (SPIN, arXiv:2401.01335): the rows' own answers against the policy's; needs no rewards.",
    "dpo",
    AgainstRow,
    n=1,
)
RSO = _method(
    "rso",
    "Statistical rejection sampling (RSO, arXiv:2309.06657): pairs of what the best policy would answer.",
    "hinge",
    RejectionSampled,
    rounds=1,
    n=64,
    pairs="all_pairs",
)
RS_DPO = _method(
    "rs_dpo",
    "DPO on every pair of answers whose preference is clear (RS-DPO, arXiv:2402.10038).",
    "dpo",
    ClearPairs,
    rounds=1,
    n=16,
)
