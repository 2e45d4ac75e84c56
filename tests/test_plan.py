"""The arithmetic of a plan, against counts known otherwise and programs compiled for a real device."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxalign.config import load_config
from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Model
from jaxalign.plan import (
    Job,
    Machine,
    Plan,
    attention_flops,
    flops_per_token,
    machine_named,
    make_plan,
)
from jaxalign.preflight import optimizer_share, plan_run, read_config
from jaxalign.registry import FAMILIES
from jaxalign.sharding import MeshConfig, mesh_sizes
from jaxalign.terminal import human
from jaxalign.train.flops import Work, training_cost
from jaxalign.train.settings import config_for

MEMORY = "memory of a device"
LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 8192}
SMOLLM = LLAMA | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_1B = LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
LORA = LoraConfig()
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def decoder(raw: dict[str, Any]) -> DecoderConfig:
    return FAMILIES[raw["model_type"]].from_hf(raw)


def job(raw: dict[str, Any], lora: LoraConfig | None = LORA, remat: str = "none", **keys: Any) -> Job:
    model = Model(decoder(raw), lora, remat=remat)
    keys = {"mesh": ONE, "machine": machine_named("h200"), "rows": 4, "length": 2048} | keys
    return Job(model, **keys)


def memory(plan: Plan, name: str) -> float:
    return plan.value(MEMORY, name)


def test_parameters_of_a_known_model():
    plan = make_plan(job(SMOLLM))
    assert plan.value("parameters", "base") == 134_515_008  # what its publisher counts
    # rank 16 on all seven linear layers: 16 (in + out) each
    per_layer = 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert plan.value("parameters", "adapter") == 30 * per_layer
    assert memory(plan, "weights") == 134_515_008 * 2
    assert memory(plan, "adapters") == 30 * per_layer * 4
    assert memory(plan, "optimiser") == 30 * per_layer * 8
    assert plan.value("parameters", "checkpoint") == 30 * per_layer * 12


# Temporary memory that XLA reports for one H200, in GB: LoRA of rank 16 on all linear layers, bfloat16,
# a flash attention, chunked logits, T = 2048.
@pytest.mark.parametrize(
    ("raw", "rows", "remat", "compiled"),
    [(LLAMA_8B, 4, "none", 67.7), (LLAMA_8B, 4, "full", 4.5), (LLAMA_1B, 16, "none", 75.9)],
)
def test_activations_agree_with_compiled_programs(raw, rows, remat, compiled):
    plan = make_plan(job(raw, remat=remat, rows=rows))
    temporary = memory(plan, "activations") + memory(plan, "logits")
    assert temporary / 1e9 == pytest.approx(compiled, rel=0.1)


def test_a_leaner_policy_needs_less_memory_and_more_work():
    plans = [make_plan(job(LLAMA_1B, remat=remat)) for remat in ("none", "dots", "full")]
    kept = [memory(p, "activations") for p in plans]
    work = [p.value("step", "work per token") for p in plans]
    assert kept == sorted(kept, reverse=True)
    assert work == sorted(work)
    assert len(set(kept)) == len(set(work)) == 3


@pytest.mark.parametrize("lora", [LoraConfig(), None])
def test_work_agrees_with_the_training_run_s_own_count(lora):
    """Rows of T tokens attend to T (T + 1) / 2 pairs; the run does not count the adapter's own products."""
    length = 1024
    model = job(SMOLLM, lora).model
    adapter, base = model.shapes()
    cost = training_cost(base, heads=9, head_dim=64, full=lora is None)
    counted = cost.of(Work(length, length * (length + 1) // 2 * 30, length)) / length
    own = 6 * sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert flops_per_token(model, length) - own == pytest.approx(counted, rel=1e-3)


def test_a_window_cuts_attention_to_what_it_sees():
    full = decoder(SMOLLM)
    (rope, _), *_ = full.kinds
    length, window = 512, 64
    cut = replace(full, kinds=((rope, window),))
    seen = sum(min(i + 1, window) for i in range(length)) / length
    assert attention_flops(cut, length) == pytest.approx(4 * 9 * 64 * 30 * seen, rel=0.01)
    assert attention_flops(replace(full, kinds=((rope, length),)), length) == attention_flops(full, length)


def test_devices_share_what_the_rules_shard():
    one = make_plan(job(LLAMA_8B))
    mesh = mesh_sizes(MeshConfig(fsdp=4, tensor=2), 8)
    many = make_plan(job(LLAMA_8B, mesh=mesh, machine=replace(machine_named("h200"), count=8)))
    # all but the norms' scales, which only fsdp cuts
    assert memory(many, "weights") == pytest.approx(memory(one, "weights") / 8, rel=1e-3)
    # rows over fsdp; the residual stream of a row is whole on both tensor devices
    assert memory(one, "activations") / 8 < memory(many, "activations") < memory(one, "activations") / 4
    assert many.value("step", "time") == pytest.approx(one.value("step", "time") / 8)
    assert many.value("step", "tokens") == one.value("step", "tokens")


def test_full_training_holds_float32_weights_moments_and_gradients():
    plan = make_plan(job(SMOLLM, None))
    count = 134_515_008
    assert memory(plan, "weights") == count * (4 + 2)
    assert memory(plan, "gradients") == count * 4
    assert memory(plan, "optimiser") == count * 8
    assert plan.value("parameters", "trained") == count


def test_accumulation_keeps_memory_and_multiplies_tokens():
    one, four = make_plan(job(SMOLLM)), make_plan(job(SMOLLM, accumulation=4))
    assert four.value("step", "tokens") == 4 * one.value("step", "tokens")
    assert memory(four, "activations") == memory(one, "activations")
    assert memory(four, "gradients") == 2 * memory(one, "gradients")


@pytest.mark.parametrize(("name", "slots"), [("adamw", 2.0), ("lion", 1.0), ("sgd", 1.0)])
def test_optimiser_state_is_counted_from_the_optimiser(name, slots):
    config = load_config(config_for("sft"), overrides=[f"optimizer={name}"])
    assert optimizer_share(job(SMOLLM).model, config) == pytest.approx(slots, rel=1e-4)


def test_what_cannot_work_is_named():
    mesh = mesh_sizes(MeshConfig(fsdp=1, tensor=5), 5)
    plan = make_plan(job(SMOLLM, mesh=mesh, rows=4, length=9000))
    assert "axis 'heads' of size 576 does not divide over 5 devices" in plan.problems
    assert any("max_length 9000 is over the model's 8192 positions" in p for p in plan.problems)
    small = make_plan(job(LLAMA_8B, machine=Machine("NVIDIA L4", 24e9)))
    assert any("GB a device and there are 24.0" in p and "remat=full" in p for p in small.problems)


def test_a_mesh_that_does_not_cover_the_devices_is_refused():
    assert mesh_sizes(MeshConfig(), 8) == {"data": 1, "fsdp": 8, "tensor": 1}
    with pytest.raises(UserError, match="data=1 x fsdp=3 x tensor=1 does not cover 8"):
        mesh_sizes(MeshConfig(fsdp=3), 8)


@pytest.mark.parametrize("text", ["h100:0", "h100:x", "h9000", "", "h100:-1"])
def test_an_unknown_machine_is_refused(text):
    with pytest.raises(UserError, match="unknown machine"):
        machine_named(text)


def test_every_known_machine_has_a_peak_and_a_size():
    from jaxalign.plan import MACHINES
    from jaxalign.train.flops import peak_flops

    for name in MACHINES:
        machine = machine_named(name)
        assert peak_flops(machine.kind, "bf16"), name
        assert machine.memory
        assert machine.memory > 1e10


def _folder(tmp_path, raw: dict[str, Any]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return str(tmp_path)


def settings(*overrides: str):
    return load_config(config_for("sft"), overrides=overrides)


def test_plan_takes_the_policy_that_fits(tmp_path):
    model = _folder(tmp_path, LLAMA_8B)
    rows = ("batch_size=4", "max_length=2048")
    notes = {on: _remat(plan_run("sft", model, None, settings(*rows), on=on)) for on in ("h200", "l40s")}
    assert notes == {"h200": "remat=none", "l40s": "remat=full"}
    assert _remat(plan_run("sft", model, None, settings(*rows, "remat=dots"), on="h200")) == "remat=dots"


def _remat(plan: Plan) -> str:
    return next(f.note for f in plan.facts if f.name == "activations")


def test_plan_of_this_machine_counts_its_devices(tmp_path):
    plan = plan_run("sft", _folder(tmp_path, SMOLLM), None, settings("max_steps=7"))
    assert plan.value("step", "tokens") == 8 * 1024  # eight simulated devices, a row each
    assert plan.value("run", "steps") == 7


def test_plan_counts_the_rows_of_real_data(tmp_path, monkeypatch):
    """Rows are tokenised as the run would: lengths, steps and tokens are the data's own."""
    from jaxalign.data import chat
    from tests.data.toy import toy

    monkeypatch.setattr(chat, "load_tokenizer", lambda source: toy())
    monkeypatch.setattr("jaxalign.preflight.resolve", lambda model: None)
    rows = [{"text": "hello " * n} for n in range(1, 31)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = settings("batch_size=8", "epochs=2")
    plan = plan_run("sft", _folder(tmp_path, SMOLLM), str(data), config, on="h100")
    assert plan.value("run", "examples") == 30
    assert plan.value("run", "steps an epoch") == 4
    assert plan.value("run", "steps") == 8
    assert plan.value("step", "tokens") < 8 * 1024


def test_the_config_of_a_multimodal_model_is_that_of_its_language_model(tmp_path):
    raw, *rest = read_config(_folder(tmp_path, {"model_type": "llava", "text_config": SMOLLM}), settings())
    assert raw == SMOLLM
    assert rest == [LoraConfig(), False]


def test_a_hub_model_that_cannot_be_reached_is_a_user_error():
    with pytest.raises(UserError, match=r"no config.json of 'nobody/nothing'"):
        read_config("nobody/nothing", settings())


def test_numbers_are_shown_in_units_a_person_reads():
    from jaxalign.plan import Fact

    shown = {
        human(Fact("", "", value, unit))
        for value, unit in [
            (16.1e9, "bytes"),
            (2.61e14, "FLOPs"),
            (258, ""),
            (0.66, "s"),
            (4320, "s"),
            (90, "s"),
        ]
    }
    assert shown == {"16.1 GB", "261 TFLOPs", "258", "660 ms", "1 h 12 min", "90 s"}


def test_a_quantised_base_is_smaller(tmp_path):
    """NF4 with double quantisation takes 4.127 bits a number; embedding and norms stay as they are."""
    folder, sizes = _folder(tmp_path, SMOLLM), []
    for kind in ("none", "int8", "nf4"):
        config = load_config(config_for("dpo"), overrides=[f"quantise={kind}"])
        plan = plan_run("dpo", folder, None, config, on="h100")
        sizes.append(plan.value("memory of a device", "weights"))
    kernels = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert sizes[0] - sizes[1] == pytest.approx(kernels * (16 - 8) / 8)
    assert sizes[0] - sizes[2] == pytest.approx(kernels * (16 - 4.127) / 8)


def test_the_reference_is_in_the_plan(tmp_path):
    """A frozen copy takes memory, and its forward pass time; log-probs from a file neither."""
    folder, found = _folder(tmp_path, SMOLLM), {}
    asked = {mode: f"reference.mode={mode}" for mode in ("adapter_off", "frozen", "precomputed")}
    for mode, key in (asked | {"staged": "stages.count=2"}).items():
        keys = [key, "batch_size=8"]
        found[mode] = plan_run("dpo", folder, None, load_config(config_for("dpo"), overrides=keys), on="h100")
    memory = {mode: plan.value("memory of a device", "total") for mode, plan in found.items()}
    work = {mode: plan.value("step", "work per token") for mode, plan in found.items()}
    adapter = found["frozen"].value("parameters", "adapter")
    assert memory["frozen"] - memory["adapter_off"] == pytest.approx(4 * adapter)
    assert memory["adapter_off"] == memory["precomputed"]
    assert memory["frozen"] == memory["staged"]
    assert work["frozen"] == work["adapter_off"] > 1.4 * work["precomputed"]
    assert found["frozen"].value("step", "tokens") == 8 * 2 * 1024
