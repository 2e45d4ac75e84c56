"""Contender: jaxalign's GRPO, put together as `jaxalign train grpo` puts it together.

No token ends an answer, so that each gets the forced number of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import batches, jax_common, jax_loop, reward
from benchmarks.protocol import Channel
from jaxalign.data.chat import load_tokenizer
from jaxalign.data.order import Shuffled
from jaxalign.data.records import Prompt
from jaxalign.distributed import keep_freed_memory
from jaxalign.objectives.policy import ClippedPolicy
from jaxalign.rl.estimators import GroupRelative
from jaxalign.rl.methods import GRPO
from jaxalign.rl.prompts import Asked, Prompts
from jaxalign.rl.rewards import build_rewards
from jaxalign.rl.train import Online
from jaxalign.train.assemble import Machine, Weights
from jaxalign.train.feed import abstract
from jaxalign.train.folder import RunFolder
from jaxalign.train.programs import COMPILATIONS

SCORING = ("time/rewards_s", "time/log_probs_s")


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `jax_loop.run`. The rollouts' files lie in a folder that goes with the process."""
    with tempfile.TemporaryDirectory() as folder:
        jax_loop.run(job, channel, partial(make, folder=Path(folder)))


def make(job: Mapping[str, Any], mesh: Any, folder: Path) -> Loop:
    """Weights, prompts and the loop."""
    steps = batches.load(job["batches"])
    settings = config(job, steps)
    weights = endless(jax_loop.load(job, mesh, settings))
    own = lambda kind: kind(**{name: getattr(settings, name) for name in kind.model_fields})  # noqa: E731
    loss, estimator, rewards = own(ClippedPolicy), own(GroupRelative), build_rewards(settings)
    prompts = Prompts(asked(steps, settings.seed), [])
    online = Online(settings, loss, estimator, rewards, prompts, tokenizer(job), jax_common.say)
    online.check(weights.model)
    # The number of steps shapes the schedule alone, and that is constant.
    machine = Machine(weights, loss, mesh, settings, 10**6, jax_common.say)
    return Loop(machine, online.ready(machine, RunFolder(folder)))


def config(job: Mapping[str, Any], steps: batches.Steps) -> Any:
    """AdamW, constant rate and clipping as every contender; the model without its adapter as reference."""
    _, prompts, length = steps.tokens.shape
    return GRPO.config.model_validate(
        {
            "dtype": job["precision"],
            "learning_rate": job["learning_rate"],
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "grad_clip": job["clip"],
            "batch_size": prompts,
            "n": job["answers"],
            "rollout_batch_size": prompts * job["answers"],  # all at once, as TRL
            "max_tokens": job["new_tokens"],
            "max_length": length + job["new_tokens"],
            "temperature": 1.0,
            "beta": job["beta"],
            "reference": {"mode": "adapter_off"},
            "rewards": {"characters": reward.characters},
            "share_prompt": not job.get("apart"),
        }
    )


def endless(weights: Weights) -> Weights:
    """The weights of a model that nothing ends an answer of."""
    return replace(weights, loaded=replace(weights.loaded, stop_tokens=()))


@dataclass(frozen=True)
class Numbers:
    """In place of the tokenizer that a random model has not: ids written as numbers."""

    pad_id: int = 0
    stop_tokens: tuple[int, ...] = ()

    def decode(self, ids: Sequence[int]) -> str:
        """The ids with spaces between."""
        return " ".join(map(str, ids))


def tokenizer(job: Mapping[str, Any]) -> Any:
    """The tokenizer of the folder, or numbers for a random model. It stops nowhere."""
    if not (Path(job["folder"]) / "tokenizer.json").exists():
        return Numbers()
    return replace(load_tokenizer(jax_common.source(job)), stop_tokens=())


def asked(steps: batches.Steps, seed: int) -> list[Asked]:
    """The prompts, so laid that a run with this seed takes those of step i for its rollout i."""
    count, size, length = steps.tokens.shape
    order = Shuffled(np.arange(count * size), size, seed)
    places = np.concatenate([order.at(index) for index in range(count)])
    flat = steps.tokens.reshape(-1, length)
    return [Asked(Prompt(str(i), None, "", {}), flat[i].tolist()) for i in np.argsort(places)]


class Loop:
    """State, the compiled update, and which rollout comes next."""

    def __init__(self, machine: Machine, online: Online) -> None:
        self.machine, self.online, self.at = machine, online, 0

    def compile(self) -> Any:
        """Makes the update and the state; what samples is compiled by the first rollout."""
        machine = self.machine
        shapes = [abstract(batch, machine.mesh) for batch in self.online.abstract()]
        programs = machine.train_programs(shapes)
        self.parties, _ = self.online.parties(programs, {"parts": machine.parts})
        self.state = machine.new_state()
        jax.block_until_ready(self.state)
        self.parties.begin(self.state)
        keep_freed_memory(programs.temporary)
        return programs.prepare(machine.abstract_state, machine.weights.base, shapes[-1])

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`steps` times a rollout, its scoring and an update."""
        before, told = COMPILATIONS.count, []
        for index in range(self.at, self.at + message["steps"]):
            batch, _ = self.parties.make(index)
            self.state, metrics = self.parties.step(self.state, batch)
            jax.block_until_ready(self.state)  # the next rollout needs it at once
            told.append({name: float(value) for name, value in jax.device_get(metrics).items()})
        self.at += message["steps"]
        return {**self.summary(told), **jax_common.compiled(before), **jax_common.device_peak()}

    def summary(self, told: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What a round tells of its steps: see `trl_grpo.Trainer.tell`."""
        answers = self.online.config.batch_size * self.online.config.n
        total = lambda *names: sum(step[name] for step in told for name in names)  # noqa: E731
        last = told[-1]
        return {
            "losses": [step["loss"] for step in told],
            "tokens": round(answers * total("completions/mean_length")),
            "trained": round(total("num_targets")),
            "rollout_s": total("time/sampling_s"),
            "score_s": total(*SCORING),
            "entropy": last["policy/entropy"],
            "idle": last["frac_reward_zero_std"],
            "ratio": last["val/ratio"],
        }
