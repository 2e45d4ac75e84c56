"""What the TRL contenders share: a trainer's own loop, run without interruption of its making.

`trainer.train()` is called once. A callback holds it between steps: at the end of a round's last step it
reports and waits for the parent, so a round spans everything TRL does for its steps (fetching and collating,
forward, backward, clipping, the optimiser, its metrics) and nothing else: logging, saving, evaluation and
progress bars are off. The losses are the values `training_step` returns, kept and fetched after the round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

from benchmarks import batches, torch_common
from benchmarks.measure import Clock, peak_mib, reset_peak, versions
from benchmarks.protocol import Channel

MANY = 10**6  # steps: training ends when the parent says so
Build = Callable[[Mapping[str, Any], batches.Steps, "Turns"], Any]


def train(job: Mapping[str, Any], channel: Channel, build: Build) -> None:
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
        # What else a trainer tells of a round, in place of the tokens of the batches too.
        self.more: Callable[[], Mapping[str, Any]] = dict

    def listen(self, trainer: Any) -> None:
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
        told = {"losses": losses, "tokens": tokens, **self.more()}
        self.channel.reply(**times, **memory, **told)

    def _wait(self, control: Any) -> None:
        message = self.channel.receive()
        control.should_training_stop = message["op"] == "quit"
        self.left = message.get("steps", 0)
        self.clock.lap()


def arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW, constant rate, clipping as every contender, rows in their order; mere reports are off."""
    return {
        "output_dir": os.path.join(os.path.dirname(job["batches"]), "trl"),
        "use_cpu": job["device"] == "cpu",
        "dataloader_pin_memory": job["device"] == "gpu",
        "max_steps": MANY,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": job["clip"],
        "bf16": bool(job.get("autocast")),
        "gradient_checkpointing": bool(job.get("checkpointing")),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; for a random model, which has none, one that writes ids as numbers."""
    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
