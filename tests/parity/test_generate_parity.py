"""Greedy answers of the real model, token for token those of transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxalign.data.records import Message
from jaxalign.models.export import export_hf
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sampling.load import load_engine
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.sharding import make_mesh

pytestmark = [pytest.mark.parity, pytest.mark.real_model]
NAME = "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How do plants make food?",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What does a compiler do?",
    "List the days of the week.",
    "What is photosynthesis?",
    "How long is a marathon?",
    "Explain gravity to a child.",
    "What is the largest ocean?",
    "Give a synonym of happy.",
    "How many legs has a spider?",
    "What is a prime number?",
    "Suggest a name for a cat.",
    "Why do we sleep?",
)


def test_greedy_answers_equal_transformers_token_for_token(tmp_path: Path) -> None:
    engine, tokenizer, _ = load_engine(NAME, GenerateConfig(dtype="f32", batch_size=32))
    source = resolve(NAME)
    loaded = load_model(source, make_mesh())
    folder = export_hf(
        replace(loaded.model, adapter=None),
        loaded.base,
        source,
        tmp_path / "hf",
        stop_tokens=tokenizer.stop_tokens,
        tokenizer=tokenizer.hf,
    )
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer.encode_prompt((Message("user", q),)) for q in QUESTIONS]
    ours = engine.generate(prompts, GenerateConfig(temperature=0, max_tokens=32).params())
    for prompt, (sample,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)[0]
        assert sample.tokens.tolist() == theirs[len(prompt) :].tolist()
        logs = torch.log_softmax(hf(theirs[None]).logits[0], -1)[len(prompt) - 1 : -1]
        want = logs[torch.arange(len(sample.tokens)), theirs[len(prompt) :]].detach().numpy()
        np.testing.assert_allclose(sample.logp, want, atol=1e-3)
