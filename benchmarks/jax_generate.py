"""Contender: jaxalign's sampling engine, greedy, a forced number of new tokens, or one for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import jax_common
from benchmarks.measure import Clock, reset_peak, serve
from benchmarks.prompts import Prompts
from benchmarks.protocol import Channel
from jaxalign.distributed import keep_freed_memory
from jaxalign.models.load import load_model
from jaxalign.sampling.engine import Engine
from jaxalign.train.assemble import DTYPES
from jaxalign.train.programs import COMPILATIONS
from jaxalign.types import SamplingParams


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """Loads, then answers each round of `batch` prompts and `new` tokens, or of `count` prompts in `batch`
    slots, each up to its own end."""
    mesh, clock = jax_common.prepare(job), Clock()
    sampler = Sampler(job, mesh)
    channel.reply(**jax_common.report(), load_s=clock.lap()["wall_s"], peak_reset=reset_peak())
    serve(channel, sampler.round)


class Sampler:
    """The engine over the run's model, one for each batch size; no stop token, so that every row runs on."""

    def __init__(self, job: Mapping[str, Any], mesh: Any) -> None:
        dtype = DTYPES[job["precision"]]
        loaded = load_model(jax_common.source(job), mesh, param_dtype=dtype, compute_dtype=dtype)
        self.model = replace(loaded.model, **job.get("model", {}))
        self.base, self.prompts = loaded.base, Prompts.load(job["prompts"])
        self.engines: dict[int, Engine] = {}
        jax.block_until_ready(self.base)
        keep_freed_memory()

    def round(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """From prompts to tokens; with `tokens` the answers themselves come along."""
        before, batch = COMPILATIONS.count, message["batch"]
        if batch not in self.engines:
            self.engines[batch] = Engine(self.model, self.base, slots=batch)
        count = message.get("count", batch)
        ends = self.prompts.ends[:count].tolist() if "count" in message else [message["new"]] * count
        params = [SamplingParams(temperature=0.0, max_tokens=end) for end in ends]
        answers = self.engines[batch].generate(self.prompts.first(count), params)
        rows = [np.asarray(samples[0].tokens).tolist() for samples in answers]
        kept = {"answers": rows} if message.get("tokens") else {}
        return {
            "tokens": sum(map(len, rows)),
            **kept,
            **jax_common.compiled(before),
            **jax_common.device_peak(),
        }
