"""Every method that samples: its keys can be listed and read, and its parts are built from them."""

from __future__ import annotations

import json

import pytest

from jaxalign import api
from jaxalign.api import method_settings, read_run
from jaxalign.config import describe, load_config
from jaxalign.errors import UserError
from jaxalign.registry import METHODS, OBJECTIVES, ONLINE
from jaxalign.rl.settings import OnlineConfig

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
REWARD = "rewards.length.most=20"


@pytest.mark.parametrize("name", [*ONLINE])
def test_its_keys_have_help_and_its_defaults_are_allowed(name):
    kind = ONLINE[name].config
    rows = describe(kind)
    assert not [row.key for row in rows if not row.help]
    config = load_config(kind, overrides=[REWARD])
    again = load_config(kind, values={k: v for k, v in config.model_dump().items() if k in ("n", "rewards")})
    assert again.rewards == config.rewards == {"length": {"most": 20}}


@pytest.mark.parametrize("name", [*ONLINE])
def test_its_parts_take_their_keys_from_it(name):
    """The loss, the estimator or the selection: whatever the run builds of the configuration's fields."""
    method = ONLINE[name]
    config = load_config(method.config, overrides=[REWARD])
    parts = [part for part in method.run.args if hasattr(part, "model_fields")]
    assert parts
    for part in parts:
        built = part(**{key: getattr(config, key) for key in part.model_fields})
        assert type(built) is part


@pytest.mark.parametrize("name", [name for name in ONLINE if ONLINE[name].loss])
def test_no_key_of_a_loss_is_another_key_of_the_run(name):
    """One that both have means the same in both: an epsilon of the clipping is none of the optimiser."""
    loss, estimator = ONLINE[name].run.args[1:3]
    own = {*loss.model_fields, *estimator.model_fields}
    assert own & set(OnlineConfig.model_fields) <= {"temperature", "kl_coef", "costs"}
    config = load_config(ONLINE[name].config, overrides=[REWARD])
    assert (config.adam_epsilon, getattr(config, "epsilon", 0.2)) == (1e-8, 0.2)


def test_other_defaults_keep_their_bounds():
    for name, key in (("ppo", "n"), ("rloo", "kl_coef"), ("online_dpo", "temperature"), ("rso", "n")):
        with pytest.raises(UserError, match=key):
            load_config(ONLINE[name].config, overrides=[REWARD, f"{key}=-1"])


def test_a_method_is_found_by_either_kind_of_name():
    assert not set(OBJECTIVES) & set(ONLINE)
    assert set(METHODS) == set(OBJECTIVES) | set(ONLINE)
    assert read_run("grpo", overrides=[REWARD], values={"model": "m", "data": "d", "out": "o"}).config.n == 8
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        method_settings("grpoo")


@pytest.mark.parametrize("name", [*ONLINE])
def test_every_method_has_a_plan(name, tmp_path):
    """Memory of updates, and of rollouts for methods that sample while they learn."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    keys = {"model": str(tmp_path), "max_length": 1024}
    run = read_run(name, overrides=[REWARD], values=keys, needs=("model",))
    facts = api.plan_of(run, on="h100:8").as_dict()
    assert facts["memory of a device"]["total"] > 16e9 / 8
    samples = ONLINE[name].loss is not None
    assert ("rollout" in facts) == ("memory of a device while sampling" in facts) == samples


def test_the_plan_of_a_rollout_is_arithmetic(tmp_path):
    """Bytes of keys and values: slots x length x layers x 2 x heads x size x 2."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    given = {"model": str(tmp_path), "max_length": 2048, "batch_size": 16, "n": 4, "max_tokens": 256}
    more = ["rollout_batch_size=128", "minibatches=2", "kl_coef=0.1"]
    plans = {
        name: api.plan_of(
            read_run(name, overrides=[REWARD, *more], values=given, needs=("model",)), on="h200:8"
        ).as_dict()
        for name in ("grpo", "ppo")
    }
    sampling = plans["grpo"]["memory of a device while sampling"]
    assert sampling["cache"] == 128 / 8 * 2048 * 32 * 2 * 8 * 128 * 2
    assert sampling["merged weights"] == pytest.approx(2 * 2 * 8.03e9 / 8, rel=1e-3)
    assert sampling["total"] == sum(v for k, v in sampling.items() if k != "total")
    assert plans["grpo"]["rollout"]["answers"] == 16 * 2 * 4
    assert plans["grpo"]["rollout"]["tokens drawn"] == 16 * 2 * 4 * 256
    assert plans["grpo"]["step"]["tokens"] == plans["ppo"]["step"]["tokens"] == 16 * 4 * 2048
    one, two = (plans[name]["parameters"]["adapter"] for name in ("grpo", "ppo"))
    assert two == 2 * one


def test_rollouts_that_do_not_fit_are_a_problem(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    values = {"model": str(tmp_path), "rollout_batch_size": 4096, "quantise": "nf4"}
    run = read_run("grpo", overrides=[REWARD], values=values, needs=("model",))
    problems = api.plan_of(run, on="l4").problems
    assert any("rollout_batch_size" in problem for problem in problems)
