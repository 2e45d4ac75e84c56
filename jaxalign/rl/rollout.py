"""Rollouts: the policy answers some prompts, the answers are judged, and what updates need is worked out.

    rollouts/00003.jsonl   the answers, a line each, written as they finish
    rollouts/00003.npz     the same as token arrays with log-probs and advantages, and the metrics

A rollout whose files are there is not made again: a killed run goes on within it.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.rl.advantages import adapted
from jaxalign.rl.estimators import Estimator, Judged, watched
from jaxalign.rl.lagrange import WINDOW, Lagrange, mixed, with_costs
from jaxalign.rl.prompts import Asked
from jaxalign.rl.rewards import Answer, Faults, Rewards, Scored
from jaxalign.types import Example, Group, SamplingParams

Sampling = Callable[
    [Sequence[list[int]], Sequence[SamplingParams]], Iterator[tuple[int, int, Any]]
]  # prompts and how each is answered -> (prompt, sample, `Sample`) as they finish
# Groups -> [n, T] by name: `old`, and `ref` and `value` where they are wanted. None: the sampler's own
# log-probs will do, as one update follows and nothing is compared with.
Look = Callable[[Sequence[Group]], list[dict[str, np.ndarray]]] | None


@dataclass(frozen=True)
class Told:
    """One sampled answer; `logp` float32 [T] is that of its tokens under the distribution they are from."""

    tokens: np.ndarray
    logp: np.ndarray
    text: str
    finish: str


@dataclass(frozen=True)
class Rollout:
    """Groups of answers ready for updates, one a prompt, and what is to be logged of them."""

    groups: list[Group]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What a rollout needs to know of the run's configuration."""

    n: int
    temperature: float
    max_tokens: int
    seed: int
    kl_coef: float
    kl: str
    kl_target: float | None
    kl_horizon: int


