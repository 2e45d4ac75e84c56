"""The SFT loss on scores that are given: golden numbers, gradients by finite differences, reductions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives.base import Scores
from jaxalign.objectives.sft import SFT
from jaxalign.types import Batch
from tests.objectives import vectors as golden

EMPTY = Batch(None, None, None, None)


def scores(nll: Any, mask: Any, dtype: Any = jnp.float32, **others: Any) -> Scores:
    """[B, 1, T] scores with these negative log-likelihoods; what is masked is 0, as in `token_scores`."""
    nll, mask = jnp.asarray(nll, dtype)[:, None], jnp.asarray(mask)[:, None]
    zeros = jnp.zeros_like(nll)
    fields = {"logsumexp": zeros, "mean_logit": zeros, "correct": zeros, "entropy": zeros} | others
    return Scores(logp=jnp.where(mask, -nll, 0.0), mask=mask, **fields)


def test_vector_token_mean() -> None:
    total, weight, _ = SFT()(scores(golden.NLL, golden.NLL_MASK), EMPTY)
    assert (float(total), float(weight)) == (12.0, 6.0)
    assert total / weight == golden.TOKEN_MEAN


def test_micro_batches_add_up_to_the_global_mean() -> None:
    """Row by row: the sums and weights of the parts are those of the whole; their means are not."""
    parts = [SFT()(scores(golden.NLL[i : i + 1], golden.NLL_MASK[i : i + 1]), EMPTY)[:2] for i in range(2)]
    assert sum(float(p[0]) for p in parts) / sum(float(p[1]) for p in parts) == golden.TOKEN_MEAN
    assert np.mean([float(p[0] / p[1]) for p in parts]) == 1.75


def test_vector_dft() -> None:
    total, weight, _ = SFT(dft=True)(scores(golden.NLL, golden.NLL_MASK), EMPTY)
    np.testing.assert_allclose(total / weight, golden.DFT_MEAN, rtol=1e-6)


def test_dft_scales_the_gradient_by_the_probability_and_not_through_it() -> None:
    given = scores(golden.NLL, golden.NLL_MASK)

    def loss(logp: jax.Array) -> jax.Array:
        return SFT(dft=True)(Scores(**(vars(given) | {"logp": logp})), EMPTY)[0]

    want = np.where(given.mask, -np.exp(given.logp), 0)
    np.testing.assert_allclose(jax.grad(loss)(given.logp), want, rtol=1e-6)


def test_vector_z_loss() -> None:
    lse = np.log(np.exp(golden.LOGITS).sum(-1))
    lse = np.append(0, lse[:-1])[None, None] * np.asarray(golden.MASK)
    mask = np.asarray(golden.MASK) & (np.arange(5) > 0)
    given = scores([-np.asarray(golden.TOKEN_LOGPS)], [mask], logsumexp=jnp.asarray(lse, jnp.float32))
    plain, weight, _ = SFT()(given, EMPTY)
    both, _, _ = SFT(z_loss=1e-4)(given, EMPTY)
    np.testing.assert_allclose((both - plain) / weight, golden.Z_LOSS_MEAN, rtol=1e-3)
    np.testing.assert_allclose(plain, -golden.TOKEN_LOGPS_SUM, rtol=1e-6)


def test_label_smoothing_is_cross_entropy_with_a_smoothed_target() -> None:
    """(1 - e) NLL + e mean_v(-log p_v), the same as the cross entropy with (1 - e) one-hot + e / V."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, 1, 4, 7))
    target = rng.integers(0, 7, (3, 1, 4))
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    smooth = 0.9 * np.eye(7)[target] + 0.1 / 7
    label = np.take_along_axis(logs, target[..., None], -1)[..., 0]
    given = Scores(
        logp=label, logsumexp=(z - logs)[..., 0], mean_logit=z.mean(-1), correct=0 * label, entropy=0 * label,
        mask=np.ones(label.shape, bool),
    )  # fmt: skip
    total, weight, _ = SFT(label_smoothing=0.1)(jax.tree.map(jnp.asarray, given), EMPTY)
    np.testing.assert_allclose(total / weight, -(smooth * logs).sum(-1).mean(), rtol=1e-6)
    assert SFT(label_smoothing=0.1).needs == {"mean_logit"}
    assert SFT().needs == frozenset()


@pytest.mark.parametrize(
    "objective", [SFT(), SFT(label_smoothing=0.2, z_loss=0.01), SFT(z_loss=0.3)], ids=["nll", "smooth", "z"]
)
def test_gradients_by_central_differences(objective: SFT) -> None:
    """In float64, to 1e-6, in every score that the loss reads; masked tokens have none."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        mask = rng.random((2, 1, 5)) < 0.6
        values = {k: jnp.asarray(rng.standard_normal((2, 1, 5))) for k in ("logp", "logsumexp", "mean_logit")}
        rest = {"correct": jnp.zeros((2, 1, 5)), "entropy": jnp.zeros((2, 1, 5)), "mask": jnp.asarray(mask)}
        loss = jax.jit(lambda v: objective(Scores(**v, **rest), EMPTY)[0])
        grads = jax.grad(loss)(values)
        for name, x in values.items():
            for at in np.ndindex(x.shape):
                moved = [loss(values | {name: x.at[at].add(d)}) for d in (1e-4, -1e-4)]
                np.testing.assert_allclose(grads[name][at], (moved[0] - moved[1]) / 2e-4, atol=1e-6)
            assert not np.asarray(grads[name])[~mask].any()


def test_metrics_are_means_over_targets() -> None:
    mask = [[True, False, True], [True, True, False]]
    correct = jnp.asarray([[[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]])
    given = scores(np.ones((2, 3)), mask, correct=correct, entropy=3 * correct)
    metrics = SFT()(given, EMPTY)[2]
    assert {k: (float(a), float(b)) for k, (a, b) in metrics.items()} == {
        "mean_token_accuracy": (2.0, 4.0),
        "entropy": (6.0, 4.0),
    }


@pytest.mark.parametrize("objective", [SFT(dft=True), SFT(label_smoothing=0.1, z_loss=1e-4)])
def test_no_target_is_no_loss(objective: SFT) -> None:
    total, weight, metrics = objective(scores(golden.NLL, np.zeros((2, 4), bool)), EMPTY)
    assert float(total) == float(weight) == 0
    assert all(float(w) == 0 for _, w in metrics.values())


@pytest.mark.parametrize("bad", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SFT(**bad)
