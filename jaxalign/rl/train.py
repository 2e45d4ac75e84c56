"""A run that learns from rewards: what `train.run` is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer
from jaxalign.errors import UserError
from jaxalign.models.decoder import Model
from jaxalign.rl.lagrange import Lagrange, build_lagrange
from jaxalign.rl.limits import check_limits
from jaxalign.rl.online import Eyes, Rollouts, Sampler, evaluator, total_steps, updates
from jaxalign.rl.prompts import Prompts, read_asked
from jaxalign.rl.rewards import Rewards, build_rewards
from jaxalign.rl.rollout import Roller, Settings
from jaxalign.train import feed
from jaxalign.train.assemble import Machine
from jaxalign.train.feed import Direct
from jaxalign.train.flops import Work, work_of
from jaxalign.train.folder import RunFolder
from jaxalign.train.inputs import read_examples
from jaxalign.train.loop import Parties
from jaxalign.train.metrics import Screen
from jaxalign.train.programs import Programs
from jaxalign.train.run import RunResult, train
from jaxalign.train.settings import digest
from jaxalign.train.state import TrainState
from jaxalign.types import Batch, Example

Say = Callable[[str], None]


def train_online(
    name: str, objective: Any, estimator: Any, model: str, data: Any, out: str | Path, config: Any
) -> RunResult:
    """Trains `model` on the prompts of `data` by the method `name`: `objective` and `estimator` are its
    classes. Raises `UserError` as `train` does."""
    return train(name, model, data, out, config, partial(_open, objective, estimator))


def _open(
    objective: Any, estimator: Any, method: str, data: Any, config: Any, tokenizer: Tokenizer, say: Say
) -> Online:
    own = lambda kind: kind(**{name: getattr(config, name) for name in kind.model_fields})  # noqa: E731
    rewards, lagrange = build_rewards(config), build_lagrange(config)
    if distributed.process_count() > 1:
        raise UserError("sampling while training works in one process", remedy="start one process")
    if config.reference.mode == "precomputed":
        raise UserError(
            "answers that are still to be sampled have no log-probs yet",
            place="reference.mode",
            remedy="leave it out",
        )
    loss = own(objective)
    check_limits(config, loss.needs)
    prompts = read_asked(data, tokenizer, config, say)
    beside = getattr(loss, "ptx_data", None)
    rows = read_examples(beside, tokenizer, config, say, "ptx_data") if beside else []
    return Online(config, loss, own(estimator), rewards, prompts, tokenizer, say, rows, lagrange)


@dataclass(frozen=True)
class Online:
    """The lesson of a method that samples; see `train.lesson.Lesson`."""

    config: Any
    objective: Any
    estimator: Any
    rewards: Rewards
    prompts: Prompts
    tokenizer: Tokenizer
    say: Say
    rows: list[Example] = field(default_factory=list)  # of ptx_data
    lagrange: Lagrange | None = None
    rollouts: Rollouts | None = field(default=None, repr=False)
    begins: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Updates of the run."""
        return total_steps(self.config, len(self.prompts.learned))

    @property
    def epoch(self) -> float:
        """Updates of one pass over the prompts."""
        c = self.config
        return len(self.prompts.learned) / ((c.batch_size or 1) * c.minibatches) * updates(c)

    @property
    def report(self) -> dict[str, Any]:
        """What became of the prompts."""
        return {"prompts": self.prompts.report, "held_out": len(self.prompts.held_out)}

    @property
    def identity(self) -> dict[str, Any]:
        """The prompts, by their tokens."""
        asked = [a.tokens for a in self.prompts.learned]
        return {"fingerprint": digest({"prompts": asked}), "prompts": len(asked)}

    def check(self, model: Model) -> None:
        """Raises `UserError` where prompt and answer do not fit into the model."""
        shape, adapter = model.config, model.adapter
        longest = max(len(a.tokens) for a in (*self.prompts.learned, *self.prompts.held_out))
        room = shape.max_positions - (adapter.virtual if adapter else 0) - self.config.max_tokens
        if longest > room:
            raise UserError(
                f"a prompt of {longest} tokens and max_tokens={self.config.max_tokens} pass the model's "
                f"{shape.max_positions} positions",
                place="max_tokens",
                remedy="lower max_tokens, or max_length to leave long prompts out",
            )

    def ready(self, machine: Machine, folder: RunFolder) -> Online:
        """With what makes rollouts."""
        c: Any = machine.config
        pad_id = self.tokenizer.pad_id
        settings = Settings(**{name: getattr(c, name) for name in Settings.__dataclass_fields__})
        warmup = getattr(c, "critic_warmup", 0)
        parts = (self.rewards, self.estimator, self.say, warmup, self.lagrange)
        roller = Roller(folder.path / "rollouts", settings, *parts)
        sampler = Sampler(machine, self.tokenizer, c.rollout_batch_size)
        rows = -(-(c.batch_size or 1) // c.grad_accumulation)
        rollouts = Rollouts(
            machine, self.prompts, roller, sampler, Eyes(machine, rows, pad_id), pad_id, self.rows
        )
        return replace(self, rollouts=rollouts, config=c)

    def abstract(self) -> list[Batch]:
        """The largest batch that can come."""
        return self._rollouts.abstract()

    def parties(self, programs: Programs, common: dict[str, Any]) -> tuple[Parties, list[Programs]]:
        """Batches are made when their step is due: of a rollout of the policy as it is then."""
        rollouts = self._rollouts
        machine = rollouts.machine
        windows, base = machine.layer_windows, machine.weights.base

        def begin(state: TrainState) -> None:
            rollouts.state = state

        def make(step: int) -> tuple[Batch, Work]:
            host = rollouts.batch(step)
            return feed.place(host, machine.mesh), work_of(host, windows)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
            state, metrics = programs(state, base, batch)
            rollouts.state, told = state, rollouts.fresh
            rollouts.fresh = {}
            return state, {**metrics, **told}

        held_out = self.prompts.held_out
        found = Parties(
            step=step,
            make=make,
            rows=rollouts.ids,
            evaluate=evaluator(rollouts, self.rewards, self.say) if held_out else None,
            begin=begin,
            feed=Direct,
            **common,
        )
        return found, []

    def lines(self, start: int) -> list[str]:
        """How long the run is, and what a rollout holds."""
        c, each = self.config, updates(self.config)
        size = (c.batch_size or 1) * c.minibatches
        return [
            f"run: {self.total} updates of {c.batch_size} prompts, {c.n} answers to each; "
            f"{math.ceil(self.total / each)} rollouts of {size} prompts, {each} updates on each"
        ]

    def tell(self, step: int, screen: Screen) -> None:
        """Nothing begins."""

    @property
    def _rollouts(self) -> Rollouts:
        assert self.rollouts is not None, "`ready` comes first"
        return self.rollouts
