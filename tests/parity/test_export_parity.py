"""What is written here, transformers and peft load with the same logits; what peft writes, we load."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from jaxalign.models.adapters import LoraConfig
from jaxalign.models.export import export_hf, export_peft
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sharding import MeshConfig, make_mesh
from tests.parity.hf import logits, torch_model

# peft 0.21 asks transformers 5 for an attribute under its old name.
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TOKENS = np.random.default_rng(0).integers(3, 96, (4, 11))
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6},
}
ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


def saved(folder, model_type, **keys):
    """A tiny transformers model, saved by transformers."""
    hf = torch_model(model_type, vocab_size=96, **keys)
    hf.generation_config.eos_token_id = [2, 3]
    hf.save_pretrained(folder)
    return hf


def ours(loaded) -> np.ndarray:
    return logits(loaded.model, loaded.base, TOKENS, adapter=loaded.adapter)


def theirs(hf) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.as_tensor(TOKENS)).logits.numpy()


def close(got, want):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4 * max(1, np.abs(want).max()))


def from_pretrained(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_adapter(model):
    """Both factors away from zero."""
    adapter = jax.eval_shape(model.init, jax.random.key(1))[0]
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_loads_in_transformers(tmp_path, family, tied):
    hf = saved(tmp_path / "hf", family, tie_word_embeddings=tied, **FAMILIES[family])
    source = resolve(str(tmp_path / "hf"))
    loaded = load_model(source, make_mesh(MESH), adapter=LoraConfig(rank=4, targets=ALL))
    close(ours(loaded), theirs(hf))
    adapter = random_adapter(loaded.model)
    merged = loaded.model.merge(adapter, loaded.base)
    out = export_hf(
        loaded.model, merged, source, tmp_path / "out", stop_tokens=(2, 7), max_shard_bytes=50_000
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = from_pretrained(out)
    want = logits(loaded.model, loaded.base, TOKENS, adapter=adapter)
    close(theirs(again), want)
    assert np.abs(want - theirs(hf)).max() > 0.1
    assert again.config.tie_word_embeddings is tied
    assert again.generation_config.eos_token_id == [2, 7]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]


@old_name
@pytest.mark.parametrize("kind", [{"rslora": True}, {"rslora": False}, {"dora": True}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_adapter_loads_in_peft(tmp_path, family, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[parity]'")
    hf = saved(tmp_path / "hf", family, **FAMILIES[family])
    source = resolve(str(tmp_path / "hf"))
    lora = LoraConfig(rank=4, alpha=6.0, targets=("q", "v", "down"), **kind)
    loaded = load_model(source, make_mesh(MESH), adapter=lora)
    adapter = random_adapter(loaded.model)
    out = export_peft(
        loaded.model, adapter, source, tmp_path / "a", stop_tokens=(2, 7), base_hash=loaded.base_hash
    )
    want = logits(loaded.model, loaded.base, TOKENS, adapter=adapter)
    plain = theirs(hf)
    adapted = peft.PeftModel.from_pretrained(hf, out).eval()
    close(theirs(adapted), want)
    assert np.abs(want - plain).max() > 0.1
    # And by the adapter's folder alone: it names its base.
    close(
        theirs(peft.AutoPeftModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()), want
    )


@old_name
@pytest.mark.parametrize(
    ("family", "dora"), [("llama", False), ("qwen2", False), ("gemma2", False), ("llama", True)]
)
def test_an_adapter_made_by_peft_is_imported(tmp_path, family, dora):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[parity]'")
    hf = saved(tmp_path / "hf", family, **FAMILIES[family])
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
        use_rslora=True,
        use_dora=dora,
    )
    adapted = peft.get_peft_model(hf, config).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn_like(value))
    adapted.save_pretrained(tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(raw | {"base_model_name_or_path": str(tmp_path / "hf")})
    )
    loaded = load_model(resolve(str(tmp_path / "a")), make_mesh(MESH))
    want = LoraConfig(rank=3, alpha=5, dropout=0.1, targets=ALL, rslora=True, dora=dora)
    assert loaded.model.adapter == want
    close(ours(loaded), theirs(adapted))
    assert loaded.stop_tokens == (2, 3)


@pytest.mark.real_model
def test_the_built_in_model_goes_out_and_loads_in_transformers(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.delenv("JAXALIGN_CACHE")
    source = resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name)
    loaded = load_model(source, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    out = export_hf(
        loaded.model,
        loaded.base,
        source,
        tmp_path / "out",
        stop_tokens=loaded.stop_tokens,
        tokenizer=tokenizer,
    )
    again = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = again.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert ids.tolist()[0] == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    hf = from_pretrained(out)
    with torch.no_grad():
        want = hf(ids).logits.numpy()
    np.testing.assert_allclose(logits(loaded.model, loaded.base, ids.numpy()), want, atol=1e-3)
    answer = hf.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in again.decode(answer)
    assert int(answer[-1]) in loaded.stop_tokens
