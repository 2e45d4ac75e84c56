"""Contender: TRL's DPOTrainer on the common token ids, with its own collator.

The reference is the model without its adapter: TRL takes that where it makes the adapter itself. Given a
model that has one, TRL 1.16 takes a copy of the adapter at its start instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import batches, pairs, torch_common, trl_common
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `trl_common.train`."""
    trl_common.train(job, channel, build)


class Trainer(DPOTrainer):
    """DPOTrainer, which has no way to say that its rows are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def build(job: Mapping[str, Any], steps: batches.Steps, turns: TrainerCallback) -> DPOTrainer:
    """The trainer with the common adapter, and the batches of the run in their order."""
    trainer = Trainer(
        model=torch_common.base_model(job),
        peft_config=PeftConfig.from_pretrained(job["adapter"]),
        args=arguments(job, steps),
        train_dataset=rows(steps),
        processing_class=trl_common.tokenizer(Path(job["folder"])),
        callbacks=[turns],
    )
    # Reference log-probs that are asked for beforehand are computed by now, and without the adapter.
    set_peft_model_state_dict(trainer.model, load_peft_weights(job["adapter"], device="cpu"))
    return trainer


def arguments(job: Mapping[str, Any], steps: batches.Steps) -> DPOConfig:
    """A row is a pair."""
    return DPOConfig(
        per_device_train_batch_size=steps.tokens.shape[1] // 2,
        beta=job["beta"],
        max_length=None,
        precompute_ref_log_probs=bool(job.get("precomputed")),
        **trl_common.arguments(job),
    )


def rows(steps: batches.Steps) -> Dataset:
    """Every pair, in the order of the steps."""
    every = [pair for index in range(len(steps.tokens)) for pair in pairs.split(steps, index)]
    columns = zip(*every, strict=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict(
        {n: [x.tolist() for x in column] for n, column in zip(names, columns, strict=True)}
    )
