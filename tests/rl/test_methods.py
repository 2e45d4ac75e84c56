"""Every method that samples: its keys can be listed and read, and its parts are built from them."""

from __future__ import annotations

import pytest

from jaxalign.api import method_settings, read_run
from jaxalign.config import describe, load_config
from jaxalign.errors import UserError
from jaxalign.registry import METHODS, OBJECTIVES, ONLINE

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


def test_a_method_is_found_by_either_kind_of_name():
    assert not set(OBJECTIVES) & set(ONLINE)
    assert set(METHODS) == set(OBJECTIVES) | set(ONLINE)
    assert read_run("grpo", overrides=[REWARD], values={"model": "m", "data": "d", "out": "o"}).config.n == 8
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        method_settings("grpoo")


def test_what_has_no_plan_says_so():
    from jaxalign import api

    run = read_run("grpo", overrides=[REWARD], values={"model": "m"}, needs=("model",))
    with pytest.raises(UserError, match="plan"):
        api.plan_of(run)
