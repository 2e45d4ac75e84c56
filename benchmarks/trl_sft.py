"""Contender: TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks import batches, torch_common, trl_common
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """See `trl_common.train`."""
    trl_common.train(job, channel, build)


def build(job: Mapping[str, Any], steps: batches.Steps, turns: TrainerCallback) -> SFTTrainer:
    """The trainer, with the batches of the run in their order."""
    rows, collator = (packed(steps), None) if job.get("packing") else (grouped(steps), collate)
    return SFTTrainer(
        model=torch_common.lora_model(job),
        args=arguments(job, steps),
        train_dataset=rows,
        data_collator=collator,
        processing_class=trl_common.tokenizer(Path(job["folder"])),
        callbacks=[turns],
    )


def arguments(job: Mapping[str, Any], steps: batches.Steps) -> SFTConfig:
    """A packed row a row of the batch; otherwise a row is a whole step, for `collate`."""
    packing = bool(job.get("packing"))
    return SFTConfig(
        per_device_train_batch_size=steps.tokens.shape[1] if packing else 1,
        padding_free=packing,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **trl_common.arguments(job),
    )


def grouped(steps: batches.Steps) -> Dataset:
    """A row a step: the step's examples, which `collate` pads, so that every step is the common one."""
    every = [steps.examples(i) for i in range(len(steps.tokens))]
    columns = {
        "input_ids": [[t.tolist() for t, _ in step] for step in every],
        "labels": [[y.tolist() for _, y in step] for step in every],
    }
    return Dataset.from_dict(columns)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right padding to the longest, as TRL's own collator; no mask where nothing is padded."""
    pairs = [(t, y) for row in rows for t, y in zip(row["input_ids"], row["labels"], strict=True)]
    tokens, labels, attention = (torch.from_numpy(x) for x in batches.pad(pairs))
    return {"input_ids": tokens, "labels": labels, "attention_mask": attention}


def packed(steps: batches.Steps) -> Dataset:
    """TRL's own packed form, a row a packed row; its collator flattens a batch of them without padding."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    flat = (x.reshape(-1, x.shape[-1]) for x in (steps.tokens, steps.mask, steps.segments))
    for tokens, mask, segments in zip(*flat, strict=True):
        full = segments > 0
        sizes = [int((segments == s).sum()) for s in range(1, int(segments.max()) + 1)]
        labels = [int(t) if m else batches.IGNORED for t, m in zip(tokens[full], mask[full], strict=True)]
        columns["input_ids"].append(tokens[full].tolist())
        columns["labels"].append(labels)
        columns["seq_lengths"].append(sizes)
    return Dataset.from_dict(columns)
