"""LoRA and DoRA are PEFT's: logits, gradients, AdamW steps, scaling, dropout, merged weights."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[parity]'")

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import Functional, Numerics
from jaxalign.models.layers import Linear
from jaxalign.train.optim import OptimConfig, make_optimizer
from tests.parity.hf import logits, to_tree, torch_model
from tests.parity.test_sft_parity import assert_close
from tests.parity.training import our_steps, torch_backward

# peft asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PART = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
CASES: dict[str, tuple[str, dict[str, Any], LoraConfig]] = {
    "llama": ("llama", {"num_key_value_heads": 1}, LoraConfig(rank=4, alpha=10.0)),
    "llama-rslora": ("llama", {"tie_word_embeddings": True}, LoraConfig(rank=4, alpha=6.0, rslora=True)),
    "qwen2-some": ("qwen2", {}, LoraConfig(rank=3, alpha=3.0, targets=("q", "v", "down"))),
    "llama-dora": ("llama", {}, LoraConfig(rank=3, alpha=6.0, dora=True)),
    "qwen2-dora": ("qwen2", {}, LoraConfig(rank=2, alpha=4.0, targets=("q", "o", "up"), dora=True)),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 5.0},
        LoraConfig(rank=2, alpha=8.0),
    ),
}


def peft_model(model_type: str, keys: dict[str, Any], lora: LoraConfig) -> Any:
    """A random tiny model under PEFT with both factors random."""
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        target_modules=[f"{name}_proj" for name in lora.targets],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_model(model_type, num_hidden_layers=2, **keys), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def adapter_tree(model: Any, lora: LoraConfig, field: str = "data") -> dict[str, Any]:
    """`data` or `grad` of PEFT's parameters as our adapter tree: factors transposed, stacked over layers."""
    factors = [(n, getattr(p, field)) for n, p in model.named_parameters() if "lora_" in n]
    found = {n: x.detach().numpy().copy() for n, x in factors}
    tree: dict[str, Any] = {"attn": {}, "mlp": {}}
    for name in lora.targets:
        part = tree["mlp" if PART[name] == "mlp" else "attn"]
        at = f"base_model.model.model.layers.{{}}.{PART[name]}.{name}_proj.lora_{{}}.default.weight"
        stacked = lambda factor, at=at: np.stack([found[at.format(i, factor)].T for i in range(2)])  # noqa: E731
        magnitude = {"m": stacked("magnitude_vector")} if lora.dora else {}
        part[name] = {"adapter": {"a": stacked("A"), "b": stacked("B")} | magnitude}
    assert sum(x.size for x in jax.tree.leaves(tree)) == sum(x.size for x in found.values())
    return {"layers": {k: v for k, v in tree.items() if v}}


@pytest.fixture(params=CASES, scope="module")
def pair(request: Any) -> tuple[Any, Any, Any, Any]:
    """PEFT's model, and ours: Model, adapter, base."""
    model_type, keys, lora = CASES[request.param]
    theirs = peft_model(model_type, keys, lora)
    with theirs.disable_adapter():
        plain = torch_model(model_type, num_hidden_layers=2, **keys)  # the same seed, the same weights
    model, base = to_tree(plain)
    return theirs, replace(model, adapter=lora), adapter_tree(theirs, lora), base


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


def test_logits(pair: Any) -> None:
    """With the adapter, without it (the reference model), and merged on both sides."""
    theirs, model, adapter, base = pair
    tokens = np.random.default_rng(0).integers(3, 97, (2, 15))
    want = torch_logits(theirs, tokens)
    np.testing.assert_allclose(logits(model, base, tokens, adapter=adapter), want, atol=1e-4, rtol=1e-4)
    with theirs.disable_adapter():
        without = torch_logits(theirs, tokens)
    np.testing.assert_allclose(logits(model, base, tokens), without, atol=1e-4, rtol=1e-4)
    assert np.abs(want - without).max() > 0.1
    merged = model.merge(jax.tree.map(jnp.asarray, adapter), base)
    np.testing.assert_allclose(logits(model, merged, tokens), want, atol=1e-4, rtol=1e-4)


def test_loss_and_gradients(pair: Any) -> None:
    theirs, model, adapter, base = pair
    loss = torch_backward(theirs)
    after, metrics = our_steps(model, adapter, base, optax.sgd(1.0), micros=2)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    gradient = jax.tree.map(np.subtract, adapter, after)
    assert_close(gradient, adapter_tree(theirs, model.adapter, "grad"), 2e-5)


