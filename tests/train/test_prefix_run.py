"""Prefix and prompt tuning as keys of a run: what they mean, what they refuse, and one whole run of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxalign.api import read_run
from jaxalign.config import dump_config, load_config
from jaxalign.errors import UserError
from jaxalign.models.adapters import LoraConfig
from jaxalign.models.decoder import Adapter
from jaxalign.models.export import export_peft
from jaxalign.models.load import load_model
from jaxalign.models.prefix import PrefixConfig, PromptConfig
from jaxalign.models.source import resolve
from jaxalign.objectives.sft import SFT
from jaxalign.preflight import plan_run, read_config
from jaxalign.registry import ADAPTERS
from jaxalign.sharding import make_mesh
from jaxalign.train.assemble import learning_rate
from jaxalign.train.folder import adopt
from jaxalign.train.metrics import read_lines
from jaxalign.train.run import train
from jaxalign.train.settings import TrainConfig, config_for, differences
from tests.train.tiny import write_model, write_rows

PREFIX, PROMPT = PrefixConfig(length=4), PromptConfig(length=4)
KEYS = ["max_steps=3", "batch_size=8", "log_every=1", "dtype=f32"]


def settings(*keys: str, method: str = "sft") -> TrainConfig:
    return load_config(config_for(method), overrides=keys)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, rows, and an adapter of each kind."""
    root = tmp_path_factory.mktemp("virtual")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXALIGN_CACHE", str(root / "cache"))
        source = resolve(str(root / "model"))
        for kind in (PREFIX, PROMPT, LoraConfig(rank=2)):
            loaded = load_model(source, make_mesh(), adapter=kind)
            tree = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), loaded.model.shapes()[0])
            export_peft(loaded.model, tree, source, root / kind.key, base_hash=loaded.base_hash)
        yield root


