"""Statistics of scored pairs by hand-computed cases, and the whole evaluation of a tiny reward model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxalign import api
from jaxalign.errors import UserError
from jaxalign.evals.reward import ScoredPair, calibration, lines, remarks, summarise
from tests.train.test_preference_run import ROWS, write
from tests.train.tiny import write_model


def pair(chosen: float, rejected: float, lengths: tuple[int, int] = (4, 5)) -> ScoredPair:
    return ScoredPair("x", (chosen, rejected), lengths)


def test_a_tie_is_a_miss_and_is_told() -> None:
    report = summarise([pair(1, 0), pair(0, 0), pair(-1, 2), pair(3, 1)])
    assert (report["accuracy"]["passed"], report["accuracy"]["n"], report["ties"]) == (2, 4, 1)
    assert report["margin"]["mean"] == pytest.approx((1 + 0 - 3 + 2) / 4)
    assert any("1 pairs have two equal scores" in text for text in remarks(report))


def test_what_counting_tokens_would_reach() -> None:
    report = summarise([pair(1, 0, (9, 3)), pair(1, 0, (2, 3)), pair(1, 0, (5, 5)), pair(1, 0, (7, 6))])
    assert (report["longer"]["passed"], report["longer"]["n"]) == (2, 3)


def test_scores_that_are_lengths_are_called_so() -> None:
    pairs = [pair(n, n - 1, (n, n - 1)) for n in range(2, 30)]
    report = summarise(pairs)
    assert report["length_correlation"] == pytest.approx(1.0)
    assert any("follow the length" in text for text in remarks(report))
    assert [part["score"] for part in report["by_length"]] == sorted(p["score"] for p in report["by_length"])
    assert sum(part["answers"] for part in report["by_length"]) == 2 * len(pairs)


def test_equal_lengths_have_no_correlation() -> None:
    assert summarise([pair(1, 0, (4, 4)), pair(2, 0, (4, 4))])["length_correlation"] is None


def test_chance_is_called_chance() -> None:
    report = summarise([pair((-1) ** i, 0) for i in range(20)])
    assert any("may be chance" in text for text in remarks(report))


def test_calibration_by_hand() -> None:
    """Two sure pairs of which one is right, two unsure ones that are both right."""
    sure, unsure = math.log(9), math.log(0.55 / 0.45)  # sigmoid 0.9 and 0.55
    found = calibration(np.array([sure + 1e-6, -sure - 1e-6, unsure, unsure]))
    assert [row["pairs"] for row in found["bins"]] == [2, 0, 0, 0, 2]
    assert found["bins"][4]["confidence"] == pytest.approx(0.9, abs=1e-6)
    assert found["bins"][4]["right"]["rate"] == 0.5
    assert found["error"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.45, abs=1e-6)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    write_model(root / "model")
    write(root / "pairs.jsonl", ROWS["pairs"])
    return root


@pytest.mark.slow
def test_a_trained_model_is_evaluated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXALIGN_CACHE", str(here / "cache"))
    keys = {"max_steps": 8, "batch_size": 8, "learning_rate": 3e-2, "dtype": "f32"}
    data = str(here / "pairs.jsonl")
    api.train("reward", model=str(here / "model"), data=data, out=here / "out", **keys)
    report = api.evaluate("reward", str(here / "out"), data, here / "report", dtype="f32")
    assert report["accuracy"]["rate"] > 0.8
    rows = [json.loads(x) for x in (here / "report" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == report["pairs"] == 24
    assert sum(a > b for a, b in (row["scores"] for row in rows)) == report["accuracy"]["passed"]
    assert json.loads((here / "report" / "report.json").read_text()) == report
    assert f"{report['accuracy']['passed']} of 24" in (here / "report" / "report.html").read_text()
    assert "95 % interval" in lines(report)[0]
    turned = api.evaluate("reward", str(here / "out"), data, here / "cost", dtype="f32", cost=True)
    assert turned["margin"]["mean"] == pytest.approx(-report["margin"]["mean"])


def test_a_model_without_a_head_is_refused(here: Path) -> None:
    with pytest.raises(UserError, match="no head for them") as caught:
        api.evaluate("reward", str(here / "model"), str(here / "pairs.jsonl"), here / "none")
    assert "jaxalign train reward" in str(caught.value)
