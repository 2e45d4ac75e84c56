"""Contender: transformers' `generate`, greedy, a forced number of new tokens, cache static or dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import torch_common
from benchmarks.measure import Clock, reset_peak, serve, versions
from benchmarks.prompts import Prompts
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Loads, then answers each round of `batch` prompts and `new` tokens."""
    torch_common.threads()
    clock = Clock()
    sampler = Sampler(job)
    load = clock.lap()["wall_s"]
    found = versions("torch", "transformers")
    channel.reply(load_s=load, compile_s=None, versions=found, peak_reset=reset_peak())
    serve(channel, sampler.round)


class Sampler:
    """The model and how `generate` is asked to run it."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job, self.prompts = job, Prompts.load(job["prompts"])
        self.model = torch_common.base_model(job).eval()
        # Without an end-of-sequence token every row runs to max_new_tokens, and no logits processor is added.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.options = {"cache_implementation": job["cache_kind"]} if job.get("cache_kind") else {}

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One batch from prompts to tokens; with `tokens` the answers themselves come along."""
        tokens, mask = (torch.from_numpy(x) for x in self.prompts.left_padded(message["batch"], pad=0))
        device = self.model.device
        with torch.inference_mode(), torch_common.autocast(self.job):
            out = self.model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=message["new"],
                do_sample=False,
                **self.options,
            )
        answers = out[:, tokens.shape[1] :].tolist()  # fetching them waits for the device
        kept = {"answers": answers} if message.get("tokens") else {}
        return {"tokens": sum(map(len, answers)), **kept, **torch_common.device_peak(self.job)}
