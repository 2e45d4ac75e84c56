"""Contender: TRL's SFTTrainer, its own loop run without interruption of its making.

`trainer.train()` is called once. A callback holds it between steps: at the end of a round's last step it
reports and waits for the parent, so a round spans everything TRL does for its steps (fetching and collating,
forward, backward, clipping, the optimiser, its metrics) and nothing else: logging, saving, evaluation and
progress bars are off. The losses are the values `training_step` returns, kept and fetched after the round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks import batches, torch_common
from benchmarks.measure import Clock, peak_mib, reset_peak, versions
from benchmarks.protocol import Channel

MANY = 10**6  # steps: training ends when the parent says so


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Builds the trainer and lets it train under the parent's control."""
    torch_common.threads()
    clock = Clock()
    steps = batches.load(job["batches"])
    turns = Turns(job, channel, steps)
    trainer = build(job, steps, turns)
    turns.listen(trainer)
    channel.reply(
        load_s=clock.lap()["wall_s"],
        compile_s=None,
        versions=versions("torch", "transformers", "peft", "trl", "accelerate"),
        peak_reset=reset_peak(),
    )
    trainer.train()


class Turns(TrainerCallback):
    """Holds the trainer between rounds and measures those it runs."""

    def __init__(self, job: Mapping[str, Any], channel: Channel, steps: batches.Steps) -> None:
        self.job, self.channel, self.steps = job, channel, steps
        self.clock, self.left, self.at, self.tokens = Clock(), 0, 0, 0
        self.losses: list[torch.Tensor] = []

    def listen(self, trainer: SFTTrainer) -> None:
        """Keeps what `training_step` returns."""
        inner = trainer.training_step

        def step(*args: Any, **options: Any) -> torch.Tensor:
            loss = inner(*args, **options)
            self.losses.append(loss)
            return loss

        trainer.training_step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first round starts before the first batch is fetched."""
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts the step; after the last of a round reports and waits."""
        self.tokens += self.steps.trained(self.at)
        self.at, self.left = self.at + 1, self.left - 1
        if not self.left:
            self._report()
            self._wait(control)

    def _report(self) -> None:
        torch_common.synchronize(self.job)
        times = self.clock.lap()
        losses, self.losses, tokens, self.tokens = [x.item() for x in self.losses], [], self.tokens, 0
        memory = {"peak_mib": peak_mib(), **torch_common.device_peak(self.job)}
        self.channel.reply(**times, **memory, losses=losses, tokens=tokens)

    def _wait(self, control: Any) -> None:
        message = self.channel.receive()
        control.should_training_stop = message["op"] == "quit"
        self.left = message.get("steps", 0)
        self.clock.lap()


def build(job: Mapping[str, Any], steps: batches.Steps, turns: Turns) -> SFTTrainer:
    """The trainer, with the batches of the run in their order."""
    rows, collator = (packed(steps), None) if job.get("packing") else (grouped(steps), collate)
    return SFTTrainer(
        model=torch_common.lora_model(job),
        args=arguments(job, steps),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer(Path(job["folder"])),
        callbacks=[turns],
    )


def arguments(job: Mapping[str, Any], steps: batches.Steps) -> SFTConfig:
    """AdamW, constant rate, clipping as every contender; whatever only reports is off."""
    return SFTConfig(
        output_dir=os.path.join(os.path.dirname(job["batches"]), "trl"),
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=job["device"] == "gpu",
        max_steps=MANY,
        per_device_train_batch_size=steps.tokens.shape[1] if job.get("packing") else 1,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=job["clip"],
        bf16=bool(job.get("autocast")),
        gradient_checkpointing=bool(job.get("checkpointing")),
        padding_free=bool(job.get("packing")),
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
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


def tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or one with two words for a random model: SFTTrainer insists on having one."""
    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
