"""What the torch contenders share: threads, device, the model with its adapter, peak memory of the card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def threads() -> None:
    """As many threads as processors this process is pinned to."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def base_model(job: Mapping[str, Any]) -> Any:
    """The run's model on its device, weights in `job["weights"]` or the run's precision."""
    dtype = DTYPES[job.get("weights", job["precision"])]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, attn_implementation="sdpa")
    return model.to(device(job))


def lora_model(job: Mapping[str, Any]) -> Any:
    """The model with the shared adapter, trainable; peft keeps an adapter in float32 in any precision."""
    return PeftModel.from_pretrained(base_model(job), job["adapter"], is_trainable=True)


def device(job: Mapping[str, Any]) -> str:
    """Torch's name of the run's device."""
    return {"cpu": "cpu", "gpu": "cuda"}[job["device"]]


def autocast(job: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the contender asks for it."""
    return torch.autocast(device(job), torch.bfloat16) if job.get("autocast") else nullcontext()


def synchronize(job: Mapping[str, Any]) -> None:
    """Waits for the card; nothing to do on a CPU."""
    if job["device"] == "gpu":
        torch.cuda.synchronize()


def device_peak(job: Mapping[str, Any]) -> dict[str, float]:
    """`device_peak_mib` on a card, since the last call; empty on a CPU."""
    if job["device"] == "cpu":
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return {"device_peak_mib": peak}
