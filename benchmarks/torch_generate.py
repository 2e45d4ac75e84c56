"""Contender: transformers' `generate`, greedy, a forced number of new tokens, or one for each prompt; cache
static or dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import torch_common
from benchmarks.measure import Clock, reset_peak, serve, versions
from benchmarks.prompts import Prompts
from benchmarks.protocol import Channel


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Loads, then answers each round of `batch` prompts and `new` tokens, or of `count` prompts in batches of
    `batch`, each up to its own end."""
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
        """From prompts to tokens; with `tokens` the answers themselves come along."""
        batch, count = message["batch"], message.get("count", message["batch"])
        ends = self.prompts.ends[:count].tolist() if "count" in message else [message["new"]] * count
        answers: list[list[int]] = []
        for at in range(0, count, batch):
            answers += self._batch(at, ends[at : at + batch], stops="count" in message)
        kept = {"answers": answers} if message.get("tokens") else {}
        return {"tokens": sum(map(len, answers)), **kept, **torch_common.device_peak(self.job)}

    def _batch(self, at: int, ends: list[int], *, stops: bool) -> list[list[int]]:
        """The answers of one call to the prompts from `at` on."""
        tokens, mask = (torch.from_numpy(x) for x in self.prompts.left_padded(at + len(ends), 0, at))
        device, width = self.model.device, tokens.shape[1]
        ended = [Ended(width, torch.tensor(ends, device=device))] if stops else []
        with torch.inference_mode(), torch_common.autocast(self.job):
            out = self.model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(ends),
                do_sample=False,
                stopping_criteria=StoppingCriteriaList(ended),
                **self.options,
            )
        found = out[:, width:].tolist()  # fetching them waits for the device
        return [row[:end] for row, end in zip(found, ends, strict=True)]


class Ended(StoppingCriteria):
    """Ends every row at a length of its own, as a stop token would."""

    def __init__(self, width: int, ends: torch.Tensor) -> None:
        self.lengths = width + ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool [rows]: whether a row is done."""
        return self.lengths <= input_ids.shape[1]
