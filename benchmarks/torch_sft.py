"""Contender: the shortest training loop one writes with transformers and peft, nothing else in the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import batches, torch_common
from benchmarks.measure import Clock, reset_peak, serve, versions
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Loads, then answers each round of `steps` steps with their losses. See `worker` for the protocol."""
    torch_common.threads()
    clock = Clock()
    loop = Loop(job)
    times = clock.lap()
    found = versions("torch", "transformers", "peft")
    channel.reply(load_s=times["wall_s"], compile_s=None, versions=found, peak_reset=reset_peak())
    serve(channel, loop.round)


class Loop:
    """Model, optimiser and the place in the data."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job, self.steps, self.at = job, batches.load(job["batches"]), 0
        self.model = torch_common.lora_model(job).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # betas and epsilon are the defaults of every contender; torch's weight decay is not.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=job["learning_rate"], weight_decay=0.0, fused=True
        )
        self.forward = torch.compile(self.model) if job.get("compile") else self.model

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`steps` optimiser steps, batches built on the way; losses are fetched after the last."""
        first, self.at = self.at, self.at + message["steps"]
        losses = [self.step(i) for i in range(first, self.at)]
        torch_common.synchronize(self.job)
        tokens = sum(self.steps.trained(i) for i in range(first, self.at))
        return {"losses": [x.item() for x in losses], "tokens": tokens, **torch_common.device_peak(self.job)}

    def step(self, index: int) -> torch.Tensor:
        """One step of AdamW with the gradient clipped; the loss, not yet fetched."""
        tokens, labels, attention = (torch.from_numpy(x) for x in self.steps.padded(index))
        # Without padding transformers needs no mask, and its attention is faster without one.
        mask = None if bool(attention.all()) else attention.to(self.model.device)
        with torch_common.autocast(self.job):
            inputs = {"input_ids": tokens.to(self.model.device), "labels": labels.to(self.model.device)}
            loss = self.forward(attention_mask=mask, use_cache=False, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.job["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
