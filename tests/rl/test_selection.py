"""What rounds teach: the published numbers of RSO and RS-DPO, and rows that offline methods read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.data.group_formats import GroupOptions
from jaxalign.data.prompt_formats import to_prompt
from jaxalign.data.readers import read_groups
from jaxalign.rl import selection as s

VECTORS = Path(__file__).parents[3] / "shared" / "specs" / "loss_vectors.json"
ROW = {
    "id": "a",
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}],
}


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("../shared/specs/loss_vectors.json is not here")
    return json.loads(VECTORS.read_text())


def judged(*answers: tuple[str, float]) -> s.Judged:
    texts, rewards = ([a[i] for a in answers] for i in (0, 1))
    return s.Judged(to_prompt(ROW, "rows:1"), texts, rewards, seed=0)  # type: ignore[arg-type]


def pairs(rows: Any, tmp_path: Path, policy: str = "best_vs_worst") -> list[tuple[str, str]]:
    """(chosen, rejected) as an offline method reads the rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = read_groups(file, "pairs", options=GroupOptions(policy), max_bad_rows=0)
    return [(r.chosen[0].content, r.rejected[0].content) for r in records]  # type: ignore[union-attr]


class Fixed:
    """A generator that draws what it is told."""

    def __init__(self, draws: list[float]) -> None:
        self.draws = iter(draws)

    def random(self) -> float:
        return next(self.draws)


def test_rso(published):
    case = published["rso_accept_first_pass"]
    rewards = np.asarray(case["inputs"]["reward"])
    beta = case["params"]["beta"]
    np.testing.assert_allclose(s.acceptance(rewards, beta), case["expected"]["accept_prob"], rtol=1e-9)
    wanted = [i for i, yes in enumerate(case["expected"]["accepted"]) if yes]
    got = s.accepted(rewards, len(wanted), beta, Fixed(case["inputs"]["u"]))  # type: ignore[arg-type]
    assert got == wanted


def test_rso_keeps_the_best_where_it_is_sharp_and_any_where_it_is_not():
    rewards = np.arange(10.0)
    rng = np.random.default_rng(0)
    assert sorted(s.accepted(rewards, 3, 1e-3, rng)) == [7, 8, 9]
    assert s.accepted(rewards, 3, 1e9, rng) == [0, 1, 2]  # in the order in which they were sampled
    assert len(s.accepted(rewards, 20, 0.5, rng)) == 10


def test_rs_dpo(published):
    case = published["rs_dpo_pairs"]
    keys = case["params"]
    got = s.clear_pairs(np.asarray(case["inputs"]["reward"]), keys["eta"], keys["tau"])
    assert [list(pair) for pair in got] == case["expected"]["pairs"]


def test_the_rows_are_read_by_offline_methods(tmp_path):
    given = judged(("good", 3.0), ("fair", 1.0), ("bad", -2.0))
    assert pairs(s.Everything()(given), tmp_path) == [("good", "bad")]
    assert pairs(s.ClearPairs(eta=0.9)(given), tmp_path) == [("good", "bad"), ("fair", "bad")]
    assert pairs(s.AgainstRow()(given), tmp_path) == [("Hello.", x) for x in ("good", "fair", "bad")]
    kept = list(s.RejectionSampled(keep=2, sampling_beta=1e-3)(given))
    assert kept[0]["scores"] == [3.0, 1.0]
    assert pairs(kept, tmp_path, "all_pairs") == [("good", "fair")]


def test_spin_does_not_learn_from_the_row_s_own_words():
    assert list(s.AgainstRow()(judged(("Hello. ", 0.0)))) == []
    alone = s.Judged(to_prompt({"prompt": "1 + 1 =", "completion": " 2"}, "rows:1"), [" 3"], [0.0], 0)
    (row,) = s.AgainstRow()(alone)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("1 + 1 =", " 2", " 3")
