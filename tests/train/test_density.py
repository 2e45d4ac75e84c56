"""Underlying distribution matching: what unwanted answers count by."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.train.density import BOUNDS, density_weights


def test_weights_are_the_ratio_of_densities_where_it_is_known() -> None:
    """Normal clouds of equal spread: p / (1 - p) of a balanced classifier is exp of a linear function, here
    of 2 x. Rows after the first `train` are weighed, and change no weight."""
    pytest.importorskip("sklearn", reason="the extra `statistics` is not installed")
    rng = np.random.default_rng(0)
    wanted = np.arange(6000) % 3 == 0
    x = rng.normal(np.where(wanted, 1.0, -1.0))[:, None]
    weights = density_weights(x, wanted, 6000)
    np.testing.assert_array_equal(weights[wanted], 1.0)
    inside = ~wanted & (np.abs(x[:, 0]) < 0.3)
    np.testing.assert_allclose(weights[inside], np.exp(2 * x[inside, 0]), rtol=0.1)
    assert (weights.min(), weights.max()) == BOUNDS
    longer = density_weights(np.append(x, [[0.0], [9.0]], axis=0), np.append(wanted, [False, False]), 6000)
    np.testing.assert_array_equal(longer[:6000], weights)
    assert longer[6000] == pytest.approx(1.0, rel=0.1)
    assert longer[6001] == BOUNDS[1]


def test_the_same_prompts_for_both_labels_weigh_the_same() -> None:
    pytest.importorskip("sklearn", reason="the extra `statistics` is not installed")
    x = np.repeat(np.random.default_rng(1).normal(size=(40, 3)), 2, axis=0)
    np.testing.assert_allclose(density_weights(x, np.arange(80) % 2 == 0, 80), 1.0, atol=1e-3)


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed") as caught:
        density_weights(np.zeros((2, 1)), np.array([True, False]), 2)
    assert "jaxalign[statistics]" in str(caught.value)