@dataclass(frozen=True)
class Roller:
    """Makes rollouts in `folder`. `say` is told what could not be scored."""

    folder: Path
    settings: Settings
    rewards: Rewards
    estimator: Estimator
    say: Callable[[str], None]
    critic_warmup: int = 0
    lagrange: Lagrange | None = None

    def __call__(self, number: int, asked: Sequence[Asked], sample: Sampling, look: Look) -> Rollout:
        """Rollout `number`, counted from 0, over `asked`. Raises `UserError` where rewards fail."""
        file = self.folder / f"{number:05}.npz"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make(number, asked, sample, look, file)
        found = _read(file, asked)
        aux = {
            "max_tokens": float(self.settings.max_tokens),
            "policy_weight": float(number >= self.critic_warmup),
        }
        return replace(found, groups=[replace(group, aux=aux) for group in found.groups])

    def metrics(self, number: int) -> dict[str, float]:
        """What is to be logged of a rollout that was made."""
        with np.load(self.folder / f"{number:05}.npz") as saved:
            return json.loads(str(saved["metrics"]))

    def _make(self, number: int, asked: Sequence[Asked], sample: Sampling, look: Look, file: Path) -> None:
        marks = [time.perf_counter()]
        answers = self._sampled(number, asked, sample, file.with_suffix(".jsonl"))
        marks.append(time.perf_counter())
        scored, metrics = self._rewarded(number, asked, answers)
        marks.append(time.perf_counter())
        learned = [told[: self.settings.n] for told in answers]
        judged, groups = self._judged(asked, learned, scored, look)
        coef, kl = self._coef(number), self.settings.kl
        whole, multiplier = judged, math.exp(metrics.get(LOG_MULTIPLIER, -math.inf))
        if judged.cost is None:
            arrays = self.estimator(judged, coef, kl)
        else:
            arrays = with_costs(self.estimator, judged, coef, kl, multiplier)
            whole = replace(judged, reward=mixed(judged.reward, judged.cost, multiplier))
        arrays |= _kept(judged) if look else {}
        marks.append(time.perf_counter())
        metrics |= watched(judged, coef, kl) | _lengths(learned)
        metrics |= {"objective/kl_coef": coef}
        names = ("time/sampling_s", "time/rewards_s", "time/log_probs_s")
        metrics |= dict(zip(names, np.diff(marks).tolist(), strict=True))
        order = self.estimator.order(whole)
        if order is not None:
            metrics["frac_without_pair"] = float((order < 0).any(axis=1).mean())
            groups, arrays = _ordered(groups, arrays, order)
        _write(file, groups, arrays, metrics, judged.cost)

    def _sampled(self, number: int, asked: Sequence[Asked], sample: Sampling, file: Path) -> list[list[Told]]:
        """n answers to every prompt, and a greedy one after them where the estimator wants it."""
        s, greedy = self.settings, self.estimator.greedy
        answers: list[list[Told | None]] = [[None] * (s.n + greedy) for _ in asked]
        for line in _lines(file):
            tokens, logp = np.array(line["tokens"], np.int32), np.array(line["logp"], np.float32)
            told = Told(tokens, logp, line["text"], line["finish"])
            answers[line["prompt"]][line["sample"]] = told
        wanted, params, places = [], [], []
        for i, row in enumerate(answers):
            # Where one answer is missing all are drawn again: they are a function of the seed.
            if None in row[: s.n]:
                seed = zlib.crc32(f"{s.seed} {number} {i} {asked[i].prompt.id}".encode())
                params.append(SamplingParams(s.temperature, max_tokens=s.max_tokens, n=s.n, seed=seed))
                wanted.append(asked[i].tokens)
                places.append((i, 0))
            if greedy and row[-1] is None:
                params.append(SamplingParams(0.0, max_tokens=s.max_tokens))
                wanted.append(asked[i].tokens)
                places.append((i, s.n))
        with file.open("a", encoding="utf-8") as out:
            for request, index, found in sample(wanted, params) if wanted else ():
                i, first = places[request]
                if answers[i][first + index] is None:
                    told = Told(found.tokens, found.sample_logp, found.text, found.finish)
                    answers[i][first + index] = told
                    out.write(json.dumps(_line(i, first + index, asked[i], found), ensure_ascii=False) + "\n")
                    out.flush()
        return answers  # type: ignore[return-value]  # none is missing now

    def _rewarded(
        self, number: int, asked: Sequence[Asked], answers: Sequence[Sequence[Told]]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """({`reward` [P, n], `baseline` [P] of the greedy answers, and the same of costs}, metrics)."""
        flat = [
            Answer(a.prompt, t.text, t.finish) for a, row in zip(asked, answers, strict=True) for t in row
        ]
        faults, n = Faults(), self.settings.n
        found = self.rewards(flat, faults, self.folder / MOMENTS)
        metrics = self._means("rewards", found)
        total, more = found.total.reshape(len(asked), -1), {}
        if self.lagrange:
            cost = self.lagrange.costs(flat, faults)
            spent = cost.total.reshape(total.shape)
            total = np.where(np.isfinite(spent), total, np.nan)
            before = self.metrics(number - 1).get(LOG_MULTIPLIER) if number else None
            log = self.lagrange.log_multiplier(number, before, [*self._spent(number), spent[:, :n]])
            metrics |= self._means("costs", cost) | {LOG_MULTIPLIER: log}
            metrics["lagrange/multiplier"] = math.exp(log)
            metrics["objective/costs"] = float(np.nanmean(spent[:, :n]))
            more = {"cost": spent[:, :n], "cost_baseline": spent[:, -1]}
        for line in faults.lines():
            self.say(line)
        metrics["rewards/unscored"] = float(np.isnan(total[:, :n]).sum())
        every = {"reward": total[:, :n], "baseline": total[:, -1], **more}
        greedy = self.estimator.greedy
        return {k: v for k, v in every.items() if greedy or not k.endswith("baseline")}, metrics

    def _means(self, kind: str, found: Scored) -> dict[str, float]:
        """The mean of each part over the drawn answers."""
        n, size = self.settings.n, self.settings.n + self.estimator.greedy
        return {
            f"{kind}/{name}": float(np.nanmean(v.reshape(-1, size)[:, :n])) for name, v in found.parts.items()
        }

    def _spent(self, number: int) -> list[np.ndarray]:
        """The costs of the answers of the newest rollouts before this one."""
        found: list[np.ndarray] = []
        while number and sum(x.size for x in found) < WINDOW:
            number -= 1
            with np.load(self.folder / f"{number:05}.npz") as saved:
                found.insert(0, saved["costs"])
        return found

    def _judged(
        self,
        asked: Sequence[Asked],
        answers: Sequence[Sequence[Told]],
        scored: Mapping[str, np.ndarray],
        look: Look,
    ) -> tuple[Judged, list[Group]]:
        groups = [
            _group(i, a, row, np.isfinite(scored["reward"][i]))
            for i, (a, row) in enumerate(zip(asked, answers, strict=True))
        ]
        width = max(len(m.tokens) for g in groups for m in g.members)
        shape = (len(groups), self.settings.n, width)
        found = look(groups) if look else [_own(a, row) for a, row in zip(asked, answers, strict=True)]
        arrays = {name: np.zeros(shape, np.float64) for name in found[0]}
        mask = np.zeros(shape, bool)
        for i, (group, values) in enumerate(zip(groups, found, strict=True)):
            for g, member in enumerate(group.members):
                size = len(member.tokens)
                mask[i, g, :size] = member.mask
                for name, array in arrays.items():
                    array[i, g, :size] = np.where(member.mask, values[name][g, :size], 0.0)
        return Judged(mask=mask, **scored, **arrays), groups

    def _coef(self, number: int) -> float:
        """The weight of the KL in the rewards: fixed, or moved after every rollout towards `kl_target`."""
        s = self.settings
        if not s.kl_target or not number:
            return s.kl_coef
        before = self.metrics(number - 1)
        return adapted(
            before["objective/kl_coef"],
            before["objective/kl"],
            int(before["completions/count"]),
            target=s.kl_target,
            horizon=s.kl_horizon,
        )


def _ordered(
    groups: Sequence[Group], arrays: dict[str, np.ndarray], order: np.ndarray
) -> tuple[list[Group], dict[str, np.ndarray]]:
    """The answers that `order` [P, G] names; those of a row of -1 are no targets."""
    rows = np.maximum(order, 0)
    found = []
    for group, row, taken in zip(groups, rows, order >= 0, strict=True):
        members = [group.members[i] for i in row]
        kept = tuple(replace(m, mask=m.mask & bool(t)) for m, t in zip(members, taken, strict=True))
        found.append(replace(group, members=kept))
    return found, {name: np.take_along_axis(x, rows[:, :, None], axis=1) for name, x in arrays.items()}


def _group(index: int, asked: Asked, answers: Sequence[Told], scored: np.ndarray) -> Group:
    """The answers to one prompt; those without a reward are no targets."""
    prompt = np.asarray(asked.tokens, np.int32)

    def member(told: Told, known: bool) -> Example:
        tokens = np.concatenate([prompt, told.tokens.astype(np.int32)])
        return Example(asked.prompt.id, tokens, (np.arange(len(tokens)) >= len(prompt)) & known)

    members = tuple(member(t, bool(k)) for t, k in zip(answers, scored, strict=True))
    return Group(f"{index}:{asked.prompt.id}", members)


def _own(asked: Asked, answers: Sequence[Told]) -> dict[str, np.ndarray]:
    """The sampler's log-probs of the answers, laid out like their tokens."""
    width = len(asked.tokens) + max(len(told.tokens) for told in answers)
    out = np.zeros((len(answers), width), np.float32)
    for g, told in enumerate(answers):
        out[g, len(asked.tokens) : len(asked.tokens) + len(told.tokens)] = told.logp
    return {"old": out}


def _line(prompt: int, sample: int, asked: Asked, found: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "id": asked.prompt.id,
        "sample": sample,
        "text": found.text,
        "finish": found.finish,
        "tokens": found.tokens.tolist(),
        "logp": [round(float(x), 5) for x in found.sample_logp],
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a half written last one is cut off."""
    if not file.exists():
        return []
    blob = file.read_bytes()
    whole = blob.rfind(b"\n") + 1
    if whole < len(blob):
        os.truncate(file, whole)
    return [json.loads(line) for line in blob[:whole].splitlines()]


def _kept(judged: Judged) -> dict[str, np.ndarray]:
    """What updates need besides advantages."""
    kept = {"old": judged.old}
    kept |= {} if judged.ref is None else {"ref": judged.ref}
    kept |= {} if judged.value is None else {"value_old": judged.value}
    return kept | ({} if judged.cost_value is None else {"cost_value_old": judged.cost_value})


def _lengths(answers: Sequence[Sequence[Told]]) -> dict[str, float]:
    lengths = np.array([len(told.tokens) for row in answers for told in row])
    cut = np.array([told.finish == "length" for row in answers for told in row])
    return {
        "completions/count": float(lengths.size),
        "completions/mean_length": float(lengths.mean()),
        "completions/p95_length": float(np.percentile(lengths, 95)),
        "completions/clipped_ratio": float(cut.mean()),
        "val/num_eos": float((~cut).sum()),
    }


def _write(
    file: Path,
    groups: Sequence[Group],
    arrays: dict[str, np.ndarray],
    metrics: dict[str, float],
    costs: np.ndarray | None,
) -> None:
    """One file, whole or not at all: token arrays end to end, in the order of the answers."""
    members = [(i, g, m) for i, group in enumerate(groups) for g, m in enumerate(group.members)]
    flat = {
        name: np.concatenate([values[i, g, : len(m.tokens)] for i, g, m in members]).astype(np.float32)
        for name, values in arrays.items()
    }
    draft = file.with_suffix(".tmp.npz")
    held: dict[str, Any] = {
        "metrics": json.dumps(metrics),
        "sizes": [len(m.tokens) for _, _, m in members],
        "tokens": np.concatenate([m.tokens for _, _, m in members]),
        "mask": np.concatenate([m.mask for _, _, m in members]),
        **{f"aux_{name}": values for name, values in flat.items()},
        **({} if costs is None else {"costs": costs}),
    }
    np.savez(draft, **held)
    os.replace(draft, file)


def _read(file: Path, asked: Sequence[Asked]) -> Rollout:
    """The rollout that `_write` put into a file. Raises `UserError` where it is not of these prompts."""
    with np.load(file) as saved:
        metrics, sizes = json.loads(str(saved["metrics"])), saved["sizes"]
        ends = np.cumsum(sizes)[:-1]
        cut = {name: np.split(saved[name], ends) for name in saved.files if name not in _SCALARS}
    n = len(sizes) // len(asked)
    if len(sizes) % len(asked) or any(
        cut["tokens"][i * n][: len(a.tokens)].tolist() != a.tokens for i, a in enumerate(asked)
    ):
        raise UserError(
            "this rollout answers other prompts than the run's",
            place=str(file),
            remedy="go on with the data that the run began with, or choose another output folder",
        )
    names = [name for name in cut if name.startswith("aux_")]
    groups = []
    for i, a in enumerate(asked):
        members = tuple(
            Example(
                a.prompt.id,
                cut["tokens"][k],
                cut["mask"][k],
                aux={name.removeprefix("aux_"): cut[name][k] for name in names},
            )
            for k in range(i * n, (i + 1) * n)
        )
        groups.append(Group(f"{i}:{a.prompt.id}", members))
    return Rollout(groups, metrics)


MOMENTS = "moments.json"  # of the rewards of the first rollout
LOG_MULTIPLIER = "lagrange/log_multiplier"
_SCALARS = ("metrics", "sizes", "costs")
