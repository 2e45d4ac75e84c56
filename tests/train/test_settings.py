"""The keys of a run: a method's own among them, and which of them a resumed run may change."""

from __future__ import annotations

import pytest

from jaxalign.config import describe, dump_config, load_config
from jaxalign.errors import UserError
from jaxalign.registry import OBJECTIVES
from jaxalign.train.folder import adopt
from jaxalign.train.settings import TrainConfig, config_for, differences, objective_for


@pytest.mark.parametrize("method", list(OBJECTIVES))
def test_a_methods_own_keys_are_keys_of_its_run(method: str) -> None:
    cls = config_for(method)
    own = set(OBJECTIVES[method].model_fields)
    rows = {row.key: row for row in describe(cls)}
    assert own <= set(rows)
    assert all(row.help for row in rows.values()), "every key is explained"
    assert objective_for(method, cls()) == OBJECTIVES[method]()


def test_the_objective_gets_its_values() -> None:
    config = load_config(config_for("sft"), overrides=["label_smoothing=0.1"])
    assert objective_for("sft", config).label_smoothing == 0.1


def test_no_key_hides_another() -> None:
    for method in OBJECTIVES:
        assert not set(OBJECTIVES[method].model_fields) & set(TrainConfig.model_fields)


def test_a_run_is_read_back_as_it_was_written(tmp_path) -> None:
    config = load_config(config_for("sft"), overrides=["lora.rank=4", "optimizer=lion", "mesh.tensor=2"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(config_for("sft"), [tmp_path / "config.yaml"]) == config


def test_typos_are_answered() -> None:
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        load_config(config_for("sft"), overrides=["learning_rat=1"])
    with pytest.raises(UserError, match=r"schedule.*did you mean 'cosine'"):
        load_config(config_for("sft"), overrides=["schedule=cosin"])


def _dump(**keys: object) -> dict:
    return load_config(config_for("sft"), values=keys).model_dump(mode="json")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"learning_rate": 1e-3}, ["learning_rate: None -> 0.001"]),
        ({"lora.rank": 8, "seed": 1}, ["lora.rank: 16 -> 8", "seed: 0 -> 1"]),
        ({"log_every": 1, "checkpoint_every": 7, "mesh.tensor": 2, "remat": "full"}, []),
        ({"max_steps": 5}, []),  # checked in steps
        ({"grad_accumulation": 2}, []),
    ],
)
def test_differences(keys: dict, named: list[str]) -> None:
    assert differences(_dump(), _dump(**keys)) == named


def test_switching_adapters_off_differs() -> None:
    assert "lora.rank: 16 -> None" in differences(_dump(), _dump(lora=None))


def test_open_keys_stay_as_the_run_resolved_them() -> None:
    first = config_for("sft")(batch_size=24, learning_rate=0.5, dtype="bf16", lora={"rank": 3})
    recorded = {"config": first.model_dump(mode="json")}
    adopted = adopt(config_for("sft")(log_every=2), recorded)
    assert (adopted.batch_size, adopted.learning_rate, adopted.dtype) == (24, 0.5, "bf16")
    assert adopted.lora is not None
    assert adopted.lora.rank == 3
    assert adopted.log_every == 2
    explicit = adopt(config_for("sft")(batch_size=8, dtype="f32", lora=None), recorded)
    assert (explicit.batch_size, explicit.dtype, explicit.lora) == (8, "f32", None)