# -------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("keys", "trains", "named"),
    [
        ((), LoraConfig(), False),
        (("lora.rank=4",), LoraConfig(rank=4), True),
        (("lora=null",), None, True),
        (("prefix.length=4",), PREFIX, True),
        (("prefix={}",), PrefixConfig(), True),
        (("prompt.length=4",), PROMPT, True),
        (("lora=null", "prompt.length=4"), PROMPT, True),
        (("prefix=null", "prompt=null"), LoraConfig(), False),
    ],
    ids=lambda v: " ".join(v) or "nothing" if isinstance(v, tuple) else "",
)
def test_what_trains(keys: tuple[str, ...], trains: Adapter | None, named: bool, tmp_path: Path) -> None:
    """Naming a kind switches the default off, in what is written down and read back too."""
    config = settings(*keys)
    assert (config.adapter, config.names_adapter) == (trains, named)
    assert [config.lora, config.prefix, config.prompt].count(None) == 3 - (trains is not None)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(config_for("sft"), [tmp_path / "config.yaml"]) == config
    run = read_run("sft", overrides=keys, values={"model": "m"}, needs=("model",))
    assert (run.config, run.config.names_adapter) == (config, named)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("prefix.length=4", "lora.rank=4"), "lora: a run trains one adapter: set prefix=null or lora=null"),
        (("prompt.length=4", "prefix.length=4"), "prompt: a run trains one adapter: set prefix=null or"),
        (("prefix.length=0",), "prefix.length: input should be greater than or equal to 1"),
        (("prefix.rank=4",), "prefix.rank: unknown key; did you mean 'lora.rank'"),
        (("prompt.tokens=[-1]",), "prompt.tokens.0: input should be greater than or equal to 0"),
        (("prompt.tokens=[1]", "prompt.text=a"), "prompt: tokens and text are two ways to start"),
        (("prompt.text=a", "prompt.init=normal"), "prompt: text and init=normal are two ways to start"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_refused_keys(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*keys)
    assert said in str(caught.value)


def test_a_second_kind_is_found_across_files(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(dump_config(settings()))
    with pytest.raises(UserError, match=r"old.yaml:\d+: lora: a run trains one adapter"):
        load_config(config_for("sft"), [file], ["prefix.length=4"])
    assert load_config(config_for("sft"), [file], ["prefix.length=4", "lora=null"]).adapter == PREFIX


@pytest.mark.parametrize("adapter", [LoraConfig(rank=3), PREFIX, PROMPT, None], ids=str)
def test_an_adapter_has_one_place(adapter: Adapter | None) -> None:
    config = settings().with_adapter(adapter)
    assert config.adapter == adapter
    assert [getattr(config, name) for name in ADAPTERS].count(None) == 3 - (adapter is not None)


def test_a_resumed_run_keeps_its_kind() -> None:
    """Left open, it is the folder's; named, it is compared."""
    recorded = {"config": settings("prefix.length=4").model_dump(mode="json")}
    assert adopt(settings("log_every=2"), recorded).adapter == PREFIX
    changed = adopt(settings("prompt.length=4"), recorded).model_dump(mode="json")
    named = differences(recorded["config"], changed)
    assert {"prefix.length: 4 -> None", "prompt.length: None -> 4"} <= set(named)
    before = {k: v for k, v in settings().model_dump(mode="json").items() if k not in ("prefix", "prompt")}
    assert differences(before, settings().model_dump(mode="json")) == []  # a run of an older release


def test_learning_rates() -> None:
    """Virtual tokens are few and far from where they should be: they move faster than low-rank factors."""
    rates = {name: learning_rate(settings(*keys), SFT.rates) for name, keys in RATES.items()}
    assert rates["lora"] == 2e-4
    assert rates["full"] == 2e-5
    assert 1e-3 <= rates["prompt"] <= 3e-2  # the specification's for large and for small models
    assert rates["prefix"] == 3e-2
    assert learning_rate(settings("prefix={}", "learning_rate=0.5"), SFT.rates) == 0.5


RATES = {"lora": (), "full": ("lora=null",), "prefix": ("prefix={}",), "prompt": ("prompt={}",)}


# ----------------------------------------------------------------------------------- in front of a run


@pytest.mark.parametrize(("kind", "count"), [("prefix", 2 * 2 * 4 * 4 * 8), ("prompt", 4 * 32)])
def test_a_plan_counts_them(here: Path, kind: str, count: int) -> None:
    """Two layers of 4 heads of 8 numbers, keys and values; or one vector of 32 for each."""
    model = str(here / "model")
    plan = plan_run("sft", model, None, settings(f"{kind}.length=4", "max_length=508"), on="h100")
    plain = plan_run("sft", model, None, settings("lora.rank=1", "max_length=508"), on="h100")
    assert plan.value("parameters", "adapter") == plan.value("parameters", "trained") == count
    assert plan.value("memory of a device", "adapters") == 4 * count
    assert plan.value("memory of a device", "optimiser") == pytest.approx(8 * count, abs=8)  # and a counter
    # each token's scores and sums with four more keys in two layers, backward too
    lora = 6 * plain.value("parameters", "adapter")
    more = plan.value("step", "work per token") - (plain.value("step", "work per token") - lora)
    assert more == pytest.approx(3 * 4 * 4 * 32 * 2)
    assert plan.problems == []
    long = plan_run("sft", model, None, settings(f"{kind}.length=5", "max_length=508"), on="h100")
    assert long.problems == ["max_length 508 behind 5 virtual tokens is over the model's 512 positions"]


def test_a_plan_reads_the_adapter_as_a_run_does(here: Path) -> None:
    for kind in (PREFIX, PROMPT, LoraConfig(rank=2, targets=("q", "k", "v", "o", "gate", "up", "down"))):
        _, adapter, imported = read_config(str(here / kind.key), settings())
        assert (adapter, imported) == (kind, True)
    assert read_config(str(here / "model"), settings())[1:] == (LoraConfig(), False)
    assert read_config(str(here / "lora"), settings("lora=null"))[1:] == (None, True)
    plans = [
        plan_run("dpo", str(here / "prefix"), None, settings(method="dpo"), on="h100"),
        plan_run("dpo", str(here / "model"), None, settings("prefix.length=4", method="dpo"), on="h100"),
    ]
    frozen, off = (plan.value("memory of a device", "total") for plan in plans)
    assert frozen - off == 4 * plans[0].value("parameters", "adapter")  # the reference is the adapter before


@pytest.mark.parametrize(
    ("model", "key", "said"),
    [
        ("prefix", "prefix.length=5", r"prefix.length: the adapter has length 4, the run asks for 5"),
        ("prefix", "lora.rank=5", "of kind PREFIX_TUNING, the run asks for LORA"),
        ("prompt", "lora=null", "the prompt that the model comes with cannot be folded into them"),
        ("lora", "prefix={}", "of kind LORA, the run asks for PREFIX_TUNING"),
        ("model", "prompt.tokens=[999]", "there is no token 999, the model knows 0 to 263"),
        ("model", "prompt.length=500", "tokens behind 500 virtual ones, the model has 512 positions"),
    ],
)
def test_refused(here: Path, tmp_path: Path, model: str, key: str, said: str) -> None:
    """By the run, and by the plan of it where no weight has to be read."""
    with pytest.raises(UserError, match=said):
        train("sft", str(here / model), here / "rows.jsonl", tmp_path / "out", settings(*KEYS, key))
    if model != "model":
        with pytest.raises(UserError, match=said):
            plan_run("sft", str(here / model), None, settings(*KEYS, key), on="h100")


# ------------------------------------------------------------------------------------------ whole runs


FAST = ("prefix.length=4", "learning_rate=0.5", "warmup_ratio=0", "schedule=constant")


def test_a_prefix_trains_and_trains_on(here: Path, tmp_path: Path) -> None:
    """The run's result is a PEFT adapter, from which the next run starts without being told the kind."""
    data = here / "rows.jsonl"
    first = train("sft", str(here / "model"), data, tmp_path / "a", settings(*KEYS, *FAST))
    losses = [row["loss"] for row in read_lines(first.folder / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    written = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert (written["lora"], written["prompt"], written["prefix"]) == (None, None, {"length": 4})
    saved = json.loads((first.result / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)
    second = train("sft", str(first.folder), data, tmp_path / "b", settings(*KEYS))
    again = [row["loss"] for row in read_lines(second.folder / "metrics.jsonl") if "loss" in row]
    assert again[0] < losses[0] - 0.05
    kept = yaml.safe_load((second.folder / "config.yaml").read_text())
    assert kept["prefix"] == {"length": 4}
    assert kept["learning_rate"] == learning_rate(settings("prefix={}"), SFT.rates)


@pytest.mark.slow
def test_words_to_start_from(here: Path, tmp_path: Path) -> None:
    """Before the first step that moves anything: rows of the embedding, repeated and cut to length."""
    keys = [*KEYS, "max_steps=1", "prompt.length=5", "prompt.text=abc"]
    result = train("sft", str(here / "model"), here / "rows.jsonl", tmp_path / "a", settings(*keys))
    got = load_model(resolve(str(result.folder)), make_mesh())
    assert got.adapter is not None
    rows = np.asarray(got.base["embed"]["embedding"])
    ids = [int(np.abs(rows - v).max(axis=1).argmin()) for v in np.asarray(got.adapter["prompt"]["adapter"])]
    tokens = json.loads((here / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert ids == [tokens[c] for c in "abcab"]
    again = train("sft", str(here / "model"), here / "rows.jsonl", tmp_path / "a", settings(*keys))
    assert again.resumed_from == 1


def test_a_moving_reference_may_be_mixed_of_virtual_tokens(here: Path) -> None:
    keys = ["reference.mode=ema", "reference.mix=0.5"]
    model = str(here / "model")
    plan = plan_run("dpo", model, None, settings(*keys, "prefix.length=4", method="dpo"), on="h100")
    assert plan.value("memory of a device", "reference") == 4 * plan.value("parameters", "trained")
    with pytest.raises(UserError, match="adapters cannot be mixed"):
        plan_run("dpo", model, None, settings(*keys, method="dpo"), on="h100")
