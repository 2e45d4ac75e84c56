"""What every training method must do, over all of the registry: a new line there is tested as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.registry import OBJECTIVES
from jaxalign.sharding import make_mesh
from jaxalign.train.settings import TrainConfig
from tests.conformance.samples import (
    LONGEST,
    ROWS,
    SIZES,
    Sample,
    extreme,
    learnt,
    moved_where_nothing_counts,
    on_device,
    over_tokens,
    sample,
)
from tests.tiny import quick_jit

NEEDS = {
    "mean_logit", "collision", "rivals", "prompt", "ref", "margin", "safe", "tokens_per_group", "whole_batch",
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", list(OBJECTIVES))
Outcome = tuple[Any, Any, Any, Any]  # loss sum, weight, metrics, gradient in the scores


@cache
def compiled(name: str) -> Any:
    """run(scores, batch) -> (loss sum, weight, metrics, gradient of the sum in the scores)."""
    objective = OBJECTIVES[name]()

    def run(scores: Any, batch: Any) -> Outcome:
        def loss(scores: Any) -> Any:
            total, weight, metrics = objective(scores, batch)
            return total, (weight, metrics)

        (total, rest), slope = jax.value_and_grad(loss, has_aux=True, allow_int=True)(scores)
        slope = jax.tree.map(lambda x: np.zeros(x.shape) if x.dtype == jax.dtypes.float0 else x, slope)
        return total, *rest, slope

    return quick_jit(run)


def outcome(name: str, given: Sample) -> Outcome:
    return jax.tree.map(np.asarray, compiled(name)(*on_device(given)))


def ordinary(name: str) -> Sample:
    return sample(OBJECTIVES[name]())


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@EVERY
def test_it_says_what_it_is(name: str) -> None:
    cls, objective = OBJECTIVES[name], OBJECTIVES[name]()
    assert objective.kind in ("tokens", "reward")
    assert objective.data in ("sft", "pairs", "binary", "lists")
    assert objective.group in {"binary": (1, 2), "lists": (0,)}.get(
        objective.data, (SIZES.get(objective.data),)
    )
    assert isinstance(objective.needs, frozenset)
    assert objective.needs <= NEEDS
    full, adapter = objective.rates
    assert 0 < full <= adapter < 1e-2
    assert set(objective.defaults) <= set(TrainConfig.model_fields)
    assert cls.__doc__
    assert cls.__call__.__doc__
    assert all(info.description for info in cls.model_fields.values()), "every key is explained"
    assert hash(objective) == hash(cls()), "a setting, not an object with a state"
    row = {key: value[0][~np.isnan(value[0])] for key, value in ordinary(name).batch.aux.items()}
    assert objective.data == "sft" or objective.fault(row) is None


@EVERY
def test_its_values_are_sums_and_weights(name: str) -> None:
    total, weight, metrics, slope = outcome(name, ordinary(name))
    assert np.isfinite(total)
    assert total.shape == weight.shape == ()
    assert total.dtype == weight.dtype == np.float32
    assert weight > 0
    assert metrics
    for key, (value, count) in metrics.items():
        assert value.shape == count.shape == (), key
        assert np.isfinite(value), key
        assert count >= 0, key
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


ENDS = [(0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0), (-1e-6, -1e-6)]


@EVERY
def test_extremes_are_finite(name: str) -> None:
    """Log-probs of answers, or rewards, at 0 and -1e4, log-ratios of +-1e4, answers of one token."""
    objective = OBJECTIVES[name]()
    for first, rest in ENDS:
        for ref in (0.0, -1e4):
            for length in (None, 1):
                given = extreme(objective, first, rest, ref, length)
                found = jax.tree.leaves(outcome(name, given))
                assert all(np.isfinite(x).all() for x in found), (first, rest, ref, length)


@EVERY
def test_gradients_reach_targets_and_nothing_else(name: str) -> None:
    given = ordinary(name)
    slope = outcome(name, given)[-1]
    if OBJECTIVES[name].kind == "reward":
        assert slope.any()
        assert not slope[~given.batch.mask.any(-1)].any()
        return
    mask = given.scores.mask
    assert slope.logp[mask].any()
    for field in ("logp", "logsumexp", "mean_logit", "rivals"):
        assert not getattr(slope, field)[~mask].any(), field
    for field in ("ref", "collision", "entropy", "correct", "prompt"):
        assert not getattr(slope, field).any(), f"{field} passes a gradient on"


@EVERY
def test_scores_of_prompts_and_padding_do_not_matter(name: str) -> None:
    given = ordinary(name)
    if OBJECTIVES[name].kind == "reward":
        missing = ~given.batch.mask.any(-1)
        changed = Sample(given.scores + np.where(missing, 7, 0).astype(np.float32), given.batch)
    else:
        changed = moved_where_nothing_counts(given)
    assert_same(outcome(name, changed)[:2], outcome(name, given)[:2])


@EVERY
def test_padding_weighs_nothing(name: str) -> None:
    """Empty groups in the middle and columns to the right: the same sums, weights, metrics and gradients."""
    given, groups, columns = ordinary(name), 4, 3
    want, got = outcome(name, given), outcome(name, given.padded(groups, columns))
    assert_same(got[:3], want[:3])

    def compare(got: np.ndarray, want: np.ndarray) -> None:
        assert not got[3 : 3 + groups].any()
        got = np.concatenate([got[:3], got[3 + groups :]])
        if over_tokens(want):
            assert not got[:, :, want.shape[2] :].any()
            got = got[:, :, : want.shape[2]]
        assert_same(got, want)

    jax.tree.map(compare, got[3], want[3])


@EVERY
def test_parts_add_up_to_the_whole(name: str) -> None:
    """Two half batches, unless the method says that it wants the whole one."""
    given, half = ordinary(name), np.arange(ROWS) < ROWS // 2
    if "whole_batch" in OBJECTIVES[name]().needs:
        assert (
            abs(outcome(name, given)[0] - sum(outcome(name, given.rows(k))[0] for k in (half, ~half))) > 1e-6
        )
        return
    first, second = (outcome(name, given.rows(keep)) for keep in (half, ~half))
    assert_same(jax.tree.map(np.add, first, second), outcome(name, given))


@EVERY
def test_an_empty_batch_weighs_nothing(name: str) -> None:
    total, weight, metrics, slope = outcome(name, ordinary(name).rows(np.zeros(ROWS, bool)))
    assert total == weight == 0
    assert all(value == 0 and count == 0 for value, count in metrics.values())
    assert not any(x.any() for x in jax.tree.leaves(slope))


# The only ones that may start in the other direction, and why.
NOT_AT_ONCE = {"discopop": "its loss rises with the margin around 0 (arXiv:2406.08414)"}


@EVERY
def test_a_policy_of_a_few_tokens_learns_what_is_better(name: str) -> None:
    """Adam on the logits of a bandit, or on the scores themselves: the best answer gains on the worst."""
    if name in NOT_AT_ONCE:
        pytest.skip(NOT_AT_ONCE[name])
    objective = OBJECTIVES[name]()
    weights = learnt(objective, 30)
    worst = {"sft": -1, "lists": LONGEST - 1}.get(objective.data, 1)
    gain = weights[0] - weights[worst]
    # A cost is lower for the better answer.
    assert (-gain if name == "cost" else gain) > 0.1


@EVERY
def test_one_and_eight_devices_agree(name: str) -> None:
    """Each device holds one group; losses over the whole batch see the others'."""
    given = ordinary(name)
    spread = NamedSharding(make_mesh(), PartitionSpec(("data", "fsdp")))
    assert len(spread.device_set) == 8
    got = compiled(name)(*jax.device_put(on_device(given), spread))
    assert_same(jax.tree.map(np.asarray, got), outcome(name, given))