@pytest.mark.parametrize(("case", "within"), [("llama", 1e-5), ("llama-dora", 1e-4)])
def test_adamw_steps(case: str, within: float) -> None:
    """Three steps, clipped: the adapters end in the same place. AdamW's first steps are the gradient's signs:
    a gradient of nearly nothing may move its parameter by a little more in one than in the other."""
    lora = CASES[case][2]
    theirs = peft_model(*CASES[case])
    model, base = to_tree(torch_model("llama", num_hidden_layers=2, **CASES[case][1]))
    start = adapter_tree(theirs, lora)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        torch_backward(theirs)
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        reference.step()
    config = OptimConfig(schedule="constant", warmup_ratio=0.0, grad_clip=0.5)
    optimizer = make_optimizer(config, lambda step: 1e-2)
    got, _ = our_steps(replace(model, adapter=lora), start, base, optimizer, count=3)
    assert_close(got, adapter_tree(theirs, lora), within)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(8, 8.0), (16, 32.0), (3, 5.0)])
def test_scaling(rank: int, alpha: float, rslora: bool) -> None:
    """Our scale is the one PEFT derives from the same three numbers."""
    theirs = peft_model("llama", {}, LoraConfig(rank=rank, alpha=alpha, rslora=rslora, targets=("q",)))
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    ours = LoraConfig(rank=rank, alpha=alpha, rslora=rslora)
    np.testing.assert_allclose(ours.scale, layer.scaling["default"])


def test_peft_defaults_are_expressible() -> None:
    """PEFT's own defaults: rank 8, alpha 8, no dropout, scale 1."""
    theirs = peft.LoraConfig()
    numbers = {"rank": theirs.r, "alpha": theirs.lora_alpha, "dropout": theirs.lora_dropout}
    ours = LoraConfig(**numbers, rslora=theirs.use_rslora)
    assert (ours.rank, ours.alpha, ours.dropout, ours.scale) == (8, 8.0, 0.0, 1.0)


def test_the_start_has_pefts_distribution() -> None:
    """A uniform on +-1 / sqrt(in), B zero: bound and spread as PEFT draws them for a layer of this size."""
    hf = torch_model("llama", num_hidden_layers=1, hidden_size=256)
    model = replace(to_tree(hf)[0], adapter=LoraConfig(rank=64, targets=("gate",)))
    layer = peft.get_peft_model(hf, peft.LoraConfig(r=64, target_modules=["gate_proj"]))
    layer = layer.base_model.model.model.layers[0].mlp.gate_proj
    theirs = layer.lora_A["default"].weight.detach().numpy()
    adapter = model.init_adapter(jax.random.key(0))["layers"]["mlp"]["gate"]["adapter"]
    ours = np.asarray(adapter["a"])
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.01)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.02)
    assert not np.asarray(adapter["b"]).any()
    assert not layer.lora_B["default"].weight.detach().numpy().any()


def test_dora_starts_as_pefts() -> None:
    """The magnitudes are the norms of the weights' rows there, of the kernels' columns here."""
    lora = LoraConfig(rank=2, targets=("gate",), dora=True)
    model, base = to_tree(torch_model("llama", num_hidden_layers=2))
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], use_dora=True)
    theirs = peft.get_peft_model(torch_model("llama", num_hidden_layers=2), config)
    want = [v.detach().numpy() for n, v in theirs.named_parameters() if "magnitude" in n]
    adapter = replace(model, adapter=lora).init_adapter(jax.random.key(0), base)
    np.testing.assert_allclose(adapter["layers"]["mlp"]["gate"]["adapter"]["m"], want, rtol=1e-6)


def test_dora_drops_what_peft_drops() -> None:
    """In training, with the same mask on both sides: the base's own product is not dropped."""
    lora = LoraConfig(rank=4, alpha=10.0, targets=("q",), dora=True, dropout=0.5)
    theirs = peft_model("llama", {}, lora)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    x = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    key = jax.random.key(4)
    keep = np.asarray(jax.random.bernoulli(key, 0.5, x.shape))
    with torch.no_grad():
        layer.lora_dropout["default"] = Mask(torch.tensor(keep / 0.5))
        want = layer(torch.tensor(x)).numpy()
    kernel = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
    tree = jax.tree.map(lambda v: jnp.asarray(v[0]), adapter_tree(theirs, lora))
    make = lambda rngs: Linear("q", (48, 48), ("a", "b"), rngs, bias=False, adapter=lora)  # noqa: E731
    params = {"kernel": kernel} | tree["layers"]["attn"]["q"]
    got = Functional(make).bind()(params)(jnp.asarray(x), Numerics(), key)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


class Mask(torch.nn.Module):
    """A dropout layer that always drops the same."""

    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.factor = factor.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x times 0 or 1 / (1 - p)."""
        return x * self.factor
