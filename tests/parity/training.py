"""One optimiser step of a transformers model in torch and of the same model here, on the same tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxalign.models.decoder import Model
from jaxalign.objectives.sft import SFT
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.state import TrainState
from jaxalign.train.step import make_step
from jaxalign.types import Batch
from tests.tiny import examples, micro, quick, unpacked

PAIRS = examples(4, seed=8)  # ids below 96, and the parity models have 97


def batch() -> Batch:
    """[4, 1, 16]."""
    return unpacked(PAIRS)


def torch_inputs(host: Batch) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (-100 where not trained) of the same rows."""
    rows = lambda x: torch.tensor(np.asarray(x[:, 0]), dtype=torch.long)  # noqa: E731
    labels = np.where(host.mask, host.tokens, -100)
    labels[..., 0] = -100
    return {
        "input_ids": rows(host.tokens),
        "attention_mask": rows(host.segments > 0),
        "labels": rows(labels),
    }


def torch_backward(hf: Any) -> float:
    """transformers' own loss of the batch; the gradients are left in the parameters."""
    hf.zero_grad()
    loss = hf(**torch_inputs(batch())).loss
    loss.backward()
    return loss.item()


def our_steps(model: Model, params: Any, base: Any, optimizer: Any, count: int = 1, micros: int = 1) -> Any:
    """Parameters and metrics after `count` steps on the batch, in `micros` micro-batches."""
    step = make_step(model, SFT(), optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), train_base=not base)
    start = jax.tree.map(jnp.array, params)  # the step donates its state
    state = TrainState(jnp.int32(0), start, optimizer.init(start), jax.random.key_data(jax.random.key(0)))
    placed = jax.tree.map(jnp.asarray, micro(batch(), micros))
    program = step.lower(state, base, placed).compile(compiler_options=quick())
    for _ in range(count):
        state, metrics = program(state, base, placed)
    return jax.tree.map(np.asarray, state.params), {k: float(v) for k, v in metrics.items()}
