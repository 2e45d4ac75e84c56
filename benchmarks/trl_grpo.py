"""Contender: TRL's GRPOTrainer on the common prompts, its answers by transformers' `generate`.

Answers get their length by `min_new_tokens`, which forbids the stop token before it. The reference is the
model without its adapter: TRL takes that where it makes the adapter itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from trl import GRPOConfig, GRPOTrainer

from benchmarks import batches, reward, torch_common, trl_common
from benchmarks.measure import Clock
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `trl_common.train`."""
    trl_common.train(job, channel, build)


class Trainer(GRPOTrainer):
    """GRPOTrainer, which has no way to say that its prompts are token ids already, and tells few times."""

    def __init__(self, job: Mapping[str, Any], **options: Any) -> None:
        self.job, self.sums = job, defaultdict[str, float](float)
        super().__init__(**options)

    def tell(self) -> dict[str, float]:
        """Tokens and seconds since the last call, and what TRL's metrics say of the last step."""
        sums, self.sums = self.sums, defaultdict(float)
        metrics = self._metrics["train"]
        counts = {name: round(sums.pop(name)) for name in ("tokens", "trained")}
        last = {"entropy": metrics["entropy"][-1], "idle": metrics["frac_reward_zero_std"][-1]}
        return {**counts, **sums, **last}

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        clock = Clock()
        found = super()._generate(prompts)
        self.sums["rollout_s"] += clock.lap()["wall_s"]
        self.sums["tokens"] += sum(map(len, found[1]))
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        torch_common.synchronize(self.job)
        before, clock = self.sums["rollout_s"], Clock()
        found = super()._generate_and_score_completions(inputs)
        torch_common.synchronize(self.job)
        self.sums["score_s"] += clock.lap()["wall_s"] - (self.sums["rollout_s"] - before)
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.sums["trained"] += int(inputs["completion_mask"].sum())
        return super()._compute_loss(model, inputs)


def build(job: Mapping[str, Any], steps: batches.Steps, turns: trl_common.Turns) -> Trainer:
    """The trainer with the common adapter, and the prompts of the run in their order."""
    trainer = Trainer(
        job,
        model=torch_common.base_model(job),
        reward_funcs=reward.characters,
        peft_config=PeftConfig.from_pretrained(job["adapter"]),
        args=arguments(job, steps),
        train_dataset=rows(steps),
        processing_class=trl_common.tokenizer(Path(job["folder"])),
        callbacks=[turns],
    )
    set_peft_model_state_dict(trainer.model, load_peft_weights(job["adapter"], device="cpu"))
    turns.more = trainer.tell
    return trainer


def arguments(job: Mapping[str, Any], steps: batches.Steps) -> GRPOConfig:
    """One update a rollout. Loss and advantages are TRL's defaults, which are ours too."""
    return GRPOConfig(
        per_device_train_batch_size=steps.tokens.shape[1] * job["answers"],
        num_generations=job["answers"],
        max_completion_length=job["new_tokens"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
        temperature=1.0,
        beta=job["beta"],
        shuffle_dataset=False,
        **trl_common.arguments(job),
    )


def rows(steps: batches.Steps) -> Dataset:
    """Every prompt, in the order of the steps."""
    return Dataset.from_dict({"prompt": steps.tokens.reshape(-1, steps.tokens.shape[-1]).tolist()})
