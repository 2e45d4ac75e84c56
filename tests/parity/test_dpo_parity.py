"""Five optimiser steps of losses over pairs are TRL's: losses, rewards, log-probs and gradient norms.

TRL's own trainer runs them, on the same weights, the same adapter and the same token ids. The reference is
the model without its adapter, or log-probs computed before the first step.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[parity]'")
trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[bench]'")

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxalign.models.adapters import LoraConfig
from jaxalign.objectives.pairwise import DPO, EXO, IPO, APOZero, Hinge, RobustDPO
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.train.optim import OptimConfig, make_optimizer
from jaxalign.train.score import score
from jaxalign.train.state import TrainState
from jaxalign.train.step import make_step
from jaxalign.types import Batch
from tests.parity.hf import to_tree, torch_model
from tests.parity.test_lora_parity import adapter_tree
from tests.tiny import quick

# peft and TRL ask transformers for this by its old names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]
STEPS, PAIRS, LENGTH = 5, 4, 16
RATE, CLIP = 1e-2, 0.3
LORA = LoraConfig(rank=4, alpha=10.0)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sigmoid": (DPO(beta=0.3), {"beta": 0.3}),
    "ipo": (IPO(beta=0.2), {"beta": 0.2}),
    "hinge": (Hinge(beta=0.2), {"beta": 0.2}),
    "robust": (RobustDPO(beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    "exo_pair": (EXO(beta=0.3, label_smoothing=0.01), {"beta": 0.3, "label_smoothing": 0.01}),
    "apo_zero": (APOZero(beta=0.3), {"beta": 0.3}),
}
# What both report, under one name. TRL's entropy is over both answers.
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "mean_token_accuracy",
    "grad_norm",
)


def make_pairs(seed: int = 4) -> list[tuple[np.ndarray, ...]]:
    """Prompt, chosen and rejected ids of all steps, of very unequal lengths."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers((1, 1, 1), (7, 10, 10), (STEPS * PAIRS, 3))
    return [tuple(rng.integers(3, 97, n) for n in row) for row in sizes]


ROWS = make_pairs()


def batches() -> list[Batch]:
    """[A=1, B, G=2, T] of every step."""
    shape = (STEPS, 1, PAIRS, 2, LENGTH)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for place, (prompt, *answers) in enumerate(ROWS):
        for member, answer in enumerate(answers):
            at = (place // PAIRS, 0, place % PAIRS, member, slice(0, len(prompt) + len(answer)))
            tokens[at], segments[at] = np.concatenate([prompt, answer]), 1
            mask[at] = np.arange(len(prompt) + len(answer)) >= len(prompt)
            positions[at] = np.arange(len(prompt) + len(answer))
    return [Batch(*leaves) for leaves in zip(tokens, mask, segments, positions, strict=True)]


class Trainer(trl.DPOTrainer):
    """TRL's trainer over rows that are token ids already; keeps the losses of its steps."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        self.losses: list[float] = []
        return dataset

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """The step's loss."""
        loss = super().training_step(*args, **options)
        self.losses.append(loss.item())
        return loss


def trainer(folder: Path, kind: str, **keys: Any) -> Trainer:
    """TRL's trainer on the tiny model, with both factors of its adapter random."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>"))
    columns = zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*ROWS, strict=True), strict=True)
    config = trl.DPOConfig(
        output_dir=str(folder),
        loss_type=[kind],
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **keys,
    )
    targets = [f"{name}_proj" for name in LORA.targets]
    made = Trainer(
        model=torch_model("llama", num_hidden_layers=2),
        peft_config=peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets),
        args=config,
        train_dataset=datasets.Dataset.from_dict({n: [x.tolist() for x in c] for n, c in columns}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return made


def theirs(made: Trainer) -> list[dict[str, float]]:
    """Losses and metrics of the five steps."""
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return [
        {"loss": loss} | {name: entry[name] for name in NAMES}
        for loss, entry in zip(made.losses, logs, strict=True)
    ]


def ours(objective: Any, adapter: Any, hosts: list[Batch]) -> list[dict[str, float]]:
    """The same from our step, the adapter trained over the frozen base."""
    model, base = to_tree(torch_model("llama", num_hidden_layers=2))
    config = OptimConfig(schedule="constant", warmup_ratio=0.0, grad_clip=CLIP)
    optimizer = make_optimizer(config, lambda step: RATE)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_step(replace(model, adapter=LORA), objective, optimizer, mesh)
    params = jax.tree.map(jnp.asarray, adapter)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(0)))
    placed = [jax.tree.map(jnp.asarray, host) for host in hosts]
    program = step.lower(state, base, placed[0]).compile(compiler_options=quick())
    out = []
    for batch in placed:
        state, metrics = program(state, base, batch)
        out.append({name: float(metrics[name]) for name in ("loss", *NAMES)})
    return out


def assert_same(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    """Every number of every step, and the run is not one that stands still."""
    assert len(got) == len(want) == STEPS
    for index, (mine, other) in enumerate(zip(got, want, strict=True)):
        for name, value in other.items():
            np.testing.assert_allclose(mine[name], value, rtol=2e-4, atol=2e-4, err_msg=f"{name} {index}")
    assert max(abs(step["rewards/margins"]) for step in want) > 0.1
    assert max(step["grad_norm"] for step in want) > 2 * CLIP


@pytest.mark.parametrize("kind", CASES)
def test_five_steps(kind: str, tmp_path: Path) -> None:
    objective, keys = CASES[kind]
    made = trainer(tmp_path, kind, **keys)
    adapter = adapter_tree(made.model, LORA)
    assert_same(ours(objective, adapter, batches()), theirs(made))


def test_precomputed_reference(tmp_path: Path) -> None:
    """Log-probs of the reference computed before the run, by either side's own code, give the same five steps
    as the reference in the step."""
    made = trainer(tmp_path, "sigmoid", beta=0.3, precompute_ref_log_probs=True)
    adapter, hosts = adapter_tree(made.model, LORA), batches()
    model, base = to_tree(torch_model("llama", num_hidden_layers=2))
    forward = jax.jit(lambda batch: score(model, None, base, batch).logp)
    ready = [replace(host, aux={"ref": forward(jax.tree.map(lambda x: x[0], host))[None]}) for host in hosts]
    got = ours(DPO(beta=0.3), adapter, ready)
    assert_same(got, theirs(made))
    for mine, other in zip(got, ours(DPO(beta=0.3), adapter, hosts), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
