"""Weighted sums of losses over pairs: the published mixture, sums of parts, and what is no part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxalign.config import dump_config, load_config
from jaxalign.errors import UserError
from jaxalign.objectives.answers import Pair
from jaxalign.objectives.base import Scores
from jaxalign.objectives.composite import WPO
from jaxalign.objectives.mix import MPO, ChosenNLL, Mix
from jaxalign.objectives.pairwise import DPO, IPO, ODPO, BCOPair
from jaxalign.objectives.transport import AOT
from jaxalign.registry import OBJECTIVES
from jaxalign.train.settings import config_for, objective_for
from tests.objectives.preference_vectors import FIXTURE
from tests.objectives.test_pairs import batch_for, fixture_pair, published, scores  # noqa: F401
from tests.tiny import quick_jit


def fixture_scores() -> Scores:
    """The shared fixture, each answer's log-prob spread evenly over its tokens."""
    both = lambda name: np.stack([FIXTURE[f"{name}_{end}"] for end in "wl"], axis=1)  # noqa: E731
    length = both("len")[..., None]
    mask = np.arange(10) < length
    spread = lambda name: jnp.asarray(np.where(mask, both(name)[..., None] / length, 0), jnp.float32)  # noqa: E731
    zeros = jnp.zeros(mask.shape)
    return Scores(spread("pi"), zeros, zeros, zeros, zeros, jnp.asarray(mask), ref=spread("ref"))


def fixture_mean(objective: Any) -> float:
    s = fixture_scores()
    batch = batch_for(s)
    batch.aux["tokens_per_group"] = jnp.full(2, np.mean(FIXTURE["len_w"]))
    total, count, _ = objective(s, batch)
    return float(total / count)


def test_the_published_mixture(published: dict[str, Any]) -> None:  # noqa: F811
    assert fixture_mean(MPO()) == pytest.approx(published["mpo_trl_mix"]["expected"]["loss"], rel=1e-5)
    rpo = published["rpo_dpo_plus_sft"]["expected"]["iterative_rpo_alpha1"]
    assert fixture_mean(Mix()) == pytest.approx(rpo, rel=1e-5)


def test_the_published_mixture_kept_here() -> None:
    assert fixture_mean(MPO()) == pytest.approx(2.809585473, rel=1e-5)
    assert fixture_mean(ChosenNLL()) == pytest.approx(2.0, rel=1e-5)


PARTS = {
    "ipo": (0.5, IPO(beta=0.3, length_norm=False)),
    "wpo": (2.0, WPO()),
    "aot": (0.25, AOT(beta=0.7)),
    "odpo": (1.0, ODPO(scale="identity")),
    "sft": (0.3, ChosenNLL()),
}
MIXED = Mix(
    losses={
        "ipo": {"weight": 0.5, "beta": 0.3, "length_norm": False},
        "wpo": 2,
        "aot": {"weight": 0.25, "beta": 0.7},
        "odpo": {"scale": "identity"},
        "sft": 0.3,
    }
)


def test_value_and_gradient_are_the_weighted_sum_of_its_parts() -> None:
    s = scores(5)
    batch = batch_for(s)

    def slope(objective: Any) -> Any:
        return jax.value_and_grad(lambda logp: objective(replace(s, logp=logp), batch)[0])(s.logp)

    got, each = quick_jit(lambda: (slope(MIXED), {n: slope(o) for n, (_, o) in PARTS.items()}))()
    for i in (0, 1):
        want = sum(weight * each[name][i] for name, (weight, _) in PARTS.items())
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
    assert np.asarray(got[1]).any()


def test_it_asks_for_what_its_parts_ask_for_and_shows_them() -> None:
    assert MIXED.needs == {"ref", "collision", "whole_batch", "margin", "tokens_per_group"}
    assert Mix(losses={"simpo": 1}).needs == frozenset()
    s = scores(4)
    metrics = MIXED(s, batch_for(s))[2]
    for name, (_, part) in PARTS.items():
        total, count, _ = part(s, batch_for(s))
        np.testing.assert_allclose(metrics[f"losses/{name}"], (total, count), rtol=1e-5)
    own = PARTS["ipo"][1](s, batch_for(s))[2]["rewards/chosen"]
    np.testing.assert_allclose(metrics["rewards/chosen"], own, rtol=1e-6)
    assert MIXED.fault({"margin": 1.0}) is None
    assert "margin" in str(MIXED.fault({"margin": 0.0}))


def test_one_beta_for_all_or_each_its_own() -> None:
    shared = Mix(losses={"dpo": 1, "bco_pair": {"weight": 1, "beta": 0.5}, "sft": 1}, beta=0.2).parts
    assert (shared["dpo"][1], shared["bco_pair"][1]) == (DPO(beta=0.2), BCOPair(beta=0.5))
    assert Mix(losses={"bco_pair": 1}).parts["bco_pair"][1] == BCOPair()
    pair = fixture_pair([])
    np.testing.assert_allclose(
        MPO(beta=0.2).parts["dpo"][1].loss(pair), DPO(beta=0.2).loss(Pair(pair.chosen, pair.rejected))
    )


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"dppo": 1}, "unknown loss 'dppo'; did you mean 'dpo'"),
        ({"kto": 1}, "kto is not a loss over pairs of answers"),
        ({"reward": 1}, "reward is not a loss over pairs"),
        ({"mpo": 1}, "mpo is not a loss over pairs of answers; did you mean"),
        ({"sft": 1}, "no loss that compares answers"),
        ({}, "no loss that compares answers"),
        ({"dpo": 0}, "dpo: the weight is not a number above 0"),
        ({"dpo": "much"}, "dpo: the weight is not a number above 0"),
        ({"dpop": {"penalti": 1}}, "dpop.penalti: unknown key; did you mean 'penalty'"),
        ({"dpop": {"penalty": -1}}, "dpop.penalty: input should be greater than or equal to 0"),
        ({"robust": {"label_smoothing": 0.5}}, "robust.label_smoothing: input should be less than 0.5"),
    ],
)
def test_what_is_no_part(losses: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Mix(losses=losses)


def test_keys_of_the_command_line(tmp_path: Any) -> None:
    cls = config_for("mix")
    config = load_config(cls, overrides=["losses={dpo: 0.8, sft: 1}", "losses.bco_pair=0.2", "beta=0.1"])
    assert objective_for("mix", config).parts == MPO().parts
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(cls, [tmp_path / "c.yaml"]) == config
    with pytest.raises(UserError, match=r"losses=.*: losses: unknown loss 'dppo'; did you mean 'dpo'"):
        load_config(cls, overrides=["losses={dppo: 1}"])
    with pytest.raises(UserError, match=r"simpo.beta: input should be greater than or equal to 1"):
        load_config(cls, overrides=["losses={simpo: 1, dpo: 1}", "beta=0.1"])


def test_every_loss_over_pairs_is_a_part() -> None:
    names = [n for n in OBJECTIVES if OBJECTIVES[n].kind == "tokens" and OBJECTIVES[n].data == "pairs"]
    assert set(Mix(losses=dict.fromkeys(set(names) - {"mix", "mpo"}, 1)).parts) == set(names) - {"mix", "mpo"}
    assert len(names) > 25
