"""Methods that learn from rewards of their own answers: rollout, advantages, updates, and again.

A rollout is a small data set: its groups are batched by `BatchSource` like any others, for `rollout_epochs`
passes of `minibatches` updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import distributed
from jaxalign.data.batching import BatchSource
from jaxalign.data.chat import Tokenizer
from jaxalign.data.order import Shuffled
from jaxalign.data.rows import arrange, in_blocks
from jaxalign.rl.prompts import Asked, Prompts
from jaxalign.rl.rewards import Answer, Faults, Rewards
from jaxalign.rl.rollout import MOMENTS, Roller
from jaxalign.sampling.engine import Engine
from jaxalign.sharding import data_shards
from jaxalign.train.assemble import Machine
from jaxalign.train.loop import Ended
from jaxalign.train.passes import each_item
from jaxalign.train.score import score, values
from jaxalign.train.state import TrainState
from jaxalign.train.step import VALUES
from jaxalign.types import Batch, Example, Group, Params, SamplingParams

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sampler:
    """The policy as an engine: new weights, the same programs."""

    machine: Machine
    tokenizer: Tokenizer
    slots: int

    def engine(self, params: Params) -> Engine:
        """An engine over the weights that train, as they are now."""
        weights, mesh = self.machine.weights, self.machine.mesh
        trunk, _ = weights.split(params)
        base = self._cast(trunk) if weights.full else self._deploy(trunk, weights.base)
        loaded = weights.loaded
        return Engine(
            weights.model.deployed,
            base,
            decode=self.tokenizer.decode,
            stop_tokens=tuple(dict.fromkeys((*loaded.stop_tokens, *self.tokenizer.stop_tokens))),
            slots=self.slots,
            shards=data_shards(mesh),
        )

    @cached_property
    def _deploy(self) -> Callable[..., Params]:
        return jax.jit(self.machine.weights.model.deploy)

    @cached_property
    def _cast(self) -> Callable[[Params], Params]:
        compute = self.machine.weights.model.numerics.compute
        return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(compute), tree))


@dataclass(frozen=True)
class Eyes:
    """Forward passes over answers that were sampled: what the policy, the reference and the critic say."""

    machine: Machine
    rows: int
    pad_id: int

    def __call__(self, state: TrainState, groups: Sequence[Group]) -> list[dict[str, np.ndarray]]:
        """float32 [n, T] of every group, by name: `old`, and `ref` and `value` where the method has them."""
        machine = self.machine
        forward = partial(self._compiled, state.params, state.reference, machine.weights.base)
        found = each_item(
            groups,
            forward,
            mesh=machine.mesh,
            rows=self.rows,
            max_length=machine.config.max_length,
            pad_id=self.pad_id,
            what="log-probs",
        )
        return [dict(zip(self.names, np.moveaxis(x, -1, 0), strict=True)) for x in found]

    @property
    def names(self) -> tuple[str, ...]:
        """What it sees."""
        objective = self.machine.objective
        ref = ("ref",) if "ref" in objective.needs else ()
        return ("old", *ref, *(VALUES[: objective.heads] if objective.kind == "actor_critic" else ()))

    @cached_property
    def _compiled(self) -> Callable[..., jax.Array]:
        """[B, G, T, names] of a whole batch, on every process."""
        machine, names = self.machine, self.names
        weights, model = machine.weights, machine.weights.model
        forward = partial(
            score, model, compact=machine.mesh.size == 1, temperature=machine.objective.softness
        )

        def look(params: Params, reference: Params | None, base: Params, batch: Batch) -> jax.Array:
            def over(tree: Params | None) -> tuple[Params | None, Params]:
                return (None, tree) if weights.full and tree is not None else (tree, base)

            trunk, _ = weights.split(params)
            found = {"old": forward(*over(trunk), batch).logp}
            if "ref" in names:
                start = None if reference is None else weights.split(reference)[0]
                found["ref"] = forward(*over(start), batch).logp
            if "value" in names:
                critic = values(model, params["critic"], base, params["head"], batch)
                found |= {name: critic[..., i] for i, name in enumerate(VALUES) if name in names}
            return jnp.stack([found[name] for name in names], axis=-1)

        return jax.jit(look, out_shardings=NamedSharding(machine.mesh, PartitionSpec()))


@dataclass
class Rollouts:
    """Batches by step number. A rollout is made when its first step is due, by the policy of `state`."""

    machine: Machine
    prompts: Prompts
    roller: Roller
    sampler: Sampler
    eyes: Eyes
    pad_id: int
    rows: Sequence[Example] = ()  # to fine-tune on beside the answers
    state: TrainState | None = None
    fresh: dict[str, float] = field(default_factory=dict)  # metrics of a rollout that no step has told yet
    sound: Params | None = None  # of the last rollout within `limits`
    _current: tuple[int, BatchSource | None] = (-1, None)

    def batch(self, step: int) -> Batch:
        """The micro-batches of one update [A, B, G, T]."""
        number, index = divmod(step, updates(self.machine.config))
        return self._source(number).batch(index)

    def ids(self, step: int) -> list[str]:
        """The prompts of an update."""
        number, index = divmod(step, updates(self.machine.config))
        return self._source(number).ids(index)

    def _source(self, number: int) -> BatchSource:
        known, source = self._current
        if known != number or source is None:
            source = self._made(number)
            self._current = (number, source)
        return source

    def _made(self, number: int) -> BatchSource:
        c, objective = self._config, self.machine.objective
        assert self.state is not None, "the loop gives the state before it asks for a batch"
        state = self.state

        def sample(prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Any:
            return self.sampler.engine(state.params).stream(prompts, params)

        look = partial(self.eyes, state) if looks(self.machine) else None
        rollout = self.roller(number, self.asked(number), sample, look)
        self.fresh = dict(rollout.metrics)
        self._check(number, rollout.metrics)
        groups = rollout.groups if self._together else _apart(rollout.groups)
        per = len(groups) // len(rollout.groups)
        if self.rows:
            order = Shuffled(np.arange(len(self.rows)), len(groups), c.seed)
            rows = [self.rows[i] for i in order.at(number)]
            groups = [self._beside(group, row) for group, row in zip(groups, rows, strict=True)]
        return BatchSource(
            groups,
            batch_size=(c.batch_size or 1) * per,
            accumulation=c.grad_accumulation,
            max_length=c.max_length,
            group=objective.group,
            share=c.share_prompt and self._together,
            seed=c.seed + number,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
            pad_id=self.pad_id,
            blocks=data_shards(self.machine.mesh),
            apart=True,  # every rollout has rows of its own, and should need no programs of its own
        )

    def _beside(self, group: Group, row: Example) -> Group:
        """The answer with a row to fine-tune on."""
        nothing = {name: np.zeros(len(row.tokens), np.float32) for name in self.token_aux}
        return replace(group, members=(*group.members, replace(row, aux=nothing)))

    @property
    def _together(self) -> bool:
        """Whether the answers to a prompt are one group; else each of them is one."""
        return self.machine.objective.group - bool(self.rows) != 1

    @property
    def _config(self) -> Any:
        """Of the method's own class."""
        return self.machine.config

    def asked(self, number: int) -> list[Asked]:
        """The prompts of a rollout: epoch after epoch, each in its own order."""
        c = self._config
        order = Shuffled(np.arange(len(self.prompts.learned)), (c.batch_size or 1) * c.minibatches, c.seed)
        return [self.prompts.learned[i] for i in order.at(number)]

    def _check(self, number: int, metrics: dict[str, float]) -> None:
        """Raises `Ended` where the rollout is beyond a limit; else its policy is kept to go back to."""
        limits = self._config.limits
        if not limits.any:
            return
        found = limits.passed(self.roller.metrics(0), metrics)
        sound = self.sound
        if found and sound is None:
            raise Ended(f"{found}; the policy before it is not known any more, this is the result", _itself)
        if found:
            raise Ended(found, lambda state: replace(state, params=sound))
        # A copy: the step takes the state's own arrays.
        self.sound = jax.tree.map(jnp.copy, self.state.params) if self.state else None

    def abstract(self) -> list[Batch]:
        """The largest batch that can come, as shapes."""
        c, objective = self._config, self.machine.objective
        n = (objective.group or c.n) if self._together else 1
        prompt = max(len(a.tokens) for a in self.prompts.learned)
        tokens = np.zeros(prompt + c.max_tokens, np.int32)
        tokens[prompt:] = np.arange(c.max_tokens)  # answers differ: no more than the prompt is shared
        mask = np.arange(len(tokens)) >= prompt
        aux = {name: np.zeros(len(tokens), np.float32) for name in self.token_aux}
        members = tuple(Example("", np.where(mask, tokens + g, tokens), mask, aux=aux) for g in range(n))
        group = Group("", members, {"max_tokens": 0.0, "policy_weight": 0.0})
        if self.rows:
            group = self._beside(group, max(self.rows, key=lambda row: len(row.tokens)))
        rows = arrange(
            [group], max_length=c.max_length, group=objective.group, share=c.share_prompt and n > 1
        )
        per = 1 if self._together else c.n
        whole = (c.batch_size or 1) * per // c.grad_accumulation
        rows = in_blocks(rows, whole // data_shards(self.machine.mesh))
        return rows.abstract((c.grad_accumulation, whole // distributed.process_count()))[-1:]

    @property
    def token_aux(self) -> tuple[str, ...]:
        """Names of what every token has beside its id."""
        names = {name: f"{name}_old" for name in VALUES}
        seen = tuple(names.get(name, name) for name in self.eyes.names) if looks(self.machine) else ()
        more = ("cost_returns",) if "cost_value_old" in seen else ()
        return (*self.roller.estimator.gives, *more, *seen)


def _itself(state: TrainState) -> TrainState:
    return state


def looks(machine: Machine) -> bool:
    """Whether log-probs of a rollout are computed before its updates: not where the only update can take its
    own and nothing else is compared with."""
    return (
        updates(machine.config) > 1 or machine.objective.kind != "tokens" or "ref" in machine.objective.needs
    )


def updates(config: Any) -> int:
    """Updates from one rollout to the next."""
    return config.rollout_epochs * config.minibatches


def _apart(groups: Sequence[Group]) -> list[Group]:
    """Every answer as a group of its own."""
    return [
        replace(group, id=f"{group.id}#{g}", members=(member,))
        for group in groups
        for g, member in enumerate(group.members)
    ]


def total_steps(config: Any, prompts: int) -> int:
    """Updates of the run."""
    if config.max_steps is not None:
        return config.max_steps
    rollouts = math.ceil(config.epochs * prompts / ((config.batch_size or 1) * config.minibatches) - 1e-9)
    return max(1, rollouts) * updates(config)


def evaluator(rollouts: Rollouts, rewards: Rewards, say: Say) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> the mean reward of one answer to every held-out prompt, its KL and length."""
    c: Any = rollouts.machine.config
    asked = rollouts.prompts.held_out
    params = [
        SamplingParams(c.temperature, max_tokens=c.max_tokens, seed=c.seed + i) for i in range(len(asked))
    ]

    def evaluate(state: TrainState) -> dict[str, float]:
        engine = rollouts.sampler.engine(state.params)
        found = [samples[0] for samples in engine.generate([a.tokens for a in asked], params)]
        faults = Faults()
        answers = [Answer(a.prompt, s.text, s.finish) for a, s in zip(asked, found, strict=True)]
        scored = rewards(answers, faults, rollouts.roller.folder / MOMENTS)
        for line in faults.lines():
            say(f"evaluation: {line}")
        out = {
            "eval_reward": float(np.nanmean(scored.total)),
            "eval_reward_std": float(np.nanstd(scored.total)),
            "eval_length": float(np.mean([len(s.tokens) for s in found])),
            "eval_clipped_ratio": float(np.mean([s.finish == "length" for s in found])),
        }
        out |= {f"eval_{name}": float(np.nanmean(v)) for name, v in scored.parts.items()}
        lagrange = rollouts.roller.lagrange
        if lagrange:
            out["eval_cost"] = float(np.nanmean(lagrange.costs(answers, Faults()).total))
        return out

    return evaluate
